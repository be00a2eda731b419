"""Models, data and comparisons for the rows of `tests.support.scripts`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import flmoe_kernels

WIDTH, CLASSES, LENGTHS = 32, 3, (9, 6)
# The published code computes positions in float32 in any dtype.
CLOSE = 1e-5
NAMES = ("language", "image")

Row = Callable[[Any], str]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    def add(function: Row) -> Row:
        ROWS[name] = function
        return function

    return add


class NotInThisCode(Exception):
    """Raised by a row that does not apply to this variant."""


def lengths_of(published: Any, modalities: int = 2) -> tuple[int, ...]:
    if published.compat == "i2moe":
        return (6,) * modalities
    return (*LENGTHS, 4)[:modalities]


def fusion_of(
    published: Any,
    sparse: bool = False,
    modalities: int = 2,
    classes: int = CLASSES,
    **settings: Any,
) -> nn.Module:
    """A fusion model with random parameters, in float64 and eval mode, without dropped tokens."""
    torch.manual_seed(0)
    gate = settings.pop("gate", "GShardGate" if sparse else "None")
    fusion = published.Transformer(
        num_modalities=modalities,
        num_patches=6,
        hidden_dim=WIDTH,
        output_dim=classes,
        num_layers=2,
        num_layers_pred=1,
        num_experts=4,
        num_routers=1,
        top_k=2,
        num_heads=4,
        dropout=0.5,
        mlp_sparse=sparse,
        gate=gate,
    )
    for part in fusion.modules():
        if hasattr(part, "capacity"):
            part.capacity = (9.0, 9.0)  # type: ignore[assignment]
        if hasattr(part, "random_routing"):
            part.random_routing = False  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return fusion.double().eval()


def layer_of(published: Any, sparse: bool = False, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(1)
    layer = published.InteractionMoE(
        num_modalities=2,
        fusion_model=fusion_of(published, sparse, classes=classes),
        fusion_sparse=sparse,
        hidden_dim=WIDTH,
        hidden_dim_rw=WIDTH,
        num_layer_rw=2,
        temperature_rw=1.5,
    )
    return layer.double().eval()


def data(published: Any, modalities: int = 2) -> tuple[list[Tensor], tuple[list[Tensor], ...]]:
    """Inputs, and the arguments after them: masks of numbers as the published encoders give them, or none."""
    generator = torch.Generator().manual_seed(2)
    lengths = lengths_of(published, modalities)
    inputs = [torch.randn((4, n, WIDTH), generator=generator).double() for n in lengths]
    if published.compat == "i2moe":
        return inputs, ()
    masks = [torch.ones(4, n) for n in lengths]
    masks[0][1, 4:] = masks[0][2, 1:] = 0
    return inputs, (masks,)


def swapped(model: nn.Module) -> Any:
    """A copy of the model, replaced."""
    report = flmoe_kernels.swap(copy.deepcopy(model))
    assert not report.left, str(report)
    return report.model


def error(actual: Any, expected: Any) -> float:
    """Largest difference of nested results with the same structure, relative to the largest value."""
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        return float((actual - expected).detach().abs().max()) / scale if expected.numel() else 0.0
    assert type(actual) is type(expected) or isinstance(expected, tuple | list), type(actual)
    assert len(actual) == len(expected), (len(actual), len(expected))
    return max(error(a, b) for a, b in zip(actual, expected, strict=True))


def close(actual: Any, expected: Any, limit: float = CLOSE) -> str:
    found = error(actual, expected)
    assert found <= limit, f"differ by {found:.1e}"
    return f"equal to {found:.0e}"


def same_noise() -> Any:
    """Replacements of modalities that do not depend on the generator: every draw of one shape is the same."""

    def draw(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(x.shape[1])
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    return mock.patch.object(torch, "randn_like", draw)
