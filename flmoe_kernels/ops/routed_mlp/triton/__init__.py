"""Routing and the routed MLP through Triton: what is allocated, and which launches fill it.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it. An index out of range is not looked for, which would wait: its row counts as dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch, expect, run

from . import launch as launches
from . import routing_launch as routing
from .call import RoutedCall, check_rows, checked
from .choice import tiles_of

__all__ = ["backward", "dispatch", "forward", "gate", "limit"]


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
    index = logits.new_empty((tokens, top_k), dtype=torch.int64)
    weight = logits.new_empty((tokens, top_k))
    run([routing.gate_launch(logits.contiguous(), index, weight, over_all)], logits.device)
    return index, weight


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    _check_rows(index)
    expect("mask", mask, index.shape[:1], torch.bool, index.device)
    index = index.contiguous()
    mask = None if mask is None else mask.contiguous()
    kept = torch.empty_like(index)
    before, found = None, []
    if capacity is not None:
        before, totals = _counters(index, experts)
        found += routing.count_launches(index, mask, before, totals)
    most = min(index.numel(), capacity or 0)
    found.append(routing.limit_launch(index, mask, before, kept, experts, most))
    run(found, index.device)
    return kept


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(index)
    index = index.contiguous()
    sizes = (experts, experts + 1, index.numel())
    if not index.numel():
        counts, offsets, permutation = (index.new_zeros((n,), dtype=torch.int32) for n in sizes)
        return counts, offsets, permutation
    counts, offsets, permutation = (index.new_empty((n,), dtype=torch.int32) for n in sizes)
    before, totals = _counters(index, experts)
    found = routing.count_launches(index, None, before, totals)
    found.append(routing.place_launch(index, before, totals, counts, offsets, permutation))
    run(found, index.device)
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
    """out (N, D), and the hidden layer before its activation, (N * K, F) by row of the permutation.

    Memory beside them: R F for the activated layer, and for K > 1 R D for rows, in x's type.
    """
    call = checked(x, weight, w_in, b_in, w_out, b_out, offsets, permutation, act)
    out = call.x.new_empty(call.x.shape)
    hidden, active = (call.x.new_empty((call.rows, call.hidden)) for _ in range(2))
    parts = _parts(call, out)
    products = [
        launches.hidden_launch(tiles_of("hidden", call), call, hidden, active),
        launches.rows_launch(tiles_of("rows", call), call, active, parts),
    ]
    run(products + _sums(parts, out), x.device)
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
    """Gradients of x, weight, w_in, b_in, w_out, b_out; those of a bias that is not there are empty.

    Memory beside them: 2 R F and, for K > 1, R D in x's type, and splits' partial sums, see launch.splits_of.
    """
    call = checked(x, weight, w_in, b_in, w_out, b_out, offsets, permutation, act)
    expect("grad_out", grad_out, x.shape, x.dtype, x.device)
    expect("hidden", hidden, (call.rows, call.hidden), x.dtype, x.device)
    grad_out, hidden = grad_out.contiguous(), hidden.contiguous()
    empty = call.x.new_empty
    grad_x, grad_weight = empty(call.x.shape), empty(call.weight.shape)
    grad_hidden, active = (empty((call.rows, call.hidden)) for _ in range(2))
    tiles = tiles_of("hidden_gradient", call)
    dots = empty((call.rows, launches.dot_parts(tiles, call)), dtype=torch.float32)
    parts = _parts(call, grad_x)
    found = [
        launches.hidden_gradient_launch(tiles, call, grad_out, hidden, grad_hidden, active, dots),
        launches.choice_gradient_launch(call, dots, grad_out, grad_weight),
        launches.token_gradient_launch(tiles_of("rows", call), call, grad_hidden, parts),
    ]
    run(found + _sums(parts, grad_x), x.device)
    by_row, by_token = (grad_hidden, False), (call.x, True)
    grad_w_in, grad_b_in = _weight_gradients(call, by_row, by_token, call.b_in, None)
    by_token, by_row = (grad_out, True), (active, False)
    grad_w_out, grad_b_out = _weight_gradients(call, by_token, by_row, call.b_out, call.weight)
    return grad_x, grad_weight, grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _weight_gradients(
    call: RoutedCall,
    left: tuple[Tensor, bool],
    right: tuple[Tensor, bool],
    bias: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(E, P, Q) and (E, P), empty without a bias; of left (., P) and right (., Q), by token or else by row."""
    experts, p, q = call.experts, left[0].shape[1], right[0].shape[1]
    grad = call.x.new_empty((experts, p, q))
    grad_bias = call.x.new_empty((0,) if bias is None else (experts, p))
    tiles = tiles_of("weight_gradient", call)
    splits = launches.splits_of(tiles, call)
    if splits == 1:
        whole, whole_bias = grad.unsqueeze(2), None if bias is None else grad_bias.unsqueeze(1)
        found = [
            launches.weight_gradient_launch(tiles, call, left, right, whole, whole_bias, weight)
        ]
    else:
        parts = call.x.new_empty((experts, p, splits, q), dtype=torch.float32)
        shape = (experts, splits, p)
        of_bias = None if bias is None else call.x.new_empty(shape, dtype=torch.float32)
        found = [launches.weight_gradient_launch(tiles, call, left, right, parts, of_bias, weight)]
        found.append(launches.sum_launch(parts.flatten(0, 1), grad.flatten(0, 1)))
        if of_bias is not None:
            found.append(launches.sum_launch(of_bias, grad_bias))
    run(found, call.x.device)
    return grad, grad_bias


def _parts(call: RoutedCall, out: Tensor) -> Tensor:
    """(N, K, D) to be added up over K, which is `out` itself where there is one choice."""
    shape = (call.tokens, call.choices, call.width)
    return out.view(shape) if call.choices == 1 else call.x.new_empty(shape)


def _sums(parts: Tensor, out: Tensor) -> list[Launch]:
    return [] if parts.shape[1] == 1 else [launches.sum_launch(parts, out)]


def _counters(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    blocks = routing.count_blocks(index)
    counts = index.new_empty((blocks, experts + 1), dtype=torch.int32)
    return counts, index.new_empty((experts + 1,), dtype=torch.int32)


def _check_rows(index: Tensor) -> None:
    expect("index", index, index.shape, torch.int64, index.device)
    check_rows("index", index.numel())
