"""What scripts of the published code do around a model, before and after `swap`.

    python -m tests.support.scripts PATH_OF_FL-I2MoE_Decor PATH_OF_I2MoE

imports the classes of these checkouts, which runs their code (see `tests.support.checkout`), and prints a table:
one row for each use and checkout. tests/published/test_scripts.py runs the same with stand-ins for the classes.

A row is a function of the published classes; it compares the published model with its replacement, raises an
AssertionError if they differ, and returns what it found in words.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flmoe_kernels
from flmoe_kernels.published.fingerprints import FINGERPRINTS
from tests.support import regularizers as _regularizers  # noqa: F401  adds rows
from tests.support import variants as _variants  # noqa: F401
from tests.support.checkout import Checkout
from tests.support.fingerprints import stand_ins
from tests.support.published_page import page_problems
from tests.support.script_models import (
    CLASSES,
    CLOSE,
    NAMES,
    ROWS,
    WIDTH,
    NotInThisCode,
    Row,
    close,
    data,
    error,
    fusion_of,
    layer_of,
    row,
    same_noise,
    swapped,
)


@row("training step of the layer")
def training_step(published: Any) -> str:
    results = []
    layer = layer_of(published)
    inputs, masks = data(published)
    with same_noise():
        noise = [[torch.randn_like(x) for x in inputs] for _ in range(4)]
    for model in (layer, swapped(layer)):
        with same_noise():
            given = {} if model is layer else {"replacements": noise}
            outputs = model(inputs, *masks, **given)
        loss = F.cross_entropy(outputs[2], torch.arange(4) % CLASSES) + 0.1 * sum(outputs[3])
        loss.backward()
        own = dict(model.named_parameters())
        results.append([list(outputs), [own[name].grad for name, _ in layer.named_parameters()]])
    return "outputs and gradients " + close(results[1], results[0])


@row("inference, regression with one output")
def inference(published: Any) -> str:
    layer = layer_of(published, classes=1)
    inputs, masks = data(published)
    return close(
        list(swapped(layer).inference(inputs, *masks)), list(layer.inference(inputs, *masks))
    )


@row("sparse layer: results, gate losses, report")
def sparse_layer(published: Any) -> str:
    layer = layer_of(published, sparse=True)
    inputs, masks = data(published)
    report = flmoe_kernels.swap(copy.deepcopy(layer))
    found = close(
        list(report.model.inference(inputs, *masks)), list(layer.inference(inputs, *masks))
    )
    losses = report.model.train()(inputs, *masks)[4]
    torch.mean(torch.tensor(losses))  # as the training scripts do
    assert "gate loss" in str(report), "the report does not mention the gate losses"
    return f"results {found}, the report lists the differences"


@row("attention maps and their gradients, dense and sparse")
def attention_maps(published: Any) -> str:
    if published.compat == "i2moe":
        raise NotInThisCode
    found = []
    for sparse in (False, True):
        layer, (inputs, masks) = layer_of(published, sparse), data(published)
        results = [captured(model, inputs, masks[0]) for model in (layer, swapped(layer))]
        assert len(results[0][0]) == 8
        found.append(error(results[1], results[0]))
    assert max(found) <= CLOSE, found
    return f"equal to {max(found):.0e}"


def captured(model: Any, inputs: list[Tensor], masks: list[Tensor]) -> list[list[Tensor]]:
    """Maps and gradients as the published evaluators obtain them: flags, a call of every expert, one backward."""
    experts = [expert.fusion_model for expert in model.interaction_experts]
    for part in model.modules():
        if hasattr(part, "capture_attn") and hasattr(part, "require_attn_grad"):
            part.capture_attn = part.require_attn_grad = True
    logits = [fusion(inputs, masks, return_latent=False) for fusion in experts]
    weights = model.reweight(inputs, masks).detach()
    mixed = (torch.stack(logits, dim=1) * weights.unsqueeze(-1)).sum(dim=1)
    mixed[:, 0].sum().backward()
    maps = [part.last_attn for part in model.modules() if hasattr(part, "last_attn")]
    results = [[a.detach() for a in maps], [a.grad for a in maps]]
    for part in model.modules():
        if hasattr(part, "capture_attn"):
            part.capture_attn = part.require_attn_grad = False
            part.last_attn = None
    model.inference(inputs, masks)
    assert all(getattr(part, "last_attn", None) is None for part in model.modules())
    return results


@row("published evaluators: rollout, attention x gradient, integrated gradients")
def evaluators(published: Any) -> str:
    if published.compat == "i2moe" or not hasattr(published, "module"):
        raise NotInThisCode  # the stand-ins have no evaluators
    target = torch.tensor([0, 1, 2, 0])
    words = []
    inputs, (masks,) = data(published)
    for name, model in (("imoe", layer_of(published)), ("gshardgate", fusion_of(published, True))):
        code = published.module(f"src.common.evaluation.masking_eval_{name}")
        found = []
        for each in (model, swapped(model)):
            arguments = (each, inputs, masks, list(NAMES))
            found.append(
                [
                    code.attn_importance_per_modality(*arguments),
                    code.grad_attn_importance_per_modality(*arguments, "multiclass", target),
                    code.ig_importance_per_modality(*arguments, "multiclass", target, steps=3),
                ]
            )
        words.append(f"{name} {close(found[1], found[0], 1e-3)}")
    return ", ".join(words)


@row("methods of the experts")
def expert_methods(published: Any) -> str:
    found = []
    inputs, masks = data(published)
    for sparse in (False, True):
        layer = layer_of(published, sparse)
        results = []
        for model in (layer, swapped(layer)):
            expert = model.interaction_experts[0]
            with same_noise():
                results.append(
                    [
                        expert.forward_multiple(inputs, *masks),
                        expert.forward(inputs, *masks),
                        expert.forward_with_replacement(inputs, *masks, replace_index=1),
                    ]
                )
        if sparse:
            # The swapped layer sums the gate losses of all modalities, the original keeps the last one.
            results = [[(a[0], b[0], c[0]) for a, b, c in [each]] for each in results]
        found.append(error(results[1], results[0]))
    assert max(found) <= CLOSE, found
    return f"equal to {max(found):.0e}"


@row("fusion model alone: dense, sparse, one and three modalities, regression")
def lone_fusion(published: Any) -> str:
    found = []
    for sparse, modalities, classes in ((False, 2, 3), (True, 2, 3), (False, 1, 3), (False, 3, 1)):
        fusion = fusion_of(published, sparse, modalities, classes)
        inputs, masks = data(published, modalities)
        fast = swapped(fusion)
        assert type(fast) is flmoe_kernels.FusionTransformer
        for arguments in ({}, {"return_latent": True}):
            results = [model(inputs, *masks, **arguments) for model in (fusion, fast)]
            found.append(error(results[1], results[0]))
        assert (float(fast.gate_loss()) > 0) == sparse
    assert max(found) <= CLOSE, found
    return f"equal to {max(found):.0e}"


@row("hooks on the sparse MLPs of a fusion model")
def hooks(published: Any) -> str:
    """The pattern of the published GShard training: hooks that read what the MLP records of each call."""
    fusion, (inputs, *_) = fusion_of(published, sparse=True), data(published)
    if not any(hasattr(part, "last_topk_pre_mix") for part in fusion.modules()):
        raise NotInThisCode
    records = []
    for model in (fusion, swapped(fusion)):
        seen: list[list[Tensor]] = []

        def hook(module: Any, _inputs: Any, output: Tensor, seen: Any = seen) -> None:
            seen.append([output, module.last_topk_indices, module.last_topk_pre_mix])

        layers = [
            part for part in model.modules() if hasattr(part, "all_gates") and hasattr(part, "gate")
        ]
        for part in layers:
            part.register_forward_hook(hook)
            part.capture_topk_pre_mix = True
            part.gate.reset_topk_logit()
            part.last_topk_indices = part.last_topk_scores = None
        model(inputs)  # without masks, so that padding counts in both
        records.append(seen)
    assert len(records[0]) == 2
    assert records[1][0][2].requires_grad
    return "one call per modality; what the MLP records is " + close(records[1], records[0])


@row("FlopCounterMode")
def flops(published: Any) -> str:
    inputs, masks = data(published)
    layer = layer_of(published)
    counts = []
    for model in (layer, swapped(layer)):
        with FlopCounterMode(display=False) as counter:
            model.inference(inputs, *masks)
        counts.append(counter.get_total_flops())
    # The swapped layer computes no padded tokens; its mixture of experts is counted, the original's is not.
    assert 0.5 * counts[0] < counts[1] < 1.01 * counts[0], counts
    return f"{counts[1]:,} FLOP, published {counts[0]:,}"


@row("checkpoints: saved, loaded strictly on both sides, one after another")
def checkpoints(published: Any) -> str:
    layer, other = layer_of(published, sparse=True), layer_of(published, sparse=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    inputs, masks = data(published)
    fast = swapped(layer)
    expected = other.inference(inputs, *masks)[2]
    missing, unexpected = fast.load_state_dict(copy.deepcopy(other.state_dict()), strict=False)
    assert not [*missing, *unexpected]
    found = close(fast.inference(inputs, *masks)[2], expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save({"ensemble_model": {k: v.cpu() for k, v in fast.state_dict().items()}}, path)
        layer.load_state_dict(torch.load(path, weights_only=True)["ensemble_model"], strict=True)
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in layer.parameters())
    return f"results {found}, {close(layer.inference(inputs, *masks)[2], expected)}"


@row("inputs that share memory; inputs are not changed")
def inputs_are_kept(published: Any) -> str:
    inputs, masks = data(published)
    inputs[1] = inputs[1][:1].expand_as(inputs[1])
    before = [x.clone() for x in inputs]
    model = swapped(fusion_of(published))
    model(inputs, *masks)
    return close(inputs, before, 0.0)


@row("a swapped fusion model as the template of a layer")
def template(published: Any) -> str:
    fusion, (inputs, masks) = fusion_of(published), data(published)
    results = []
    for each in (fusion, swapped(fusion)):
        torch.manual_seed(4)
        layer = published.InteractionMoE(2, each, False, WIDTH, WIDTH, 2, 1).double().eval()
        results.append(list(layer.inference(inputs, *masks)))
    return close(results[1], results[0])


def outcome(function: Row, published: Any) -> tuple[bool, str]:
    """Whether a row passed, and what it found."""
    try:
        return True, function(published)
    except NotInThisCode:
        return True, "no such use in this code"
    except Exception as problem:
        place = traceback.extract_tb(problem.__traceback__)[-1]
        lines = str(problem).splitlines() or [""]
        return (
            False,
            f"FAILED: {type(problem).__name__}: {lines[0]} ({place.name}, line {place.lineno})",
        )


def main(paths: list[str]) -> int:
    failed = False
    FINGERPRINTS["fastmoe"] = stand_ins()  # of the CPU's replacement for FastMoE
    for path in paths:
        published = Checkout(path)
        print(f"{published.compat}, {published.root}")
        for problem in page_problems(published):
            failed = True
            print(f"  docs/published_code.md: {problem}")
        for name, function in ROWS.items():
            passed, words = outcome(function, published)
            failed |= not passed
            print(f"  {name:75} {words}", flush=True)
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("expected the folders of checkouts of FL-I2MoE_Decor or I2MoE")
    sys.exit(main(sys.argv[1:]))
