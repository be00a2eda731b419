"""Triton kernels of an encoder layer's steps, which keep a block of rows on chip.

Rows are contiguous, (E, views * rows, WIDTH), and so are weights and results; widths are whole tiles, see
fused_launch.fits. Only the first `count` rows of every view are computed, see view_rows.py. One program per block
of ROWS whole rows of a view. Statistics and gradients of a norm are those of rows_kernels.py. A missing argument
(no dropout, no gradient, no count) is None, and its code is not compiled.

docs/design/gpu.md counts the bytes. Weights come from L2, once for each block of rows.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.philox import kept_elements
from flmoe_kernels.core.triton.products import dot, slices

from .linear_kernels import dropped, row_of
from .rows_kernels import norm_gradient_rows
from .rows_tiles import begin, normal_tail
from .view_rows import valid_rows


@triton.jit
def normalized(x, gain, shift, mean, rstd, expert, start, row, valid, eps, WIDTH: tl.constexpr):
    """The norm of a block of rows from row `start` on, in their dtype; stores its statistics."""
    column = tl.arange(0, WIDTH)
    at = begin(x, start, WIDTH) + row[:, None] * WIDTH + column[None, :]
    values = tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)
    middle = tl.sum(values, 1) / WIDTH
    values -= middle[:, None]
    spread = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)
    tl.store(mean + start + row, middle, mask=valid)
    tl.store(rstd + start + row, spread, mask=valid)
    scale = tl.load(begin(gain, expert, WIDTH) + column).to(tl.float32)
    offset = tl.load(begin(shift, expert, WIDTH) + column).to(tl.float32)
    values = values * spread[:, None] * scale[None, :] + offset[None, :]
    return values.to(x.dtype.element_ty)


@triton.jit
def load_tile(pointer, row, OF_ROW: tl.constexpr, column, OF_COLUMN: tl.constexpr):
    """Load a tile of a weight; an address with 32-bit offsets takes fewer registers than a tile of addresses."""
    return tl.load(pointer + (row[:, None] * OF_ROW + column[None, :] * OF_COLUMN))


# out (E, views * rows, OUTER) = norm(x) w^T with w (E, OUTER, WIDTH); also mean and 1 / sqrt(variance + eps) of
# each row. The rows are normalized once and multiplied with all of w, COLUMNS of out at a time. Traffic: x and out
# once. Bound: memory.
@triton.jit(do_not_specialize=("count", "rows"))
def norm_product_kernel(
    x,
    gain,
    shift,
    w,
    out,
    mean,
    rstd,
    count,
    rows,
    views,
    outer,
    eps,
    WIDTH: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    problem, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    expert, end = problem // views, valid_rows(count, rows)
    if count is not None and first >= end:
        return
    row, column, deep = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    valid = first + row < end
    start = tl.cast(problem, tl.int64) * rows + first
    normed = normalized(x, gain, shift, mean, rstd, expert, start, row, valid, eps, WIDTH)
    right = row_of(w, expert, OUTER, 0, WIDTH) + deep[:, None] + column[None, :] * WIDTH
    to = begin(out, start, OUTER) + row[:, None] * OUTER + column[None, :]
    # outer, which is OUTER, is not a constant, so that the loop is not unrolled.
    for at in range(0, outer, COLUMNS):
        value = dot(normed, tl.load(right + at * WIDTH), None)
        tl.store(to + at, value.to(out.dtype.element_ty), mask=valid[:, None])


# out = x + dropout(dropout(GELU(norm(x) w_in^T + b_in)) w_out^T + b_out), w_in (E, HIDDEN, WIDTH), w_out (E,
# WIDTH, HIDDEN); also the statistics of the norm and, for the backward, the hidden rows before the GELU. COLUMNS
# hidden columns at a time are computed, activated and multiplied on. Traffic: x, hidden and out once; at the end x
# again from L2. Bound (estimate for an H100 at mmimdb): memory and matrix units about equally.
@triton.jit(do_not_specialize=("count", "rows"))
def mlp_kernel(
    x,
    gain,
    shift,
    w_in,
    b_in,
    w_out,
    b_out,
    seed,
    out_seed,
    out,
    hidden,
    mean,
    rstd,
    count,
    rows,
    views,
    wide,
    eps,
    threshold,
    kept_scale,
    out_threshold,
    out_kept_scale,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    problem, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    expert, end = problem // views, valid_rows(count, rows)
    if count is not None and first >= end:
        return
    row, column, deep = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    valid = first + row < end
    start = tl.cast(problem, tl.int64) * rows + first
    place = problem % views * rows + first + row
    normed = normalized(x, gain, shift, mean, rstd, expert, start, row, valid, eps, WIDTH)
    up, down = row_of(w_in, expert, HIDDEN, 0, WIDTH), row_of(w_out, expert, WIDTH, 0, HIDDEN)
    bias = begin(b_in, expert, HIDDEN) + column
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(0, wide, COLUMNS):
        weight = load_tile(up + at * WIDTH, deep, 1, column, WIDTH)
        value = dot(normed, weight, None)
        value += tl.load(bias + at).to(tl.float32)[None, :]
        if hidden is not None:
            to = begin(hidden, start, HIDDEN) + at + (row[:, None] * HIDDEN + column[None, :])
            tl.store(to, value.to(hidden.dtype.element_ty), mask=valid[:, None])
        tail, _ = normal_tail(value)
        value *= tl.where(value < 0.0, tail, 1.0 - tail)
        if seed is not None:
            kept = kept_elements(seed, threshold, 0, expert, place, at, COLUMNS)
            value = tl.where(kept, value * kept_scale, 0.0)
        weight = load_tile(down + at, column, 1, deep, HIDDEN)
        total = dot(value.to(x.dtype.element_ty), weight, total)
    parts = slices(total, SLICES)
    PART: tl.constexpr = WIDTH // SLICES
    for i in tl.static_range(SLICES):
        column = i * PART + tl.arange(0, PART)
        value = parts[i] + tl.load(begin(b_out, expert, WIDTH) + column).to(tl.float32)[None, :]
        value = dropped(value, out_seed, out_threshold, out_kept_scale, 0, expert, place, i * PART)
        to = row[:, None] * WIDTH + column[None, :]
        own = tl.load(begin(x, start, WIDTH) + to, mask=valid[:, None], other=0.0)
        value = (value + own.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(begin(out, start, WIDTH) + to, value, mask=valid[:, None])


# Backward of mlp_kernel. Stores the gradients of residual and update, where x = residual + dropout(update). With
# grad_total and grad_out the gradients of out and of the last product,
#     grad_hidden = dropout(grad_out w_out) GELU'(hidden),   grad of norm(x) = grad_hidden w_in,
# then norm_gradient_rows. `normed` holds the gradient of norm(x); it uses the memory of one of the results, if
# there is one, because the registers have no room for it, and the same block reads it again from L2. Also stores
# grad_hidden, and the activations for the gradient of w_out. Without `normed` nothing after grad_hidden is
# computed. Traffic: grad_total, grad_out, x, hidden and the stored results once.
@triton.jit(do_not_specialize=("count", "rows"))
def mlp_gradient_kernel(
    grad_total,
    grad_out,
    x,
    mean,
    rstd,
    gain,
    hidden,
    w_in,
    w_out,
    hidden_seed,
    seed,
    activation,
    grad_hidden,
    normed,
    grad_residual,
    grad_update,
    parts,
    count,
    rows,
    views,
    wide,
    hidden_threshold,
    hidden_kept_scale,
    threshold,
    kept_scale,
    TWICE: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    PART: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    problem, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    expert, end = problem // views, valid_rows(count, rows)
    row, column, deep = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    start = tl.cast(problem, tl.int64) * rows + first
    valid = first + row < end
    place = problem % views * rows + first + row
    left = begin(grad_out, start, WIDTH) + row[:, None] * WIDTH + deep[None, :]
    grad = tl.load(left, mask=valid[:, None], other=0.0)
    up, down = row_of(w_in, expert, HIDDEN, 0, WIDTH), row_of(w_out, expert, WIDTH, 0, HIDDEN)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(0, tl.where(first < end, wide, 0), COLUMNS):
        weight = load_tile(down + at, deep, HIDDEN, column, 1)
        slope = dot(grad, weight, None)
        of_hidden = row[:, None] * HIDDEN + column[None, :]
        to = begin(hidden, start, HIDDEN) + at + of_hidden
        value = tl.load(to, mask=valid[:, None], other=0.0).to(tl.float32)
        tail, bell = normal_tail(value)
        below = tl.where(value < 0.0, tail, 1.0 - tail)
        slope *= below + value * (bell * 0.3989422804014327)
        value *= below
        if hidden_seed is not None:
            kept = kept_elements(hidden_seed, hidden_threshold, 0, expert, place, at, COLUMNS)
            slope = tl.where(kept, slope * hidden_kept_scale, 0.0)
            value = tl.where(kept, value * hidden_kept_scale, 0.0)
        if activation is not None:
            to = begin(activation, start, HIDDEN) + at + of_hidden
            tl.store(to, value.to(activation.dtype.element_ty), mask=valid[:, None])
        slope = slope.to(hidden.dtype.element_ty)
        if grad_hidden is not None:
            to = begin(grad_hidden, start, HIDDEN) + at + of_hidden
            tl.store(to, slope, mask=valid[:, None])
        if normed is not None:
            weight = load_tile(up + at * WIDTH, column, WIDTH, deep, 1)
            total = dot(slope, weight, total)
    if normed is not None:
        store_rows(normed, start, row, valid, total, WIDTH, SLICES)
        tl.debug_barrier()
        norm_gradient_rows(
            *(grad_total, normed, x, mean, rstd, gain, seed, grad_residual, grad_update, parts),
            *(count is not None, problem, first, tl.minimum(first + ROWS, rows), end, rows, views),
            *(threshold, kept_scale, TWICE, WIDTH, PART, HEIGHT),
        )


# Backward of norm_product_kernel. The gradient of norm(x) is grad (E, views * rows, INNER) w with w (E, INNER,
# WIDTH); the rest is as in mlp_gradient_kernel. Traffic: grad, grad_total, x and the stored results once. Bound:
# memory.
@triton.jit(do_not_specialize=("count", "rows"))
def product_norm_gradient_kernel(
    grad,
    w,
    grad_total,
    x,
    mean,
    rstd,
    gain,
    seed,
    normed,
    grad_residual,
    grad_update,
    parts,
    count,
    rows,
    views,
    inner,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
    PART: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    problem, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    expert, end = problem // views, valid_rows(count, rows)
    row, column, deep = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    start = tl.cast(problem, tl.int64) * rows + first
    valid = first + row < end
    left = begin(grad, start, INNER) + row[:, None] * INNER + deep[None, :]
    right = row_of(w, expert, INNER, 0, WIDTH) + deep[:, None] * WIDTH + column[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(0, tl.where(first < end, inner, 0), DEPTH):
        value = tl.load(left + k, mask=valid[:, None], other=0.0)
        total = dot(value, tl.load(right + k * WIDTH), total)
    store_rows(normed, start, row, valid, total, WIDTH, SLICES)
    tl.debug_barrier()
    norm_gradient_rows(
        *(grad_total, normed, x, mean, rstd, gain, seed, grad_residual, grad_update, parts),
        *(count is not None, problem, first, tl.minimum(first + ROWS, rows), end, rows, views),
        *(threshold, kept_scale, False, WIDTH, PART, HEIGHT),
    )


@triton.jit
def store_rows(x, start, row, valid, values, WIDTH: tl.constexpr, SLICES: tl.constexpr):
    """Store a block of whole rows, from row `start` on, in slices of its columns."""
    parts = slices(values, SLICES)
    PART: tl.constexpr = WIDTH // SLICES
    for i in tl.static_range(SLICES):
        at = row[:, None] * WIDTH + (i * PART + tl.arange(0, PART))[None, :]
        value = parts[i].to(x.dtype.element_ty)
        tl.store(begin(x, start, WIDTH) + at, value, mask=valid[:, None])
