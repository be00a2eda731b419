"""Triton kernel of expert_attention's gradients for short problems: those of q, k and v in one launch."""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.philox import kept_elements
from flmoe_kernels.core.triton.products import dot

from .kernels import LOG2_E, decode, zero_of
from .tiles import head_of, load_rows, place, row_at, statistics_of, store_rows


@triton.jit
def load_queries(
    q,
    grad_out,
    out,
    lse,
    first,
    row,
    valid,
    heads,
    kept_rate,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of q and grad_out, their log-sum-exp (base 2, inf if not `valid`) and grad_out . out without scale.

    A row with a score of inf becomes NaN: all its probabilities are.
    """
    q_tile = load_rows(q, first, row, None, 0, WIDTH, CHUNK)
    grad_tile = load_rows(grad_out, first, row, None, 0, WIDTH, CHUNK)
    out_tile = load_rows(out, first, row, None, 0, WIDTH, CHUNK)
    # As in query_gradient_kernel, the selection keeps products from being fused with sums of other lanes.
    products = grad_tile.to(tl.float32) * out_tile.to(tl.float32)
    together = tl.sum(tl.where(valid[:, None], products, 0.0), 1) * kept_rate
    origin = tl.load(row_at(lse, first, heads) + row * heads)
    origin = origin * LOG2_E + origin * 0.0
    return q_tile, grad_tile, tl.where(valid, origin, float("inf")), together


@triton.jit
def score_gradients(
    queries,
    k_tile,
    v_tile,
    valid_key,
    seed,
    threshold,
    kept_scale,
    problem,
    head,
    row,
    column,
    scale,
    PRECISION: tl.constexpr,
):
    """Dropped probabilities of a tile and the gradient of its scores, both without scales; see kernels.py."""
    q_tile, grad_tile, origin, together = queries
    zeros = tl.zeros((q_tile.shape[0], k_tile.shape[0]), tl.float32)
    p = tl.exp2(
        dot(q_tile, tl.trans(k_tile), zeros, PRECISION) * (scale * LOG2_E) - origin[:, None]
    )
    p = tl.where(valid_key[None, :], p, 0.0)
    cotangent = dot(grad_tile, tl.trans(v_tile), zeros, PRECISION)
    if seed is None:
        return p, p * (cotangent - together[:, None])
    else:
        kept = kept_elements(seed, threshold, problem, head, row, column, k_tile.shape[0])
        dropped = tl.where(kept, p, zero_of(kept_scale, origin)[:, None])
        return dropped, dropped * cotangent - p * together[:, None]


# One program per block of BLOCK rows of a problem and head, which are its queries and its keys. It computes one
# tile for a problem of at most BLOCK rows, and for longer ones those of its keys and those of its queries.
# Traffic: every operand once per block. Bound: latency, and instructions around the tile.
@triton.jit(do_not_specialize=("problems", "rows"))
def gradient_kernel(
    q,
    k,
    v,
    cu,
    seed,
    out,
    lse,
    grad_out,
    grad_q,
    grad_k,
    grad_v,
    problems,
    rows,
    heads,
    scale,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slots = rows // BLOCK + problems + 2
    slot, _column, head, group = decode(tl.program_id(0), slots, heads, WIDTH, CHUNK)
    problem, first, length, start, covered = place(cu, problems, rows, slot, BLOCK)
    if start >= length:
        return
    at = tl.arange(0, BLOCK)
    sums_q = tl.zeros((BLOCK, CHUNK), tl.float32)
    sums_k = tl.zeros((BLOCK, CHUNK), tl.float32)
    sums_v = tl.zeros((BLOCK, CHUNK), tl.float32)
    q, k, v = (
        head_of(q, group, rows, head, first),
        head_of(k, group, rows, head, first),
        head_of(v, group, rows, head, first),
    )
    out = head_of(out, group, rows, head, first)
    grad_out = head_of(grad_out, group, rows, head, first)
    lse += statistics_of(group, rows, first, heads, head)
    # Rows after the last repeat it, with weight 0; an infinite value or gradient of the last row gives NaN.
    own = tl.minimum(at, length - 1 - start)
    valid = start + at < length
    present = start + at < tl.where(covered > 0, length, 0)
    k_tile = load_rows(k, start, at, present, 0, WIDTH, CHUNK)
    v_tile = load_rows(v, start, at, present, 0, WIDTH, CHUNK)
    kept_rate = tl.cast(threshold, tl.float32) / 65536
    for i in range(0, covered, BLOCK):
        row = tl.minimum(at, length - 1 - i)
        queries = load_queries(
            q, grad_out, out, lse, i, row, i + at < length, heads, kept_rate, WIDTH, CHUNK
        )
        dropped, d = score_gradients(
            *(queries, k_tile, v_tile, valid, seed, threshold, kept_scale),
            *(group * problems + problem, head, i + row, start, scale, PRECISION),
        )
        sums_v = dot(tl.trans(dropped), queries[1], sums_v, PRECISION)
        sums_k = dot(tl.trans(d), queries[0], sums_k, PRECISION)
        if grad_q is not None:
            if i == start:
                sums_q = dot(d, k_tile, sums_q, PRECISION)
            else:
                own_queries = load_queries(
                    q, grad_out, out, lse, start, own, valid, heads, kept_rate, WIDTH, CHUNK
                )
                other_k = load_rows(k, i, row, None, 0, WIDTH, CHUNK)
                other_v = load_rows(v, i, row, None, 0, WIDTH, CHUNK)
                _dropped, own_d = score_gradients(
                    *(own_queries, other_k, other_v, i + at < length, seed, threshold, kept_scale),
                    *(group * problems + problem, head, start + own, i, scale, PRECISION),
                )
                sums_q = dot(own_d, other_k, sums_q, PRECISION)
    # Rows outside all problems get zeros.
    if grad_q is not None:
        to = head_of(grad_q, group, rows, head, first + start)
        store_rows(to, at, valid, 0, sums_q * (scale * kept_scale), WIDTH, CHUNK)
    if grad_k is not None:
        to = head_of(grad_k, group, rows, head, first + start)
        store_rows(to, at, valid, 0, sums_k * (scale * kept_scale), WIDTH, CHUNK)
    if grad_v is not None:
        to = head_of(grad_v, group, rows, head, first + start)
        store_rows(to, at, valid, 0, sums_v * kept_scale, WIDTH, CHUNK)
