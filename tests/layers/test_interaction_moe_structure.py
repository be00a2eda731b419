"""Tests of `describe`: layers that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support import lineage_sparse
from tests.support.lineage import LateFusion, Linear, fl, make_layer, make_sparse_layer


def expert(layer: nn.Module, e: int = 1) -> Any:
    return layer.interaction_experts[e].fusion_model


def first(layer: nn.Module) -> Any:
    return expert(layer).network[0]


def mlp_of(layer: nn.Module) -> Any:
    return first(layer).mlp


def with_head(layer: nn.Module, head: nn.Module) -> None:
    expert(layer).network[2] = head


def smaller_expert(layer: Any) -> None:
    layer.interaction_experts[1].fusion_model = fl.Transformer(2, 5, 8, 3)


def set_rate(layer: nn.Module, rate: float) -> None:
    first(layer).mlp.drop.p = rate


class Adapted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


BREAKS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda x: x.interaction_experts.pop(0), "expected 4 experts.*got 3"),
    (
        lambda x: setattr(x.interaction_experts[1], "fusion_sparse", True),
        r"experts\.1\.fusion_sparse",
    ),
    (
        lambda x: setattr(x.interaction_experts[1], "fusion_model", LateFusion(2, 16, 3)),
        r"experts\.1\.fusion_model.*LateFusion",
    ),
    (
        lambda x: with_head(x, Linear(16, 3)),
        r"network\.2\.fc\.weight: expected shape \(3, 32\), got \(3, 16\)",
    ),
    (lambda x: with_head(x, Linear(32, 4)), r"experts\.1: num_classes is 4, 3"),
    (smaller_expert, r"experts\.1: hidden_dim is 8, 16"),
    (lambda x: set_rate(x, 0.4), r"experts\.1: dropout"),
    (lambda x: setattr(first(x), "self_attn", False), "cross-attention"),
    (lambda x: setattr(first(x), "norm2", nn.RMSNorm(16)), "norm2.*RMSNorm"),
    (lambda x: setattr(first(x), "norm1", nn.LayerNorm(16, bias=False)), "norm1.*affine"),
    (lambda x: setattr(first(x).norm2, "eps", 1e-3), "norm2: eps is 0.001"),
    (lambda x: heads(first(x), 4), r"layers differ in num_heads, \[2, 4\]"),
    (lambda x: setattr(first(x).attn, "scale", 1.0), "scale.*0.353553, got 1.0"),
    (lambda x: setattr(first(x).attn, "q", nn.Linear(16, 16)), "attn.q.*bias"),
    (
        lambda x: setattr(first(x).attn, "proj", nn.Linear(16, 16, bias=False)),
        "attn.proj: has no bias",
    ),
    (
        lambda x: setattr(first(x).attn, "proj", Adapted(16, 16)),
        "attn.proj: expected Linear, got .*Adapted",
    ),
    (lambda x: setattr(first(x), "dropout1", nn.Identity()), "dropout1.*Identity"),
    (lambda x: first(x).mlp.network.__setitem__(1, nn.ReLU()), "GELU, got ReLU"),
    (lambda x: first(x).mlp.network.__setitem__(1, nn.GELU(approximate="tanh")), "exact erf"),
    (
        lambda x: first(x).mlp.network.__setitem__(0, nn.Linear(16, 64)),
        r"network\.0\.weight: expected shape \(32, 16\), got \(64, 16\)",
    ),
    (lambda x: first(x).register_buffer("b", param(2).data), "b: an unexpected"),
    (lambda x: setattr(first(x), "forward", print), "forward: replaced"),
    (lambda x: setattr(x.reweight, "temperature", 0), "temperature.*positive"),
    (lambda x: x.reweight.mlp.network.__setitem__(1, nn.GELU()), "ReLU, got GELU"),
    (
        lambda x: setattr(expert(x), "pos_embed", param(1, 7, 16)),
        r"pos_embed.*2 \* tokens.*\(1, 7, 16\)",
    ),
    (lambda x: setattr(expert(x), "pos_embed", param(1, 8, 16)), "compat is i2"),
]


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def heads(part: Any, number: int) -> None:
    part.attn.num_heads, part.attn.scale = number, (16 // number) ** -0.5


class OtherMLP(lineage_sparse.FMoETransformerMLP):
    pass


def no_bias(layer: Any) -> None:
    mlp_of(layer).gate.gate.bias = None


def dense_first(layer: Any) -> None:
    zero, one = (expert(layer).network[i] for i in (0, 1))
    zero.mlp, one.mlp = one.mlp, zero.mlp


def roomier(layer: Any) -> None:
    for router in mlp_of(layer).all_gates.values():
        router.capacity = (1.0, 2.0)


SPARSE_BREAKS: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda x: setattr(mlp_of(x), "__class__", OtherMLP),
        "expected FMoETransformerMLP as the sparse MLP, got OtherMLP",
    ),
    (lambda x: setattr(mlp_of(x).experts, "activation", nn.ReLU()), "GELU.*got relu"),
    (no_bias, r"all_gates\.0\.gate: has no bias"),
    (dense_first, r"sparse MLPs in layers \[1, 2\], expected none or \[0, 2\]"),
    (
        roomier,
        r"experts\.1\S*network\.2\.mlp: capacity is \(1.2, 2.4\), \(1.0, 2.0\) in the first layer",
    ),
    (
        lambda x: setattr(mlp_of(x).all_gates["1"], "capacity", (1.0, 2.0)),
        r"all_gates\.1: settings differ",
    ),
]


REFUSED = [(make_layer, *row) for row in BREAKS]
REFUSED += [(partial(make_sparse_layer, num_routers=2), *row) for row in SPARSE_BREAKS]


@pytest.mark.parametrize(("make", "broken", "message"), REFUSED)
def test_refuses(
    make: Callable[[], nn.Module], broken: Callable[[nn.Module], Any], message: str
) -> None:
    layer = make()
    describe(layer)
    broken(layer)
    with pytest.raises(UnsupportedLayer, match=message):
        describe(layer)
