"""The contestants of the pair_moe benchmarks, and what a call of each does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.shapes import PairShape
from flmoe_kernels import pair_moe

FAST, REFERENCE, COMPILED = "fast", "reference", "compiled"
PASSES = ("forward", "forward+backward")
REDUCTIONS = ("none", "pool")
SGEMM_SIZE = 2048


def make_inputs(shape: PairShape) -> list[Tensor]:
    """q, k, a, c with gradients, as float32."""
    generator = torch.Generator().manual_seed(1)
    experts = len(shape.kinds)
    sizes = [(shape.rows, shape.rank), (shape.columns, shape.rank)]
    sizes += [(shape.rows, shape.width), (shape.columns, shape.width)]
    return [
        torch.randn(shape.batch, experts, *size, generator=generator).requires_grad_()
        for size in sizes
    ]


def contestant(name: str, shape: PairShape, reduce: str) -> Callable[..., Any]:
    backend = "cpu" if name == FAST else "reference"

    def call(q: Tensor, k: Tensor, a: Tensor, c: Tensor) -> Any:
        return pair_moe(q, k, a, c, kinds=shape.kinds, reduce=reduce, backend=backend)

    if name != COMPILED:
        return call
    torch._dynamo.config.recompile_limit = 64  # one graph per shape of a scan over sizes
    return torch.compile(call, dynamic=False)


def make_call(shape: PairShape, name: str, kind: str, reduce: str) -> Callable[[], None]:
    """One forward, or one forward and backward from a random gradient of y; inputs are made here."""
    inputs, function = make_inputs(shape), contestant(name, shape, reduce)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    if kind == "forward":
        return forward
    length = (shape.rows,) if reduce == "none" else ()
    grad = torch.randn(shape.batch, len(shape.kinds), *length, shape.width)

    def both() -> None:
        for x in inputs:
            x.grad = None
        function(*inputs).y.backward(grad)

    return both


def sgemm() -> Callable[[], None]:
    """torch's own product of two large square float32 matrices: what this machine is good for."""
    a, b = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(2))
    out = torch.empty(SGEMM_SIZE, SGEMM_SIZE)

    def call() -> None:
        torch.mm(a, b, out=out)

    return call


SGEMM_FLOP = 2 * SGEMM_SIZE**3
