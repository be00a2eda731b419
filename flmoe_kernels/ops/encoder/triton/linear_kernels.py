"""Triton kernels of expert_linear: products with bias, weight gradients.

Rows are read through an operand, a tuple (pointer, stride over rows) whose last dimension is contiguous; an
expert's rows follow those of the previous one. Weights, biases and results are contiguous. Offsets of experts and
of blocks are 64 bits wide; those within a block fit 32, because linear_launch copies rows with a larger stride.
Sums have a fixed order, without atomics.

An expert has `views` views of `rows` rows, of which the first `count` are computed, see view_rows.py.

    forward    product_kernel             out = x w^T + b
    backward   product_kernel             grad of x = grad_out w
               weight_gradient_kernel     grads of w = grad_out^T x and b = sum of grad_out, over shares of rows
               sum_kernel                 the same over all rows; not for one share

linear_launch.py explains why torch.bmm is not used, and what bounds the kernels.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.philox import kept_elements
from flmoe_kernels.core.triton.products import dot, slices

from .view_rows import valid_rows

# Blocks of rows that are multiplied with all blocks of columns before the next blocks of rows.
BAND = tl.constexpr(8)
# Number of columns of the ones that sum rows in a product: the minimum of all matrix units.
ONES = tl.constexpr(16)


@triton.jit
def rows_of(x, problem, rows, row):
    """Return the pointer to a row (a scalar) of a problem in an operand, and the stride over rows."""
    pointer, of_row = x
    return further(pointer, tl.full((), problem, tl.int64) * rows + row, of_row), of_row


@triton.jit
def further(pointers, count, stride):
    """Advance pointers by `count` strides, in 64 bits."""
    return pointers + tl.full((), count, tl.int64) * stride


@triton.jit
def row_of(x, expert, rows, row, WIDTH: tl.constexpr):
    """Pointer to a row of a contiguous (E, rows, WIDTH) tensor."""
    return further(x, tl.full((), expert, tl.int64) * rows + row, WIDTH)


@triton.jit
def dropped(values, seed, threshold, kept_scale, stream, expert, row, first):
    """Dropout of a tile of rows from column `first` on, a multiple of its width; without a seed, the values."""
    if seed is not None:
        kept = kept_elements(seed, threshold, stream, expert, row, first, values.shape[1])
        values = tl.where(kept, values * kept_scale, 0.0)
    return values


# out (E, views * rows, OUTER) = a (E, views * rows, INNER) w, with w (E, INNER, OUTER) given by strides: the
# matrix in memory or its transpose; or residual + dropout(a w), or with TWICE u + dropout(u), u = dropout(a w).
# One program per tile; a view's tiles are ordered in bands of BAND blocks of rows, in which rows run fastest:
# programs that run at the same time read few rows and one expert's weights, repeatedly from L2. Two programs share
# an SM: one multiplies while the other waits or stores. Rows after the last row read the last row again and are
# not stored; with ZEROS, those after the count are stored as zeros. Traffic: a and out once, w from L2. Bound, in
# 16 bits on an H100: memory if INNER OUTER / (INNER + OUTER) is below about 300 FLOP per byte, otherwise the
# matrix units.
@triton.jit(do_not_specialize=("count", "rows"))
def product_kernel(
    a,
    w,
    bias,
    residual,
    seed,
    out,
    count,
    rows,
    views,
    depth,
    threshold,
    kept_scale,
    TWICE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    OF_INNER: tl.constexpr,
    OF_OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    ZEROS: tl.constexpr,
):
    ACROSS: tl.constexpr = (OUTER + COLUMNS - 1) // COLUMNS
    WHOLE: tl.constexpr = INNER % DEPTH == 0 and OUTER % COLUMNS == 0
    blocks = tl.cdiv(rows, ROWS)
    problem = tl.program_id(0) // (blocks * ACROSS)
    expert = problem // views
    inside = tl.program_id(0) % (blocks * ACROSS)
    band = inside // (BAND * ACROSS) * BAND
    height = tl.minimum(blocks - band, BAND)
    inside -= band * ACROSS
    first, across = (band + inside % height) * ROWS, inside // height

    end = valid_rows(count, rows)
    row, at = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = tl.arange(0, COLUMNS)
    present = across * COLUMNS + column < OUTER
    if count is not None and first >= end:
        if ZEROS:
            line = row_of(out, problem, rows, first, OUTER) + across * COLUMNS
            stored = (row < rows - first)[:, None] & present[None, :]
            nothing = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
            tl.store(line + row[:, None] * OUTER + column[None, :], nothing, mask=stored)
        return
    left, of_row = rows_of(a, problem, rows, first)
    left += tl.minimum(row, end - 1 - first)[:, None] * of_row + at[None, :]
    right = further(row_of(w, expert, INNER, 0, OUTER), across * COLUMNS, OF_OUTER)
    right += at[:, None] * OF_INNER + column[None, :] * OF_OUTER
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # depth, which is INNER, is not a constant, so that a loop with few rounds is not unrolled.
    for k in range(0, depth, DEPTH):
        if WHOLE:
            x, y = tl.load(left + k), tl.load(further(right, k, OF_INNER))
        else:
            here = k + at < INNER
            x = tl.load(left + k, mask=here[None, :], other=0.0)
            loaded = here[:, None] & present[None, :]
            y = tl.load(further(right, k, OF_INNER), mask=loaded, other=0.0)
        total = dot(x, y, total, PRECISION)

    valid = row < end - first
    stored = row < rows - first if ZEROS else valid
    to = row_of(out, problem, rows, first, OUTER) + row[:, None] * OUTER
    if seed is not None or TWICE:
        column = across * COLUMNS + tl.arange(0, COLUMNS)
        if bias is not None:
            own = tl.load(further(bias, expert, OUTER) + column, mask=column < OUTER, other=0.0)
            total += own.to(tl.float32)[None, :]
        place, begins = problem % views * rows + first + row, across * COLUMNS
        total = dropped(total, seed, threshold, kept_scale, 0, expert, place, begins)
        if TWICE:
            total += dropped(total, seed, threshold, kept_scale, 1, expert, place, begins)
    parts = slices(total, SLICES)
    for i in tl.static_range(SLICES):
        value = parts[i]
        column = (across * SLICES + i) * (COLUMNS // SLICES) + tl.arange(0, COLUMNS // SLICES)
        present = column < OUTER
        if bias is not None and seed is None and not TWICE:
            own = tl.load(further(bias, expert, OUTER) + column, mask=present, other=0.0)
            value += own.to(tl.float32)[None, :]
        if residual is not None:
            base = row_of(residual, problem, rows, first, OUTER) + row[:, None] * OUTER
            inside = valid[:, None] & present[None, :]
            value += tl.load(base + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if ZEROS:
            value = tl.where(valid[:, None], value, 0.0)
        value = value.to(out.dtype.element_ty)
        tl.store(to + column[None, :], value, mask=stored[:, None] & present[None, :])


# parts (E, splits, P, Q) = left^T right, or left^T norm(right), and bias_parts (E, splits, P) = sum
# of left, over each split of the chunks of DEPTH rows of left (E, views * rows, P) and right (E, views * rows, Q);
# for one split they are grad and bias. Either may be missing. A chunk has rows of one view, and zeros after the
# count. One program per tile of a split; the ACROSS x DOWN tiles of a split are adjacent, so that its rows come
# from memory once. The matrix units also sum the columns of left, as a product of the loaded tile with ones: 1/8
# of the work, while a separate pass would read grad_out again, at mmimdb up to two thirds of all bytes. All tiles
# do this, and those of the first column store it: the slowest tile would not be faster if others did less.
# Gain and shift of the norm are applied to the sums: shift times the sum of left. Traffic: left and right once,
# parts. Bound: as above, by P Q / (P + Q).
@triton.jit(do_not_specialize=("count", "rows", "splits"))
def weight_gradient_kernel(
    left,
    right,
    grad,
    bias,
    parts,
    bias_parts,
    mean,
    rstd,
    gain,
    shift,
    count,
    rows,
    views,
    splits,
    P: tl.constexpr,
    Q: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DOWN: tl.constexpr = (P + ROWS - 1) // ROWS
    # A bias is summed in float32 even if products may be TF32.
    EXACT: tl.constexpr = "tf32x3" if PRECISION == "tf32" else PRECISION
    share = tl.program_id(0) // (ACROSS * DOWN)
    across, down = tl.program_id(0) % ACROSS, tl.program_id(0) // ACROSS % DOWN
    expert, split = share // splits, share % splits
    end = valid_rows(count, rows)
    chunks = tl.cdiv(end, DEPTH)
    part = tl.cdiv(chunks * views, splits)
    first = split * part

    at = tl.arange(0, DEPTH)
    p, q = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    x_of, of_left = rows_of(left, expert, views * rows, 0)
    x_of += at[:, None] * of_left + p[None, :]
    y_of, of_right = rows_of(right, expert, views * rows, 0)
    y_of += at[:, None] * of_right + q[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.zeros((ROWS, ONES), tl.float32)
    ones = tl.full((DEPTH, ONES), 1.0, tl.float32).to(left[0].dtype.element_ty)
    for chunk in range(first, tl.minimum(first + part, chunks * views)):
        r = chunk * DEPTH
        start = r
        if count is not None:
            view = chunk // chunks
            r -= view * chunks * DEPTH
            start = view * rows + r
        inside = (r + at < end)[:, None]
        valid = inside if P % ROWS == 0 else inside & (p < P)[None, :]
        x = tl.load(further(x_of, start, of_left), mask=valid, other=0.0)
        if grad is not None:
            valid = inside if Q % COLUMNS == 0 else inside & (q < Q)[None, :]
            y = tl.load(further(y_of, start, of_right), mask=valid, other=0.0)
            if mean is not None:
                place = tl.full((), expert, tl.int64) * (views * rows) + start + at
                middle = tl.load(mean + place, mask=r + at < end, other=0.0)[:, None]
                spread = tl.load(rstd + place, mask=r + at < end, other=0.0)[:, None]
                y = ((y.to(tl.float32) - middle) * spread).to(x.dtype)
            total = dot(tl.trans(x), y, total, PRECISION)
        if bias is not None or mean is not None:
            sums = dot(tl.trans(x), ones, sums, EXACT)
    # All columns are the same.
    value = tl.max(sums, 1)
    if mean is not None:
        scale = tl.load(further(gain, expert, Q) + q, mask=q < Q, other=0.0).to(tl.float32)
        offset = tl.load(further(shift, expert, Q) + q, mask=q < Q, other=0.0).to(tl.float32)
        total = total * scale[None, :] + value[:, None] * offset[None, :]
    if grad is not None:
        inside = (p < P)[:, None] & (q < Q)[None, :]
        if splits == 1:
            store_tile(grad, share, down * ROWS, q, total, inside, P, Q)
        else:
            store_tile(parts, share, down * ROWS, q, total, inside, P, Q)
    if bias is not None:
        inside = (p < P) & (tl.zeros_like(p) + across == 0)
        if splits == 1:
            tl.store(further(bias, share, P) + p, value.to(bias.dtype.element_ty), mask=inside)
        else:
            tl.store(further(bias_parts, share, P) + p, value, mask=inside)


@triton.jit
def store_tile(x, share, first, column, values, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows from `first` on of a contiguous (shares, ROWS, WIDTH) tensor."""
    to = row_of(x, share, ROWS, first, WIDTH) + tl.arange(0, values.shape[0])[:, None] * WIDTH
    tl.store(to + column[None, :], values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(parts, out, block, splits, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a block of out (E, WIDTH), the sum of parts (E, splits, WIDTH) in order."""
    ACROSS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    at = block % ACROSS * BLOCK + tl.arange(0, BLOCK)
    expert = block // ACROSS
    line = row_of(parts, expert, splits, 0, WIDTH)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(line + at, mask=at < WIDTH, other=0.0)
        line += WIDTH
    value = total.to(out.dtype.element_ty)
    tl.store(further(out, expert, WIDTH) + at, value, mask=at < WIDTH)


# grad (E, GRAD) and bias (E, BIAS) from their parts (E, splits, ...), in the order of the splits. The last
# programs sum biases. Traffic (and bound): parts, from L2 if they are still there, and gradients.
@triton.jit(do_not_specialize=("splits",))
def sum_kernel(
    parts,
    bias_parts,
    grad,
    bias,
    splits,
    experts,
    GRAD: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACROSS: tl.constexpr = (GRAD + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    if block < experts * ACROSS:
        if grad is not None:
            add_parts(parts, grad, block, splits, GRAD, BLOCK)
    elif bias is not None:
        add_parts(bias_parts, bias, block - experts * ACROSS, splits, BIAS, BLOCK)
