"""Triton kernels of expert_attention.

Nothing of size length x length is stored, and every sum stays within a program. Widths up to the table's limit are
one chunk of CHUNK columns, padded with zeros in the kernel; larger widths have one program per chunk, which
recomputes the probabilities. Exponentials have base 2. Code for missing arguments (None) is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.philox import kept_elements
from flmoe_kernels.core.triton.products import dot

from .tiles import (
    head_of,
    load_rows,
    place,
    products,
    replace_outside,
    row_at,
    statistics_of,
    store_rows,
    store_zeros,
    tile_columns,
    tile_count,
    tile_start,
    tile_whole,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def decode(program, slots, heads, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Return slot, first column of the chunk, head and group; blocks of a head are adjacent, to share L2."""
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    slot, rest = program % slots, program // slots
    column, rest = rest % CHUNKS * CHUNK, rest // CHUNKS
    return slot, column, rest % heads, rest // heads


@triton.jit
def zero_of(kept_scale, origin):
    """Replacement of dropped probabilities: NaN in rows of NaN, otherwise a zero that the compiler cannot detect:
    with a constant zero it would select after rounding to 16 bits, and then round and pack one value at a time."""
    return tl.where(origin == origin, kept_scale * 0.0, origin)


# Output and log-sum-exp. One program per block of rows of a problem and head, with a loop over blocks of its keys:
#     m' = max(m, max_j s_j),   p_j = exp(s_j - m'),   l' = l exp(m - m') + sum_j p_j,
#     o' = o exp(m - m') + sum_j kept_j p_j v_j,       out = o * scale of what is kept / l.
# Traffic: q and out once; k and v once per block of rows, from L2. Bound, by counting instructions, not measured:
# a score takes one exponential (16 per clock and SM) and 11 instructions without or 17 with dropout (compiled for
# sm_90 at width 64; an SM issues 128 per clock), and 4 d FLOP of the matrix units (4096 per clock). So at width 64
# the instructions are the bound, 1.3 and 2.1 times as long as the exponentials or the products.
@triton.jit(do_not_specialize=("problems", "rows"))
def attend_kernel(
    q,
    k,
    v,
    cu,
    seed,
    out,
    lse,
    problems,
    rows,
    heads,
    scale,
    threshold,
    kept_scale,
    POSITIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    BRANCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slots = rows // ROWS + problems + 2
    slot, column, head, group = decode(tl.program_id(0), slots, heads, WIDTH, CHUNK)
    problem, first, length, start, keys = place(cu, problems, rows, slot, ROWS)
    row = tl.arange(0, ROWS)
    valid = start + row < length
    at = statistics_of(group, rows, first + start, heads, head)
    if keys == 0:
        # Rows outside all problems.
        store_zeros(
            head_of(out, group, rows, head, first + start), row, valid, column, WIDTH, CHUNK
        )
        if column == 0:
            tl.store(lse + at + row * heads, tl.zeros((ROWS,), tl.float32), mask=valid)
        return
    q, k, v = (
        head_of(q, group, rows, head, first + start),
        head_of(k, group, rows, head, first),
        head_of(v, group, rows, head, first),
    )
    q_tile = load_rows(q, 0, row, valid, 0, WIDTH, CHUNK)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, CHUNK), tl.float32)
    # If the factor is positive, the maximum is computed before scaling, and the factor is part of a multiply-add.
    factor = scale * LOG2_E if POSITIVE else 1.0
    column_of = tile_columns(COLUMNS, SPREAD)
    whole = tile_whole(keys, COLUMNS, SPREAD)
    for tile in range(tile_count(keys, COLUMNS, SPREAD)):
        j = tile_start(tile, COLUMNS, SPREAD)
        # Keys after the last repeat it, so that loads need no mask. Their weight is 0, so an infinite value of the
        # last key gives NaN.
        key = tl.minimum(column_of, keys - 1 - j)
        k_tile = load_rows(k, j, key, None, 0, WIDTH, CHUNK)
        scores = products(
            *(q_tile, k_tile, q, 0, row, valid, k, j, key, None),
            *(WIDTH, CHUNK, PRECISION),
        )
        if not POSITIVE:
            scores *= scale * LOG2_E
        inside = j + column_of < keys
        scores = replace_outside(scores, inside, -float("inf"), tile >= whole, BRANCH)
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1) * factor)
        # A row with only -inf so far has no weight yet; if it stays so, its total is 0 and it becomes NaN. With
        # inf, the total is inf, or NaN if a score is NaN.
        origin = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
        p = tl.exp2(scores * factor - origin[:, None])
        fade = tl.exp2(before - origin)
        total = total * fade + tl.sum(p, 1)
        if seed is not None:
            problem_id = group * problems + problem
            kept = kept_elements(seed, threshold, problem_id, head, start + row, j, COLUMNS, SPREAD)
            # Rows of NaN are found below.
            p = tl.where(kept, p, zero_of(kept_scale, 0.0))
        v_tile = load_rows(v, j, key, None, column, WIDTH, CHUNK)
        sums = dot(p, v_tile, sums * fade[:, None], PRECISION)
    # Rows with a score of inf are NaN, also if dropout removed it.
    sums *= tl.where(total == float("inf"), float("nan"), kept_scale / total)[:, None]
    store_rows(
        head_of(out, group, rows, head, first + start), row, valid, column, sums, WIDTH, CHUNK
    )
    if column == 0:
        tl.store(lse + at + row * heads, (largest + tl.log2(total)) * LN_2, mask=valid)


