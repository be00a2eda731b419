"""Tests of attribute: rollouts against dense L x L products, memory, results."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.explain.attribution import rollout
from flmoe_kernels.explain.attribution.attribute import attribute
from flmoe_kernels.explain.attribution.values import METHODS
from flmoe_kernels.explain.masking.faithfulness import faithfulness
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.explain_layers import CASES, Weighted, call_of, dense_rollout, scaled_rows
from tests.support.inputs import as_dtype
from tests.support.layers import LayerCase
from tests.support.refusals import assert_refused


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS[:2])
def test_rollouts_are_the_dense_products(
    case: LayerCase, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts in blocks of all samples and of a few queries."""
    for block, explains, readout in (
        (rollout.MAX_SCORES, "mixture", "tokens"),
        (40, "expert", 1),
    ):
        monkeypatch.setattr(rollout, "MAX_SCORES", block)
        exact = dense_rollout(case, torch.float64, method, explains, readout)
        options: dict[str, Any] = {"method": method, "explains": explains, "readout": readout}
        for dtype in (torch.float64, torch.float32):
            found = attribute(*call_of(case, dtype), **options)
            low = dense_rollout(case, dtype, method, explains, readout)
            for m, oracle in enumerate(exact):
                ours, theirs = found.values[m].to(dtype), low[m]
                assert_within_budget(ours, theirs, oracle, f"{method} {case}")
                if float(oracle.std()) > 1e-3:
                    assert_outside_budget(ours.roll(1, 1), theirs, oracle, "experts exchanged")
                    assert_outside_budget(ours.roll(1, 0), theirs, oracle, "samples exchanged")


@pytest.mark.parametrize("method", METHODS[:2])
def test_rollouts_keep_small_differences_in_float32(method: str) -> None:
    """Gradient rollouts are almost uniform, so they are compared after scaling to 0..1."""
    case = CASES[0]
    exact, low = (
        dense_rollout(case, dtype, method, "expert", "tokens")
        for dtype in (torch.float64, torch.float32)
    )
    found = attribute(*call_of(case, torch.float32), method=method, explains="expert")
    for e in range(case.experts):
        for m, ours in enumerate(found.normalized(e)):
            scaled = [scaled_rows(x[m][:, e], found.valid[m]) for x in (low, exact)]
            assert_within_budget(ours.float(), *scaled, f"{method} of expert {e}")
            assert_outside_budget(ours.roll(1, 1), *scaled, "tokens exchanged")


@pytest.mark.parametrize("method", METHODS[:2])
def test_the_readout_of_all_rows_is_the_published_one(method: str) -> None:
    for case in (CASES[0], CASES[3]):
        layer, inputs, masks = call_of(case, torch.float64)
        # The published code sums over the experts; its attention rollouts are weighted.
        parts = dense_rollout(case, torch.float64, method, "mixture", "all")
        weights = case.reference(torch.float64).eval().reweight(inputs, masks).detach()
        shares = weights if method == "attention_rollout" else torch.ones_like(weights)
        expected = [torch.einsum("be,bel->bl", shares, x) for x in parts]
        found = attribute(layer, inputs, masks, method=method, readout="all")
        other = attribute(layer, inputs, masks, method=method)
        for m, ok in enumerate(found.valid):
            torch.testing.assert_close(found.of()[m][ok], expected[m][ok], rtol=1e-12, atol=1e-14)
            assert not found.of()[m][~ok].any()
            chosen = ok.clone()
            chosen[:, 0] &= m > 0 or case.lengths[m] == 1
            scaled = scaled_rows(expected[m], chosen)
            torch.testing.assert_close(found.normalized(exempt=[0])[m], scaled, rtol=0, atol=1e-9)
        assert not torch.allclose(other.of()[0], found.of()[0], rtol=1e-3)
        flat = dataclasses.replace(found, mixture=tuple(map(torch.ones_like, found.mixture)))
        assert not any(x.any() for x in flat.normalized())
        # Padded queries attend to valid keys only; their values have no effect.
        hidden = [
            torch.where(ok.unsqueeze(2), x, torch.nan)
            for x, ok in zip(inputs, found.valid, strict=True)
        ]
        again = attribute(layer, hidden, masks, method=method, readout="all")
        torch.testing.assert_close(again.of(), found.of())


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=str)
def test_a_fusion_model_alone_is_one_expert(case: LayerCase) -> None:
    layer, inputs, masks = call_of(case, torch.float64)
    fusion = layer.interaction_experts[1].fusion_model
    for method in METHODS:
        options: dict[str, Any] = {"method": method, "target": 1, "n_steps": 2, "readout": "all"}
        found = attribute(fusion, inputs, masks, **options)
        whole = attribute(layer, inputs, masks, explains="expert", **options)
        assert found.experts == ("model",)
        torch.testing.assert_close(found.of(), whole.of(1))
        torch.testing.assert_close(found.scores[:, 0], whole.scores[:, 1])
        assert not torch.allclose(found.of()[0], whole.of(0)[0], rtol=1e-3)
    drops = faithfulness(fusion, inputs, masks, found, n_random=1, budgets=[30])
    expected = faithfulness(
        layer, inputs, masks, found.of(), target=1, expert=1, n_random=1, budgets=[30]
    )
    torch.testing.assert_close(drops.random, expected.random)


