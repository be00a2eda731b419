"""routed_mlp forward and backward against a loop over experts and a product over all of them, interleaved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import gate_ratio
from bench.shapes import ROUTED_SMALL, RoutedShape
from flmoe_kernels.routed_mlp import gate, routed_mlp

FAST, LOOP, EINSUM = "fast", "index loop", "one-hot einsum"
FLOOR = 1.5
ROUNDS = 5


def one_hot_einsum(x: Tensor, index: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    """Every token through every expert, and a one-hot product that picks the chosen ones."""
    w_in, b_in, w_out, b_out = weights
    share = torch.einsum("nk,nke->ne", weight, F.one_hot(index, w_in.shape[0]).to(x.dtype))
    hidden = F.gelu(torch.einsum("nd,efd->enf", x, w_in) + b_in[:, None])
    return torch.einsum("enf,edf,ne->nd", hidden, w_out, share) + share @ b_out


def make_inputs(shape: RoutedShape) -> tuple[Tensor, Tensor, list[Tensor]]:
    """index (N, K), a gradient of out, and x, weight, w_in, b_in, w_out, b_out."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    tokens, width, hidden, experts = shape.tokens, shape.width, shape.hidden, shape.experts
    index, weight = gate(draw(tokens, experts), shape.choices)
    leaves = [draw(tokens, width), weight, draw(experts, hidden, width, scale=width**-0.5)]
    leaves += [draw(experts, hidden), draw(experts, width, hidden, scale=hidden**-0.5)]
    leaves += [draw(experts, width)]
    return index, draw(tokens, width), [x.detach().requires_grad_() for x in leaves]


def make_call(shape: RoutedShape, name: str) -> Callable[[], list[Tensor]]:
    index, grad, leaves = make_inputs(shape)

    def call() -> list[Tensor]:
        x, weight, *weights = leaves
        if name == EINSUM:
            out = one_hot_einsum(x, index, weight, *weights)
        else:
            backend = "cpu" if name == FAST else "reference"
            w_in, b_in, w_out, b_out = weights
            out = routed_mlp(x, index, weight, w_in, b_in, w_out, b_out, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return call


@pytest.mark.parametrize("peer_name", [LOOP, EINSUM])
@pytest.mark.parametrize("shape", ROUTED_SMALL, ids=lambda shape: shape.name)
def test_routed_small(benchmark: Any, shape: RoutedShape, peer_name: str) -> None:
    fast, peer = make_call(shape, FAST), make_call(shape, peer_name)
    for got, want in zip(fast(), peer(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    gate_ratio(
        benchmark,
        fast,
        peer,
        floor=FLOOR,
        rounds=ROUNDS if peer_name == LOOP else 3,
        what=f"routed_mlp forward and backward at {shape.name}",
        peer_name=peer_name,
        flop=shape.flop(),
    )
