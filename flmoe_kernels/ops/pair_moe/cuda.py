"""pair_moe in the CUDA kernels of the native module, on the current stream.

Nothing here synchronizes with the GPU, and allocations depend only on shapes, so that calls can be captured in a
CUDA graph (after one call outside of a capture, which loads the kernels).

Every function raises BackendUnavailable with the reason if the native module was built without CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.native import address, cuda_queue, native_cuda
from flmoe_kernels.core.operands import contiguous, expect, rows_contiguous

from .call import REDUCE_POOL, REDUCTIONS, PairCall
from .native_call import arguments, checked, checked_head, grad_view, head_view

# Contributions that top_pairs holds at a time, over samples, experts, rows and columns.
_PAIRS = 2**22


def forward(call: PairCall, reduce: str) -> tuple[Tensor, Tensor]:
    native, call = native_cuda(), checked(call, call.q.device)
    y = call.q.new_empty(call.y_shape(reduce), dtype=call.y_dtype(reduce))
    mass = call.q.new_empty(call.q.shape[:3], dtype=call.statistics)
    if _empty(call):
        return y.zero_(), mass.zero_()
    memory = _workspace(call, reduce, 0)
    with cuda_queue(call.q.device) as queue:
        native.cuda_pair_forward(
            *arguments(call),
            REDUCTIONS.index(reduce),
            address(y),
            address(mass),
            (address(memory), memory.numel()),
            queue,
        )
    return y, mass


def backward(
    call: PairCall, reduce: str, grad_y: Tensor, grad_mass: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, a, c and of the gate's bias; those not requested are empty."""
    native, call, device = native_cuda(), checked(call, call.q.device), call.q.device
    expect("grad_y", grad_y, call.y_shape(reduce), call.y_dtype(reduce), device)
    expect("grad_mass", grad_mass, call.q.shape[:3], call.statistics, device)
    grad_y, grad_mass = rows_contiguous(grad_y), contiguous(grad_mass)
    inputs = zip((call.q, call.k, call.a, call.c), wants, strict=False)
    q, k, a, c = (x.new_empty(x.shape if want else (0,)) for x, want in inputs)
    bias = call.q.new_empty((call.experts if wants[4] else 0,), dtype=call.statistics)
    grads = (q, k, a, c, bias)
    if _empty(call):
        for grad in grads:
            grad.zero_()
        return grads
    memory = _workspace(call, reduce, 1)
    with cuda_queue(device) as queue:
        native.cuda_pair_backward(
            *arguments(call),
            REDUCTIONS.index(reduce),
            grad_view(grad_y, reduce),
            address(grad_mass),
            [address(grad) if want else 0 for grad, want in zip(grads, wants, strict=True)],
            (address(memory), memory.numel()),
            queue,
        )
    return grads


def pair_map(call: PairCall, head: Tensor) -> Tensor:
    call, head = checked(call, call.q.device), checked_head(call, head)
    if _empty(call):
        shape = (call.batch, call.experts, call.rows, call.columns)
        return call.q.new_zeros(shape, dtype=call.statistics)
    return _map_rows(call, head, _workspace(call, REDUCE_POOL, 2), 0, call.rows)


def top_pairs(call: PairCall, head: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Streams over rows: the largest so far and those of the next rows are sorted as integers in the order of the
    values, stably, so that earlier pairs come first among equals."""
    call, head = checked(call, call.q.device), checked_head(call, head)
    lines, integers = call.experts + 1, torch.int32
    if call.statistics == torch.float64:
        integers = torch.int64
    least = torch.iinfo(integers).min
    best = call.q.new_full((call.batch, lines, count), least, dtype=integers)
    places = call.q.new_full(best.shape, -1, dtype=torch.int64)
    if not _empty(call):
        step = max(1, _PAIRS // (call.batch * lines * call.columns))
        memory = _workspace(call, REDUCE_POOL, 2)
        for first in range(0, call.rows, step):
            last = min(first + step, call.rows)
            phi = _map_rows(call, head, memory, first, last)
            keys = _ordered(torch.cat([phi, phi.sum(dim=1, keepdim=True)], dim=1), integers)
            keys = keys.masked_fill(~_valid(call, first, last), least).flatten(2)
            here = torch.arange(first * call.columns, last * call.columns, device=keys.device)
            # Places that are missing come first, and only after all valid pairs in the order.
            both = torch.cat([best, keys], dim=2)
            best, order = both.sort(dim=2, descending=True, stable=True)
            best, order = best[:, :, :count], order[:, :, :count]
            places = torch.cat([places, here.expand(*keys.shape)], dim=2).gather(2, order)
    missing = best == least
    bits = torch.where(best < 0, best ^ torch.iinfo(integers).max, best)
    values = bits.view(call.statistics).masked_fill(missing, -torch.inf)
    columns = max(call.columns, 1)
    i, j = (x.masked_fill(missing, -1) for x in (places // columns, places % columns))
    return values, i, j


def _ordered(values: Tensor, integers: torch.dtype) -> Tensor:
    """Integers in the order of the values; NaN is above infinity, and both zeros are equal."""
    values = torch.where(values.isnan(), torch.nan, torch.where(values == 0, 0.0, values))
    bits = values.view(integers)
    bits = torch.where(bits < 0, bits ^ torch.iinfo(integers).max, bits)
    return torch.where(values.isnan(), torch.iinfo(integers).max, bits)


def _valid(call: PairCall, first: int, last: int) -> Tensor:
    """Mask of valid pairs of some rows, which broadcasts to (B, 1, rows, Lb)."""
    valid = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=call.q.device)
    if call.mask_a is not None:
        valid = valid & call.mask_a[:, None, first:last, None]
    if call.mask_b is not None:
        valid = valid & call.mask_b[:, None, None, :]
    return valid


def _map_rows(call: PairCall, head: Tensor, memory: Tensor, first: int, last: int) -> Tensor:
    """Contributions of some rows. The call for the first rows fills the workspace, which those after it read."""
    shape = (call.batch, call.experts, last - first, call.columns)
    phi = call.q.new_empty(shape, dtype=call.statistics)
    with cuda_queue(call.q.device) as queue:
        native_cuda().cuda_pair_map(
            *arguments(call),
            head_view(head),
            address(phi),
            (first, last),
            (address(memory), memory.numel()),
            queue,
        )
    return phi


def _workspace(call: PairCall, reduce: str, which: int) -> Tensor:
    """Memory of a forward, a backward or a map (0, 1, 2)."""
    dtype, _tensors, sizes, kinds, *_ = arguments(call)
    native = native_cuda()
    found = native.cuda_pair_workspace(dtype, sizes, kinds, REDUCTIONS.index(reduce))
    return call.q.new_empty((found[which],), dtype=torch.uint8)


def _empty(call: PairCall) -> bool:
    return 0 in (call.batch, call.rows, call.columns)
