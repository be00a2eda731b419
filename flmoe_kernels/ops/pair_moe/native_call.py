"""Arguments of the native module's pair_moe: checks, copies, addresses and strides."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address
from flmoe_kernels.core.operands import HOST, contiguous, expect, rows_contiguous

from .call import REDUCE_EXPERTS, REDUCE_NONE, PairCall

View = tuple[int, int, int, int]


def checked(call: PairCall, device: torch.device = HOST) -> PairCall:
    """Return the call in the form that the kernels read; ValueError if they must not read it."""
    batch, experts, rows, rank = call.q.shape
    columns, width = call.columns, call.width
    for name, x in (("q", call.q), ("a", call.a)):
        if x.shape[3] < 1:
            raise ValueError(f"{name}: expected a last dimension from 1, got {tuple(x.shape)}")
    expect("q", call.q, (batch, experts, rows, rank), call.q.dtype, device)
    expect("k", call.k, (batch, experts, columns, rank), call.q.dtype, device)
    expect("a", call.a, (batch, experts, rows, width), call.q.dtype, device)
    expect("c", call.c, (batch, experts, columns, width), call.q.dtype, device)
    bias, mask_a, mask_b = call.gate_bias, call.mask_a, call.mask_b
    expect("mask_a", mask_a, (batch, rows), torch.bool, device)
    expect("mask_b", mask_b, (batch, columns), torch.bool, device)
    if bias is not None:
        expect("gate_bias", bias, (experts,), bias.dtype, device)
        bias = bias.to(call.statistics).contiguous()
    return dataclasses.replace(
        call,
        q=rows_contiguous(call.q),
        k=rows_contiguous(call.k),
        a=rows_contiguous(call.a),
        c=rows_contiguous(call.c),
        gate_bias=bias,
        mask_a=contiguous(mask_a),
        mask_b=contiguous(mask_b),
    )


def checked_head(call: PairCall, head: Tensor) -> Tensor:
    expect("head", head, (call.batch, call.experts, call.width), call.q.dtype, call.q.device)
    return rows_contiguous(head)


def _view(x: Tensor) -> View:
    """Address and strides of sample, token, expert of x (B, E, L, width)."""
    sample, expert, row, _ = x.stride()
    return address(x), sample, row, expert


def grad_view(x: Tensor, reduce: str) -> View:
    if reduce == REDUCE_NONE:
        return _view(x)
    sample, other, _ = x.stride()
    row, expert = (other, 0) if reduce == REDUCE_EXPERTS else (0, other)
    return address(x), sample, row, expert


def head_view(x: Tensor) -> View:
    sample, expert, _ = x.stride()
    return address(x), sample, 0, expert


def arguments(call: PairCall) -> tuple:
    tensors = (
        *map(_view, (call.q, call.k, call.a, call.c)),
        *map(address, (call.gate_bias, call.mask_a, call.mask_b)),
    )
    sizes = (call.batch, call.experts, call.rows, call.columns, call.rank, call.width)
    options = (list(call.kinds), call.top_k, call.scale)
    return dtype_code(call.q), tensors, sizes, *options
