"""Rows of `tests.support.scripts`: published variants of the layer, and the options that compute the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flmoe_kernels
from tests.support.script_models import (
    CLASSES,
    WIDTH,
    NotInThisCode,
    close,
    data,
    fusion_of,
    layer_of,
    row,
    same_noise,
    swapped,
)

EXACT = 1e-10
MODALITIES = 3
PATCHES = 6


def training_results(
    model: nn.Module, inputs: list[Tensor], names: list[str], **given: Any
) -> list[Any]:
    """Results of a training step in eval mode, and the gradients of the parameters with these names."""
    outputs = list(model(inputs, **given))
    losses = outputs[3] if len(outputs) > 3 else []
    loss = F.cross_entropy(outputs[2], torch.arange(len(inputs[0])) % CLASSES)
    (loss + sum(0.1 * x for x in losses)).backward()
    parameters = dict(model.named_parameters())
    gradients = [parameters[name].grad for name in names]
    return [*outputs, [torch.zeros(()) if x is None else x for x in gradients]]


def ablation(
    published: Any,
    module: str,
    name: str,
    options: dict[str, Any],
    published_options: dict[str, Any] | None = None,
    rename: Callable[[str], str] = lambda key: key,
    **given: Any,
) -> tuple[list[Any], list[Any]]:
    """Results of a training step of a published ablation, and of InteractionMoE with `options`."""
    if published.compat == "fl_i2moe" or not hasattr(published, "module"):
        raise NotInThisCode  # only I2MoE's checkout has the ablations
    kind = getattr(published.module(f"src.ablation.{module}"), name)
    fusion = fusion_of(published, modalities=MODALITIES)
    layer = kind(
        *(MODALITIES, fusion, False, WIDTH, WIDTH, 2, 1.5), **(published_options or {})
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    template = flmoe_kernels.FusionTransformer(
        *(MODALITIES, WIDTH, CLASSES, 2, 4, 0.5, "i2moe", PATCHES)
    )
    own = flmoe_kernels.InteractionMoE(
        *(MODALITIES, template, False, WIDTH, WIDTH, 2, 1.5), **options
    ).double()
    names = [(rename(key), key) for key in layer.state_dict()]
    own.load_state_dict({key: layer.state_dict()[old] for key, old in names})
    report = str(flmoe_kernels.swap(nn.ModuleList([copy.deepcopy(layer)])))
    assert name in report, report
    assert "InteractionMoE(" in report, report
    inputs, _ = data(published, MODALITIES)
    with same_noise():
        noise = [[torch.randn_like(x) for x in inputs] for _ in own.interaction_experts]
        expected = training_results(layer.eval(), inputs, [old for _, old in names], **given)
    more = {} if "replacement" in options else {"replacements": noise}
    actual = training_results(own.eval(), inputs, [key for key, _ in names], **more, **given)
    return actual, expected


@row("InteractionMoERegression: training step, inference")
def regression(published: Any) -> str:
    if not hasattr(published, "InteractionMoERegression"):
        raise NotInThisCode
    layer = layer_of(published, classes=1)
    layer.__class__ = published.InteractionMoERegression
    fast = swapped(layer)
    assert type(fast) is flmoe_kernels.InteractionMoERegression
    inputs, _ = data(published)
    with same_noise():
        noise = [[torch.randn_like(x) for x in inputs] for _ in range(4)]
    found = []
    for model in (layer, fast):
        with same_noise():
            outputs = model(inputs, **({} if model is layer else {"replacements": noise}))
        (outputs[2].square().mean() + 0.1 * sum(outputs[3])).backward()
        own = dict(model.named_parameters())
        gradients = [own[name].grad for name, _ in layer.named_parameters()]
        found.append([list(outputs), list(model.inference(inputs)), gradients])
    return close(found[1], found[0], EXACT)


@row("ablation: a modality replaced by zeros")
def zero_vector(published: Any) -> str:
    actual, expected = ablation(
        published, "ZeroVectorIMoE", "ZeroVectorInteractionMoE", {"replacement": "zero"}
    )
    return close(actual, expected, EXACT)


@row("ablation: a modality replaced by mean vectors")
def mean_vector(published: Any) -> str:
    generator = torch.Generator().manual_seed(5)
    means = [torch.randn(PATCHES, WIDTH, generator=generator).double() for _ in range(MODALITIES)]
    actual, expected = ablation(
        *(published, "MeanVectorIMoE", "MeanVectorInteractionMoE", {"replacement": "mean"}),
        mean_vectors=means,
    )
    return close(actual, expected, EXACT)


@row("ablation: fewer perturbed views")
def less_perturbed(published: Any) -> str:
    plain_to = Tensor.to
    on_cpu = mock.patch.object(  # the published loss of a modality without a view is on "cuda:0"
        Tensor, "to", lambda x, *args, **kw: x if args == ("cuda:0",) else plain_to(x, *args, **kw)
    )
    chosen = mock.patch.object(random, "sample", lambda population, count: [0, 2][:count])
    own = mock.patch.object(torch, "randperm", return_value=torch.tensor([2, 0, 1]))
    with on_cpu, chosen, own:
        actual, expected = ablation(
            *(published, "LessPerturbedForwardPassIMoE", "LessPerturbedForwardPassIMoE"),
            {"num_perturbed": 2},
            {"num_purturb": 2},
        )
    # The package's list has an entry for each modality.
    actual[0] = [[views[i] for i in (0, 1, 3)] for views in actual[0]]
    return close(actual, expected, EXACT)


@row("ablation: synergy and redundancy only")
def two_experts(published: Any) -> str:
    actual, expected = ablation(
        *(published, "SynergyRedundancyOnlyIMoE", "SynergyRedundancyOnlyIMoE"),
        {"uniqueness": False},
    )
    return close(actual, expected, EXACT)


@row("ablation: no interaction losses")
def no_losses(published: Any) -> str:
    def renamed(key: str) -> str:
        start, e, rest = key.partition(".")[0], *key.split(".", 2)[1:]
        return f"interaction_experts.{e}.fusion_model.{rest}" if start == "experts" else key

    actual, expected = ablation(
        *(published, "NoInteractionLossIMoE", "NoInteractionLossIMoE"),
        {"interaction_loss": False},
        rename=renamed,
    )
    experts, weights, logits, losses, gradients = actual
    assert not any(float(x.detach()) for x in losses)
    return close([[views[0] for views in experts], weights, logits, gradients], expected, EXACT)


@row("ablation: an average instead of the reweighting")
def average(published: Any) -> str:
    actual, expected = ablation(
        *(published, "SimpleWeightedAverageIMoE", "SimpleWeightedAverageIMoE"),
        {"reweighting": "average"},
    )
    expected[1] = expected[1].expand_as(actual[1])  # published: one weight per expert
    return close(actual, expected, EXACT)
