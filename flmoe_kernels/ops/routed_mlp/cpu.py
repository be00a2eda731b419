"""Routing and the routed MLP through the native CPU module."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.backend import native
from flmoe_kernels.core.native import address, dtype_code, empty, expect, statistics_dtype, threads


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
    expect("logits", logits, (tokens, experts), logits.dtype)
    logits = logits.contiguous()
    index = empty((tokens, top_k), logits, torch.int64)
    weight = empty((tokens, top_k), logits)
    native().gate_forward(
        dtype_code(logits),
        *map(address, (logits, index, weight)),
        (tokens, experts, top_k),
        over_all,
        threads(),
    )
    return index, weight


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    tokens, choices = index.shape
    expect("index", index, (tokens, choices), torch.int64)
    expect("mask", mask, (tokens,), torch.bool)
    index = index.contiguous()
    mask = None if mask is None else mask.contiguous()
    kept = empty(index.shape, index)
    inside = native().routed_limit(
        *map(address, (index, mask, kept)),
        (tokens, choices, experts),
        -1 if capacity is None else capacity,
    )
    if not inside:
        raise _out_of_range(index, experts)
    return kept


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expect("index", index, index.shape, torch.int64)
    index = index.contiguous()
    counts = empty((experts,), index, torch.int32)
    offsets = empty((experts + 1,), index, torch.int32)
    permutation = empty((index.numel(),), index, torch.int32)
    inside = native().routed_dispatch(
        *map(address, (index, counts, offsets, permutation)), index.numel(), experts
    )
    if not inside:
        raise _out_of_range(index, experts)
    return counts, offsets, permutation


def forward(
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    act: int,
) -> tuple[Tensor, Tensor]:
    """out (N, D), and the hidden layer before its activation, (N * K, F) by place in the permutation."""
    tensors = _contiguous(x, weight, w_in, b_in, w_out, b_out, offsets, permutation)
    sizes = _sizes(x, weight, w_in)
    tokens, choices, _, width, width_hidden = sizes
    out = empty(x.shape, x)
    hidden = empty((tokens * choices, width_hidden), x)
    rows = empty((tokens * choices, width), x, statistics_dtype(x.dtype))
    native().routed_forward(
        dtype_code(x),
        [address(t) for t in tensors],
        sizes,
        act,
        threads(),
        *map(address, (out, hidden, rows)),
    )
    return out, hidden


def backward(
    grad_out: Tensor,
    hidden: Tensor,
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    act: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out; those of a bias that is not there are empty."""
    tensors = _contiguous(x, weight, w_in, b_in, w_out, b_out, offsets, permutation)
    sizes = _sizes(x, weight, w_in)
    tokens, choices, experts, width, width_hidden = sizes
    expect("grad_out", grad_out, x.shape, x.dtype)
    expect("hidden", hidden, (tokens * choices, width_hidden), x.dtype)
    grad_out, hidden = grad_out.contiguous(), hidden.contiguous()
    wide = statistics_dtype(x.dtype)
    workspace = [
        empty((tokens * choices, size), x, wide) for size in (width_hidden, width_hidden, width)
    ]
    grads = [
        empty(x.shape, x),
        torch.zeros_like(weight, memory_format=torch.contiguous_format),
        empty(w_in.shape, x),
        empty((experts, width_hidden) if b_in is not None else (0,), x),
        empty(w_out.shape, x),
        empty((experts, width) if b_out is not None else (0,), x),
    ]
    native().routed_backward(
        dtype_code(x),
        [address(t) for t in tensors],
        sizes,
        act,
        threads(),
        *map(address, (grad_out, hidden)),
        [address(t) for t in workspace],
        [address(grad) if grad.numel() else 0 for grad in grads],
    )
    gx, gw, gwi, gbi, gwo, gbo = grads
    return gx, gw, gwi, gbi, gwo, gbo


def _out_of_range(index: Tensor, experts: int) -> ValueError:
    return ValueError(
        f"index: expected -1 or experts from 0 to {experts - 1}, "
        f"got values from {int(index.min())} to {int(index.max())}"
    )


def _sizes(x: Tensor, weight: Tensor, w_in: Tensor) -> tuple[int, int, int, int, int]:
    experts, hidden, width = w_in.shape
    return x.shape[0], weight.shape[1], experts, width, hidden


def _contiguous(
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
) -> list[Tensor | None]:
    """All of them as the kernels read them; ValueError for what they must not."""
    tokens, choices, experts, width, hidden = _sizes(x, weight, w_in)
    expect("x", x, (tokens, width), x.dtype)
    expect("weight", weight, (tokens, choices), x.dtype)
    expect("w_in", w_in, (experts, hidden, width), x.dtype)
    expect("b_in", b_in, (experts, hidden), x.dtype)
    expect("w_out", w_out, (experts, width, hidden), x.dtype)
    expect("b_out", b_out, (experts, width), x.dtype)
    expect("offsets", offsets, (experts + 1,), torch.int32)
    expect("permutation", permutation, (tokens * choices,), torch.int32)
    tensors = (x, weight, w_in, b_in, w_out, b_out, offsets, permutation)
    return [None if t is None else t.contiguous() for t in tensors]
