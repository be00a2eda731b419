"""Properties of every layer: memory of outputs, tensors without data, dtypes of inputs, masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from flmoe_kernels import InteractionMoE, PairInteractionMoE
from tests.support.inputs import draw_masks
from tests.support.layers import (
    FL,
    I2,
    SPARSE_FL,
    SPARSE_I2,
    LayerCase,
    fusion_of,
)
from tests.support.routed_layers import GATES, make

Call = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer for two modalities of width 16: new(backend), and calls(layer, inputs, masks), of which the last
    draws no random numbers in eval mode."""

    new: Callable[[str | None], nn.Module]
    calls: tuple[Call, ...]
    case: LayerCase = FL


def forward(layer: Any, x: Any, masks: Any) -> Any:
    return layer(x, masks)


def inference(layer: Any, x: Any, masks: Any) -> Any:
    return layer.inference(x, masks)


def with_latent(layer: Any, x: Any, masks: Any) -> Any:
    return (*layer(x, masks, return_latent=True), layer.gate_loss())


def with_losses(layer: Any, x: Any, masks: Any) -> Any:
    return layer(x, masks, interaction_losses=True)


def routed(layer: Any, x: Any, masks: Any) -> Any:
    return layer(x[0], None if masks is None else masks[0]), layer.gate_loss()


def interaction(case: LayerCase, backend: str | None) -> nn.Module:
    return InteractionMoE.adopt(case.reference(), backend=backend)


def pairs(tokens: bool, backend: str | None) -> nn.Module:
    torch.manual_seed(0)
    return PairInteractionMoE((16, 16), num_classes=3, token_outputs=tokens, backend=backend)