def test_a_fusion_model_alone_is_checked() -> None:
    layer, inputs, _ = call_of(CASES[4], torch.float64)
    fusion = layer.interaction_experts[0].fusion_model
    ones = [torch.ones(x.shape[:2]) for x in inputs]
    assert_refused(lambda: attribute(fusion, inputs, ones), "masks: expected None for learned")
    fusion.network[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayer, match=r"network\.0\.attn: has a forward hook"):
        attribute(fusion, inputs)


def test_gradient_rollout_of_several_labels() -> None:
    """The score of a multi-label target is the mean over its labels; without labels it is the largest logit."""
    case = dataclasses.replace(CASES[0], batch=1, masks="none")
    layer, inputs, masks = call_of(case, torch.float64)
    options: dict[str, Any] = {"method": "gradient_rollout", "explains": "expert"}
    labels = torch.tensor([[0, 1, 1, 0]])
    found = attribute(layer, inputs, masks, target=labels, **options)
    assert found.multi_label
    single = [attribute(layer, inputs, masks, target=c, **options) for c in (1, 2)]
    torch.testing.assert_close(found.scores, (single[0].scores + single[1].scores) / 2)
    assert not torch.allclose(found.values[0], single[0].values[0], rtol=1e-6)
    none = attribute(layer, inputs, masks, target=torch.zeros(1, 4), **options)
    torch.testing.assert_close(none.values, attribute(layer, inputs, masks, **options).values)


def test_the_mixture_is_made_of_the_experts() -> None:
    layer, inputs, masks = call_of(CASES[0], torch.float64)
    for method in METHODS:
        found = {
            explains: attribute(layer, inputs, masks, method=method, explains=explains, n_steps=3)
            for explains in ("mixture", "expert")
        }
        weights = layer.inference(inputs, masks)[1]
        own = found["expert"]
        expected = [torch.einsum("be,bel->bl", weights, x) for x in own.values]
        torch.testing.assert_close(own.of(), expected)
        parts = found["mixture"]
        if method == "attention_rollout":
            torch.testing.assert_close(parts.of(), expected)
        else:
            torch.testing.assert_close(parts.of(), [x.sum(dim=1) for x in parts.values])
        torch.testing.assert_close(parts.scores, own.scores * weights)
        torch.testing.assert_close(own.of("synergy"), [x[:, 2] for x in own.values])
        assert own.experts == ("unique_0", "unique_1", "synergy", "redundancy")