# Gradient of q, and delta_i = grad_out_i . out_i for the next kernel. With g_ij = kept_ij * grad_out_i . v_j:
#     grad_q_i = scale * sum_j d_ij k_j,   d_ij = p_ij (g_ij - delta_i),   p_ij = exp(s_ij - lse_i).
# With dropout d is divided by the scale of what is kept, so that a score takes a selection, a product and a
# multiply-add: d_ij = [kept_ij p_ij] (grad_out_i . v_j) - p_ij delta_i.
# One program per block of rows. Traffic: q, grad_out, out and grad_q once; k and v once per block, from L2.
# Bound as above: three products, 9 instructions per score without and 15 with dropout.
@triton.jit(do_not_specialize=("problems", "rows"))
def query_gradient_kernel(
    q,
    k,
    v,
    cu,
    seed,
    out,
    lse,
    grad_out,
    delta,
    grad_q,
    problems,
    rows,
    heads,
    scale,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    BRANCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slots = rows // ROWS + problems + 2
    slot, column, head, group = decode(tl.program_id(0), slots, heads, WIDTH, CHUNK)
    problem, first, length, start, keys = place(cu, problems, rows, slot, ROWS)
    row = tl.arange(0, ROWS)
    valid = start + row < length
    if keys == 0:
        if grad_q is not None:
            to = head_of(grad_q, group, rows, head, first + start)
            store_zeros(to, row, valid, column, WIDTH, CHUNK)
        return
    q, k, v = (
        head_of(q, group, rows, head, first + start),
        head_of(k, group, rows, head, first),
        head_of(v, group, rows, head, first),
    )
    out = head_of(out, group, rows, head, first + start)
    grad_out = head_of(grad_out, group, rows, head, first + start)
    q_tile = load_rows(q, 0, row, valid, 0, WIDTH, CHUNK)
    grad_tile = load_rows(grad_out, 0, row, valid, 0, WIDTH, CHUNK)
    out_tile = load_rows(out, 0, row, valid, 0, WIDTH, CHUNK)
    # The selections keep products from being fused with sums of other lanes, which round differently.
    left = grad_tile.to(tl.float32)
    together = tl.sum(tl.where(valid[:, None], left * out_tile.to(tl.float32), 0.0), 1)
    for other in range(CHUNK, WIDTH, CHUNK):
        left = load_rows(grad_out, 0, row, valid, other, WIDTH, CHUNK).to(tl.float32)
        right = load_rows(out, 0, row, valid, other, WIDTH, CHUNK).to(tl.float32)
        together += tl.sum(tl.where(valid[:, None], left * right, 0.0), 1)
    # delta and sums are without the scale of what is kept.
    together *= tl.cast(threshold, tl.float32) / 65536
    at = statistics_of(group, rows, first + start, heads, head)
    if column == 0:
        tl.store(delta + at + row * heads, together, mask=valid)
    if grad_q is not None:
        origin = tl.load(lse + at + row * heads, mask=valid, other=0.0)
        # All probabilities of a row with a score of inf are NaN.
        origin = origin * LOG2_E + origin * 0.0
        sums = tl.zeros((ROWS, CHUNK), tl.float32)
        column_of = tile_columns(COLUMNS, SPREAD)
        whole = tile_whole(keys, COLUMNS, SPREAD)
        for tile in range(tile_count(keys, COLUMNS, SPREAD)):
            j = tile_start(tile, COLUMNS, SPREAD)
            key = tl.minimum(column_of, keys - 1 - j)
            k_tile = load_rows(k, j, key, None, 0, WIDTH, CHUNK)
            scores = products(
                *(q_tile, k_tile, q, 0, row, valid, k, j, key, None),
                *(WIDTH, CHUNK, PRECISION),
            )
            p = tl.exp2(scores * (scale * LOG2_E) - origin[:, None])
            p = replace_outside(p, j + column_of < keys, 0.0, tile >= whole, BRANCH)
            v_tile = load_rows(v, j, key, None, 0, WIDTH, CHUNK)
            cotangent = products(
                *(grad_tile, v_tile, grad_out, 0, row, valid, v, j, key, None),
                *(WIDTH, CHUNK, PRECISION),
            )
            if seed is None:
                d = p * (cotangent - together[:, None])
            else:
                problem_id = group * problems + problem
                kept = kept_elements(
                    seed, threshold, problem_id, head, start + row, j, COLUMNS, SPREAD
                )
                d = tl.where(kept, p, 0.0) * cotangent - p * together[:, None]
            if WIDTH > CHUNK:
                k_tile = load_rows(k, j, key, None, column, WIDTH, CHUNK)
            sums = dot(d, k_tile, sums, PRECISION)
        store_rows(
            head_of(grad_q, group, rows, head, first + start),
            row,
            valid,
            column,
            sums * (scale * kept_scale),
            WIDTH,
            CHUNK,
        )


# Gradients of k and v:  grad_v_j = sum_i kept_ij p_ij grad_out_i,  grad_k_j = scale * sum_i d_ij q_i.
# One program per block of keys, with a loop over blocks of the problem's rows; a tile is stored as [row, key], as
# in the other kernels, so that threads do not exchange draws, and transposed for the products. Traffic: k, v and
# their gradients once; q and grad_out once per block, from L2. Bound as above: four products, 12 and 18
# instructions per score.
@triton.jit(do_not_specialize=("problems", "rows"))
def key_gradient_kernel(
    q,
    k,
    v,
    cu,
    seed,
    lse,
    grad_out,
    delta,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = 128 // COLUMNS if SPREAD else 1
    slots = (rows // (PARTS * COLUMNS) + problems + 2) * PARTS
    slot, column, head, group = decode(tl.program_id(0), slots, heads, WIDTH, CHUNK)
    problem, first, length, start, queries = place(
        cu, problems, rows, slot // PARTS, PARTS * COLUMNS
    )
    start += tile_start(slot % PARTS, COLUMNS, SPREAD)
    queries = tl.where(start < length, queries, 0)
    key = tile_columns(COLUMNS, SPREAD)
    valid_key = start + key < length
    if queries == 0:
        if grad_k is not None:
            to = head_of(grad_k, group, rows, head, first + start)
            store_zeros(to, key, valid_key, column, WIDTH, CHUNK)
        if grad_v is not None:
            to = head_of(grad_v, group, rows, head, first + start)
            store_zeros(to, key, valid_key, column, WIDTH, CHUNK)
        return
    q, k, v = (
        head_of(q, group, rows, head, first),
        head_of(k, group, rows, head, first + start),
        head_of(v, group, rows, head, first + start),
    )
    grad_out = head_of(grad_out, group, rows, head, first)
    at = statistics_of(group, rows, first, heads, head)
    k_tile = load_rows(k, 0, key, valid_key, 0, WIDTH, CHUNK)
    v_tile = load_rows(v, 0, key, valid_key, 0, WIDTH, CHUNK)
    sums_k = tl.zeros((COLUMNS, CHUNK), tl.float32)
    sums_v = tl.zeros((COLUMNS, CHUNK), tl.float32)
    for i in range(0, queries, ROWS):
        # Rows after the last row repeat it with weight 0, so that no elements have to be selected. An infinite
        # gradient of the last row gives NaN.
        row = tl.minimum(tl.arange(0, ROWS), queries - 1 - i)
        q_tile = load_rows(q, i, row, None, 0, WIDTH, CHUNK)
        grad_tile = load_rows(grad_out, i, row, None, 0, WIDTH, CHUNK)
        statistics = row_at(at, i, heads) + row * heads
        origin = tl.load(lse + statistics)
        origin = origin * LOG2_E + origin * 0.0
        origin = tl.where(i + tl.arange(0, ROWS) < queries, origin, float("inf"))
        if grad_k is not None:
            together = tl.load(delta + statistics)
        scores = products(
            *(q_tile, k_tile, q, i, row, None, k, 0, key, valid_key),
            *(WIDTH, CHUNK, PRECISION),
        )
        if grad_k is not None:
            cotangent = products(
                *(grad_tile, v_tile, grad_out, i, row, None, v, 0, key, valid_key),
                *(WIDTH, CHUNK, PRECISION),
            )
        p = tl.exp2(scores * (scale * LOG2_E) - origin[:, None])
        if seed is None:
            dropped = p
            if grad_k is not None:
                d = p * (cotangent - together[:, None])
        else:
            problem_id = group * problems + problem
            kept = kept_elements(seed, threshold, problem_id, head, i + row, start, COLUMNS, SPREAD)
            dropped = tl.where(kept, p, zero_of(kept_scale, origin)[:, None])
            if grad_k is not None:
                d = dropped * cotangent - p * together[:, None]
        if WIDTH > CHUNK:
            q_tile = load_rows(q, i, row, None, column, WIDTH, CHUNK)
            grad_tile = load_rows(grad_out, i, row, None, column, WIDTH, CHUNK)
        if grad_v is not None:
            sums_v = dot(tl.trans(dropped), grad_tile, sums_v, PRECISION)
        if grad_k is not None:
            sums_k = dot(tl.trans(d), q_tile, sums_k, PRECISION)
    if grad_k is not None:
        grad_k = head_of(grad_k, group, rows, head, first + start)
        sums_k *= scale * kept_scale
        store_rows(grad_k, key, valid_key, column, sums_k, WIDTH, CHUNK)
    if grad_v is not None:
        grad_v = head_of(grad_v, group, rows, head, first + start)
        store_rows(grad_v, key, valid_key, column, sums_v * kept_scale, WIDTH, CHUNK)
