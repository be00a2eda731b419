"""routed_mlp forward and backward against a loop over experts and a product over all of them, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import environment, seconds_of
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
    rounds = ROUNDS if peer_name == LOOP else 3
    peer_seconds: list[float] = []

    def time_peer() -> None:
        peer_seconds.append(seconds_of(peer))

    benchmark.pedantic(fast, setup=time_peer, rounds=rounds, iterations=1, warmup_rounds=1)
    fast_seconds = benchmark.stats.stats.data
    ratios = [p / f for p, f in zip(peer_seconds[-rounds:], fast_seconds, strict=True)]
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(
        environment(),
        peer=peer_name,
        ratio=ratio,
        ratio_spread=[min(ratios), max(ratios)],
        gflops=shape.flop() / statistics.median(fast_seconds) / 1e9,
    )
    assert ratio >= FLOOR, (
        f"routed_mlp forward and backward at {shape.name}: expected at least {FLOOR}x the {peer_name}, "
        f"measured {ratio:.2f}x ({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)"
    )