CASES = {"": FL, " i2moe": I2, " sparse": SPARSE_FL, " sparse i2moe": SPARSE_I2}
LAYERS = {
    **{
        f"InteractionMoE{name}": Layer(partial(interaction, case), (forward, inference), case)
        for name, case in CASES.items()
    },
    **{
        f"FusionTransformer{name}": Layer(partial(fusion_of, case), (with_latent,), case)
        for name, case in CASES.items()
    },
    "PairInteractionMoE": Layer(partial(pairs, False), (with_losses, forward)),
    "PairInteractionMoE tokens": Layer(partial(pairs, True), (with_losses, forward)),
    **{
        f"RoutedMLP {gate}": Layer(
            lambda backend, gate=gate: make(gate, backend=backend), (routed,)
        )
        for gate in GATES
    },
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of a result, each once; the published layer returns some latents twice."""
    return list({id(x): x for x in tree_leaves(result) if isinstance(x, Tensor)}.values())


def seeded(call: Call, *arguments: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return tensors_of(call(*arguments))


@each_mode
@each_layer
def test_outputs_own_their_memory(name: str, training: bool) -> None:
    """They can be changed in place before the backward pass."""
    case, layer = LAYERS[name].case, LAYERS[name].new(None).train(training)
    parameters, options = list(layer.parameters()), {"allow_unused": True}
    for call in LAYERS[name].calls:
        first = seeded(call, layer, case.inputs(), None)
        for x in first:
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        assert len({x.untyped_storage().data_ptr() for x in first}) == len(first)
        total = sum(x.sum() for x in first if x.requires_grad)
        expected = torch.autograd.grad(total, parameters, **options)
        changed = seeded(call, layer, case.inputs(), None)
        for x in changed:
            x += 1
        total = sum(x.sum() for x in changed if x.requires_grad)
        torch.testing.assert_close(torch.autograd.grad(total, parameters, **options), expected)


def arguments(case: LayerCase, masked: bool, device: str) -> tuple[list[Tensor], Any]:
    x = [torch.zeros(each.shape, device=device) for each in case.inputs()]
    mask = torch.ones(x[0].shape[:2], dtype=torch.bool, device=device)
    return x, [mask, None] if masked and case.compat == "fl_i2moe" else None


def results(name: str, layer: nn.Module, masked: bool, device: str) -> list[Tensor]:
    """All tensors of the results, after a backward pass in training."""
    found = []
    for call in LAYERS[name].calls:
        found += tensors_of(call(layer, *arguments(LAYERS[name].case, masked, device)))
    if layer.training:
        torch.stack([x.sum() for x in found if x.requires_grad]).sum().backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in layer.parameters())
        assert any(p.grad is not None for p in layer.parameters())
    return found


# The other gates run the same code on the meta device.
WITHOUT_DATA = [
    name for name in LAYERS if name not in ("RoutedMLP NaiveGate", "RoutedMLP SwitchGate")
]


def described(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tensors]


@pytest.mark.parametrize(
    ("training", "masked"), [(False, True), (True, False)], ids=["eval masked", "train"]
)
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_shapes_and_dtypes_without_data(name: str, training: bool, masked: bool) -> None:
    """Fake tensors, and tensors on the meta device, as on the CPU. Nothing of a fake call stays in the layer."""
    layer = LAYERS[name].new(None).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = results(name, layer, masked, "cpu")
    assert all(isinstance(x, FakeTensor) for x in fake)
    layer.zero_grad()
    expected = results(name, layer, masked, "cpu")
    assert not any(isinstance(x, FakeTensor) for x in expected)
    meta = results(name, layer.to("meta"), masked, "meta")
    assert all(x.is_meta for x in meta)
    assert described(fake) == described(meta) == described(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of another device
        assert described(results(name, layer, masked, "meta")) == described(meta)


# Inputs that the published layers accept: low precision, missing masks, any value in the padding.
PUBLISHED = {
    name: layer
    for name, layer in LAYERS.items()
    if layer.case.compat == "fl_i2moe" and "RoutedMLP" not in name
}
PUBLISHED["reweight"] = Layer(
    partial(interaction, FL), (lambda layer, x, masks: layer.reweight(x, masks),)
)
published = pytest.mark.parametrize("name", PUBLISHED)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def deterministic(name: str, backend: str) -> Callable[[Any, Any], list[Tensor]]:
    layer, call = PUBLISHED[name].new(backend).eval(), PUBLISHED[name].calls[-1]
    return lambda x, masks: tensors_of(call(layer, x, masks))


def total_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors if x.requires_grad]).sum()


@each_backend
@published
def test_inputs_of_lower_precision_are_cast(name: str, backend: str) -> None:
    call = deterministic(name, backend)
    for dtype in (torch.bfloat16, torch.float16):
        x = [each.requires_grad_() for each in FL.inputs(dtype)]
        found = call(x, None)
        expected = call([each.float() for each in x], None)
        assert {each.dtype for each in expected} == {torch.float32}
        assert all(map(torch.equal, found, expected))
        total_of(found).backward()
        assert all(each.grad.dtype == dtype for each in x)
    if name != "reweight":
        for wrong in (torch.float64, torch.float8_e4m3fn):
            with pytest.raises(TypeError, match=rf"inputs\[0\]: expected .*float32 .*{wrong}"):
                call([each.to(wrong) for each in FL.inputs()], None)


@each_backend
@published
def test_missing_masks_count_as_valid(name: str, backend: str) -> None:
    call, x, first = deterministic(name, backend), FL.inputs(), draw_masks("partial", 3, FL.lengths)
    assert all(map(torch.equal, call(x, first[:1]), call(x, [first[0], None])))
    assert not all(map(torch.equal, call(x, first[:1]), call(x, None)))
    assert all(map(torch.equal, call(x, []), call(x, [None, None])))


@each_backend
@published
def test_masked_values_reach_no_result(name: str, backend: str) -> None:
    call, masks = deterministic(name, backend), draw_masks("partial", 3, FL.lengths)
    found = []
    for value in (0.0, float("nan"), float("inf")):
        x = [
            torch.where(mask.unsqueeze(-1), each, value).requires_grad_()
            for each, mask in zip(FL.inputs(), masks, strict=True)
        ]
        outputs = call(x, masks)
        found.append([*outputs, *torch.autograd.grad(total_of(outputs), x)])
    assert all(each.isfinite().all() for each in found[0])
    assert any(bool((gradient != 0).any()) for gradient in found[0][-2:])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
