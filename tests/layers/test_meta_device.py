"""Layers on the meta device and with fake tensors: shapes and dtypes without values, as of a call on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flmoe_kernels import (
    BackendUnavailable,
    FusionTransformer,
    InteractionMoE,
    PairInteractionMoE,
    ReferenceInteractionMoE,
    RoutedMLP,
)
from flmoe_kernels.core.backend import choose
from flmoe_kernels.layers.routed_mlp.gates import GATES

BATCH, LENGTHS, WIDTH = 3, (7, 5), 16


def interaction(cls: type[nn.Module] = InteractionMoE, **options: Any) -> nn.Module:
    fusion = FusionTransformer(2, hidden_dim=WIDTH, output_dim=4, num_heads=2, **options)
    sparse = bool(options.get("mlp_sparse"))
    return cls(2, fusion, sparse, hidden_dim=WIDTH, hidden_dim_rw=WIDTH)


def routed(gate: str) -> nn.Module:
    return RoutedMLP(
        4, d_model=WIDTH, d_hidden=32, top_k=1 if gate == "SwitchGate" else 2, gate=gate
    )


SPARSE = {"mlp_sparse": True, "num_experts": 4}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"RoutedMLP-{g}": (lambda g=g: routed(g)) for g in GATES},
    "PairInteractionMoE": lambda: PairInteractionMoE((WIDTH, WIDTH), num_classes=4),
    "PairInteractionMoE-tokens": lambda: PairInteractionMoE(
        (WIDTH, WIDTH), num_classes=4, token_outputs=True
    ),
    "InteractionMoE": interaction,
    "InteractionMoE-sparse": lambda: interaction(**SPARSE),
    "ReferenceInteractionMoE": lambda: interaction(ReferenceInteractionMoE),
    "FusionTransformer": lambda: FusionTransformer(2, WIDTH, 4, num_heads=2),
}


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def arguments(layer: nn.Module, masked: bool, device: str) -> tuple[Any, Any]:
    inputs = [torch.zeros(BATCH, n, WIDTH, device=device) for n in LENGTHS]
    masks = [torch.ones(BATCH, n, dtype=torch.bool, device=device) for n in LENGTHS]
    if isinstance(layer, RoutedMLP):
        return inputs[0], masks[0] if masked else None
    return inputs, [masks[0], None] if masked else None


def call(layer: nn.Module, masked: bool, device: str) -> list[Tensor]:
    """All tensors of the results, after a backward pass in training."""
    given, masks = arguments(layer, masked, device)
    results = list(tensors_of(layer(given, masks)))
    if layer.training:
        torch.stack([x.sum() for x in results if x.requires_grad]).sum().backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in layer.parameters())
        assert any(p.grad is not None for p in layer.parameters())
    if isinstance(layer, InteractionMoE):
        results += tensors_of(layer.inference(given, masks))
    return results


def described(results: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in results]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_and_dtypes_are_those_of_the_cpu(name: str, training: bool, masked: bool) -> None:
    layer = LAYERS[name]().train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = call(layer, masked, "cpu")
    assert all(isinstance(x, FakeTensor) for x in fake)
    layer.zero_grad()
    for part in layer.modules():
        if isinstance(part, RoutedMLP):
            part.gate_loss()  # a loss of the fake call would be added to the next
    # Nothing of the fake call stays: the same layer computes values afterwards.
    expected = call(layer, masked, "cpu")
    assert not any(isinstance(x, FakeTensor) for x in expected)
    meta = call(layer.to("meta"), masked, "meta")
    assert all(x.is_meta for x in meta)
    assert described(fake) == described(meta) == described(expected)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_of_the_cpu_does_not_matter_on_meta(name: str) -> None:
    layer = LAYERS[name]().to("meta")
    expected = described(call(layer, True, "meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert described(call(layer, True, "meta")) == expected


def test_every_backend_of_an_operator_accepts_meta_tensors() -> None:
    x = torch.empty(2, 3, device="meta")
    for backend in (None, "cpu", "triton", "reference"):
        assert choose("routed_mlp", x, backend) == (backend or "cpu")
    with pytest.raises(BackendUnavailable, match="no cuda kernels"):
        choose("routed_mlp", x, "cuda")
    with pytest.raises(BackendUnavailable, match="dtype float64 is not among"):
        choose("routed_mlp", x.double(), "triton")


def test_integer_masks_on_meta_are_not_read() -> None:
    layer = LAYERS["PairInteractionMoE"]().to("meta")
    inputs, _ = arguments(layer, False, "meta")
    masks = [torch.ones(x.shape[:2], dtype=torch.int64, device="meta") for x in inputs]
    assert layer(inputs, masks).logits.shape == (BATCH, 4)