GROWTH = """
import re, torch
from flmoe_kernels.explain.attribution.attribute import attribute
from tests.support.layers import LayerCase
def peak():
    # Peak of this program only: ru_maxrss would start at the size of the parent process.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(2)
def call(length, method):
    case = LayerCase((length, length), batch=1, dim=8, heads=2)
    attribute(case.reference().eval(), case.inputs(), method=method, n_steps=1)
    return peak()
methods = ("attention_rollout", "gradient_rollout", "integrated_gradients")
sizes = [max(call(768, method) for method in methods)]
sizes += [call(1536, method) for method in methods]
case = LayerCase((1536, 1536), batch=1, dim=8, heads=2)
expert = case.reference().eval().interaction_experts[0]
expert(case.inputs())
sizes.append(peak())
print(*(after - before for before, after in zip(sizes, sizes[1:])))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_maps() -> None:
    """Measured in a new process; control: one pass of one reference expert, with its 2 x 36 MiB map."""
    result = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    *ours, dense = map(int, result.stdout.split())  # KiB
    assert max(ours) < 20 * 1024, ours
    assert dense > 60 * 1024


def test_the_model_is_unchanged() -> None:
    """Frozen parameters, no_grad, inference mode and a hook change neither the model nor the values."""
    case = dataclasses.replace(CASES[0], dropout=0.5)
    layer, inputs, masks = call_of(case, torch.float64)
    before = {name: id(part) for name, part in layer.named_modules()}
    for method in METHODS:
        options: dict[str, Any] = {"method": method, "n_steps": 2}
        found = attribute(layer, inputs, masks, **options)
        layer.requires_grad_(False)
        with torch.no_grad():
            frozen = attribute(layer, inputs, masks, **options)
        with torch.inference_mode():
            other = attribute(
                layer, [x.clone() for x in inputs], [x.clone() for x in masks], **options
            )
        layer.requires_grad_(True)
        for values in (frozen.values, other.values):
            torch.testing.assert_close(values, found.values)
        assert not any(x.requires_grad for x in found.values)
    assert before == {name: id(part) for name, part in layer.named_modules()}
    assert all(p.grad is None for p in layer.parameters())
    assert all(x.grad is None for x in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, inputs, masks = call_of(CASES[0], dtype)
    exact = copy.deepcopy(layer).double(), as_dtype(inputs, torch.float64), masks
    for method in METHODS[:2]:
        found = attribute(layer, inputs, masks, method=method, explains="expert", target=0)
        oracle = attribute(*exact, method=method, explains="expert", target=0)
        for ours, theirs in zip(found.values, oracle.values, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.003)
            assert float(theirs.max()) > 0.05


def test_errors() -> None:
    layer, inputs, masks = call_of(CASES[0], torch.float32)
    path: dict[str, Any] = {"method": "integrated_gradients"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "saliency"}, "method: expected one of attention_rollout"),
        ({"explains": "all"}, "explains: expected one of mixture, expert"),
        ({"readout": "cls"}, "readout: expected one of tokens, latent"),
        ({"target": torch.tensor([0, 1, 9])}, "target: expected values from 0 to 3"),
        ({"target": torch.zeros(3, 5)}, r"target: expected \(B, C\) = \(3, 4\)"),
        ({"target": torch.zeros(3).long(), "multi_label": True}, "target: with multi_label"),
        ({**path, "n_steps": 0}, "n_steps: expected an int from 1"),
        ({**path, "baseline": [torch.zeros(16)]}, "baseline: expected 2 Tensors"),
    ]
    for options, message in wrong:
        assert_refused(partial(attribute, layer, inputs, masks, **options), message)
    assert_refused(lambda: attribute(layer.train(), inputs, masks), "eval mode")
    layer.eval()
    narrow, linear = [x[..., :8] for x in inputs], Weighted((5, 3), 4, 3).eval()
    assert_refused(lambda: attribute(layer, narrow), r"inputs\[0\]: expected \(batch, tokens, 16\)")
    assert_refused(
        lambda: attribute(linear, inputs), "TypeError: .* InteractionMoE or its reference"
    )
    constant = lambda x, masks: x[0].detach().sum(dim=1)  # noqa: E731
    assert_refused(lambda: attribute(constant, inputs, **path), "logits with a gradient")
    found = attribute(layer, inputs, masks)
    assert_refused(lambda: found.of("shared"), "expert: expected one of unique_0")
