"""pair_moe through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated depends on shapes alone, so that CUDA graphs can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous, rows_contiguous
from flmoe_kernels.core.triton.launches import run
from flmoe_kernels.core.triton.plans import planned
from flmoe_kernels.ops.pair_moe.call import REDUCE_POOL, PairCall

from .choice import tiles_of
from .launch import (
    backward_launches,
    forward_launch,
    make_sides,
    map_launch,
    project_launches,
    readable,
    row_blocks,
)

__all__ = ["backward", "forward", "pair_map", "top_pairs"]

# Keys that top_pairs holds at a time, over samples, experts, rows and columns: 32 MiB.
_KEYS = 2**22
_MISSING = -(2**63)


def forward(call: PairCall, reduce: str) -> tuple[Tensor, Tensor]:
    if _empty(call):
        y = call.q.new_zeros(call.y_shape(reduce), dtype=call.y_dtype(reduce))
        return y, call.q.new_zeros(call.q.shape[:3], dtype=call.statistics)
    y, mass = _forward(*call.tensors, call.kinds, call.top_k, call.scale, reduce)
    return y.sum(dim=2) if reduce == REDUCE_POOL else y, mass


@planned(7)
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """y, for "pool" of each block of rows, and mass."""
    *inputs, reduce = args
    call = readable(PairCall(*inputs))
    tiles = tiles_of("accumulate", call, reduce=reduce)
    mass = call.q.new_empty(call.q.shape[:3], dtype=call.statistics)
    shape = call.y_shape(reduce)
    if reduce == REDUCE_POOL:
        shape = (call.batch, call.experts, row_blocks(tiles, call), call.width)
    y = call.q.new_empty(shape, dtype=call.y_dtype(reduce))
    run([forward_launch(tiles, call, reduce, y, mass)], call.q.device)
    return y, mass


def backward(
    call: PairCall, reduce: str, grad_y: Tensor, grad_mass: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, a, c and of the gate's bias; those not requested are empty."""
    if _empty(call):
        inputs = zip((call.q, call.k, call.a, call.c), wants, strict=False)
        q, k, a, c = (x.new_zeros(x.shape if want else (0,)) for x, want in inputs)
        experts = call.experts if wants[4] else 0
        return q, k, a, c, call.q.new_zeros((experts,), dtype=call.statistics)
    tensors = (*call.tensors, rows_contiguous(grad_y), contiguous(grad_mass))
    options = (call.kinds, call.top_k, call.scale, reduce, tuple(wants))
    q, k, a, c, bias = _backward(*tensors, *options)
    return q, k, a, c, bias.sum(dim=(0, 1))


@planned(9)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, a, c, and of the gate's bias for each sample and block of rows."""
    *inputs, grad_y, grad_mass = args[:9]
    *options, reduce, wants = args[9:]
    call = PairCall(*inputs, *options)
    shapes = [x.shape if want else (0,) for x, want in zip(inputs[:4], wants, strict=False)]
    q, k, a, c = (call.q.new_empty(shape) for shape in shapes)
    call = readable(call)
    sums, gates = tiles_of("accumulate", call), tiles_of("gradient", call)
    shape = (call.batch, row_blocks(gates, call), call.experts if wants[4] else 0)
    bias = call.q.new_empty(shape, dtype=call.statistics)
    sides = make_sides(call, reduce, call.q.dtype, of_mass=grad_mass is not None)
    grads = [g if want else None for g, want in zip((q, k, a, c, bias), wants, strict=True)]
    # The gradient of a does not use the sides.
    used = any(wants[i] for i in (0, 1, 3, 4))
    launches = project_launches(call, reduce, grad_y, grad_mass, sides) if used else []
    launches += backward_launches(sums, gates, call, reduce, grad_y, sides, grads[:4], grads[4])
    run(launches, call.q.device)
    return q, k, a, c, bias


def pair_map(call: PairCall, head: Tensor) -> Tensor:
    shape = (call.batch, call.experts, call.rows, call.columns)
    if _empty(call):
        return call.q.new_zeros(shape, dtype=call.statistics)
    call = readable(call)
    phi = call.q.new_empty(shape, dtype=call.statistics)
    sides = make_sides(call, REDUCE_POOL, call.statistics)
    launches = project_launches(call, REDUCE_POOL, head, None, sides)
    launches.append(map_launch(tiles_of("map", call), call, sides, phi, 0, call.rows))
    run(launches, call.q.device)
    return phi


def top_pairs(call: PairCall, head: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Streams over rows: the largest so far compete with those of the next rows, as keys that hold value
    and place in one integer, so that ties need no second pass."""
    if call.rows * call.columns > 2**32:
        raise ValueError(
            f"top_pairs: expected La * Lb up to 2^32 with backend 'triton', "
            f"got {call.rows} * {call.columns}"
        )
    lines = call.experts + 1
    best = call.q.new_full((call.batch, lines, count), _MISSING, dtype=torch.int64)
    if not _empty(call):
        call, device = readable(call), call.q.device
        sides = make_sides(call, REDUCE_POOL, call.statistics)
        run(project_launches(call, REDUCE_POOL, head, None, sides), device)
        tiles = tiles_of("map", call)
        step = max(1, _KEYS // (call.batch * lines * call.columns))
        for first in range(0, call.rows, step):
            end = min(first + step, call.rows)
            shape = (call.batch, lines, end - first, call.columns)
            keys = call.q.new_empty(shape, dtype=torch.int64)
            run([map_launch(tiles, call, sides, keys, first, end)], device)
            best = torch.cat([best, keys.flatten(2)], dim=2).topk(count, dim=2).values
    return _decode(best, max(call.columns, 1))


def _decode(keys: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, i and j of keys, see order_keys in kernels.py."""
    high = keys >> 32
    bits = torch.where(high < 0, high ^ 0x7FFFFFFF, high).to(torch.int32)
    place = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    missing = keys == _MISSING
    values = bits.view(torch.float32).masked_fill(missing, -torch.inf)
    i, j = (x.masked_fill(missing, -1) for x in (place // columns, place % columns))
    return values, i, j


def _empty(call: PairCall) -> bool:
    return 0 in (call.batch, call.rows, call.columns)
