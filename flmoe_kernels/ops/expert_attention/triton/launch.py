"""Launches of expert_attention's kernels with given tiles, for `readable` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dropout import DRAWS, keep_scale, keep_threshold
from flmoe_kernels.core.triton.launches import Launch, matrix_precision
from flmoe_kernels.core.triton.tables import chunk_of

from .kernels import attend_kernel, key_gradient_kernel, query_gradient_kernel
from .short_kernels import gradient_kernel
from .table import AttentionCall, Tiles

# How a kernel reads or writes (G, rows, H, d): the tensor, its strides over rows and heads.
Operand = tuple[Tensor, int, int]

# Rows with a larger stride are copied, so that offsets within a block stay below 2^31.
_MAX_STRIDE = 2**24
# Mean length from which tiles have spread keys (see tiles.py), if there is dropout. They use all words of a
# dropout counter, but 17 to 64 keys after a multiple of 128 take one more tile of 64.
_SPREAD_ROWS = 256
# Below this, a scale times log2(e) may be 0 in float32; 0 times the -inf of a masked score is NaN.
_LEAST_FACTOR = 1e-37


def readable(call: AttentionCall) -> AttentionCall:
    """The call with copies of the inputs that kernels cannot read in place."""
    dropping = call.seed is not None and keep_threshold(call.dropout_p) < DRAWS
    return replace(
        call,
        q=rows_contiguous(call.q),
        k=rows_contiguous(call.k),
        v=rows_contiguous(call.v),
        cu_seqlens=call.cu_seqlens.contiguous(),
        seed=call.seed if dropping else None,
    )


def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy of it, with one stride for the rows of all groups, which does not depend on their number:
    kernels may be specialized on it."""
    groups, rows, _, width = x.shape
    regular = x.stride(3) == 1 or width == 1
    regular &= x.stride(0) == rows * x.stride(1) or groups == 1
    if regular and x.stride(1) <= _MAX_STRIDE:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def operand(x: Tensor) -> Operand:
    return x, x.stride(1), x.stride(2)


def _slots(call: AttentionCall, block: int) -> int:
    return call.q.shape[1] // block + call.problems + 2


def _launch(
    kernel: Any,
    tiles: Tiles,
    call: AttentionCall,
    slots: int,
    rest: dict[str, Any],
    sizes: dict[str, int],
) -> Launch:
    """Launch with one program per slot, chunk, head and group."""
    groups, rows, heads, width = call.q.shape
    chunk = chunk_of(width, tiles.widest)
    dropping = call.seed is not None
    arguments = {
        **{"q": operand(call.q), "k": operand(call.k), "v": operand(call.v)},
        **{"cu": call.cu_seqlens, "seed": call.seed, **rest},
        **{"problems": call.problems, "rows": rows, "heads": heads, "scale": call.scale},
        "threshold": keep_threshold(call.dropout_p) if dropping else DRAWS,
        "kept_scale": keep_scale(call.dropout_p) if dropping else 1.0,
    }
    constants = {
        **{"WIDTH": width, "CHUNK": chunk, **sizes},
        "PRECISION": matrix_precision(call.q.dtype, call.q.device),
    }
    programs = slots * -(-width // chunk) * heads * groups
    return Launch(kernel, programs, arguments, constants, tiles.warps, tiles.stages)


def _sizes(tiles: Tiles, call: AttentionCall) -> dict[str, int]:
    """Rows and columns of a tile of scores, and whether its columns are spread."""
    spread = call.seed is not None and 32 <= tiles.columns < 128
    spread &= call.q.shape[1] >= _SPREAD_ROWS * call.problems
    return {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "SPREAD": spread}


def attend_launch(tiles: Tiles, call: AttentionCall, out: Tensor, lse: Tensor) -> Launch:
    rest = {"out": operand(out), "lse": lse}
    sizes = {"BRANCH": tiles.branch, "POSITIVE": call.scale > _LEAST_FACTOR}
    return _launch(
        attend_kernel, tiles, call, _slots(call, tiles.rows), rest, _sizes(tiles, call) | sizes
    )


def query_gradient_launch(
    tiles: Tiles,
    call: AttentionCall,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_q: Tensor | None,
) -> Launch:
    """Launch of the gradient of q, if it is wanted, which also writes delta."""
    of_query = None if grad_q is None else operand(grad_q)
    rest = {"out": operand(out), "grad_q": of_query, "lse": lse}
    rest |= {"grad_out": operand(grad_out), "delta": delta}
    slots, sizes = _slots(call, tiles.rows), _sizes(tiles, call) | {"BRANCH": tiles.branch}
    return _launch(query_gradient_kernel, tiles, call, slots, rest, sizes)


def key_gradient_launch(
    tiles: Tiles,
    call: AttentionCall,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> Launch:
    of_key, of_value = (None if grad is None else operand(grad) for grad in (grad_k, grad_v))
    rest = {"grad_k": of_key, "grad_v": of_value, "lse": lse}
    rest |= {"grad_out": operand(grad_out), "delta": delta}
    sizes = _sizes(tiles, call)
    parts = 128 // tiles.columns if sizes["SPREAD"] else 1
    slots = parts * _slots(call, parts * tiles.columns)
    return _launch(key_gradient_kernel, tiles, call, slots, rest, sizes)


def gradient_launch(
    tiles: Tiles,
    call: AttentionCall,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor | None],
) -> Launch:
    """Launch of the wanted gradients of q, k and v, for short problems."""
    names = ("grad_q", "grad_k", "grad_v")
    rest: dict[str, Any] = {
        name: None if grad is None else operand(grad)
        for name, grad in zip(names, grads, strict=True)
    }
    rest |= {"out": operand(out), "lse": lse, "grad_out": operand(grad_out)}
    slots, sizes = _slots(call, tiles.rows), {"BLOCK": tiles.rows}
    return _launch(gradient_kernel, tiles, call, slots, rest, sizes)
