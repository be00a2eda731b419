"""Triton kernels for the rows of each view and for mean pooling.

As in rows_kernels.py, each element is read and written once, in vectors of 16 bytes if widths allow, and the
numbers at the kernels are counts and predictions for the same shape and GPU, not measured.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from .rows_kernels import place_of
from .rows_tiles import begin, drop, load_part, store_line, store_part, words_of, zeros
from .view_rows import valid_rows


@triton.jit
def bound_of(cu, segment, rows):
    """First row of a segment, clamped to the existing rows for any values of cu."""
    return tl.minimum(tl.maximum(tl.load(cu + segment), 0), rows)


# Means of residual + dropout(update), or of the residual, over the rows of a segment, out (E, V, S, WIDTH). One
# program per block of columns of a segment, view and expert; it sums blocks of rows element by element, and
# finally over the block, in an order that depends only on the segment's length. Traffic: both inputs once, 4 bytes
# per element in 16 bits. Bound: bytes, 0.20 GB and 61 us; for short segments, launch and latency.
@triton.jit(do_not_specialize=("rows", "segments"))
def pool_kernel(
    residual,
    update,
    cu,
    seed,
    out,
    rows,
    views,
    segments,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    ACROSS: tl.constexpr = (WIDTH + 4 * PART - 1) // (4 * PART)
    column, rest = tl.program_id(0) % ACROSS * (4 * PART), tl.program_id(0) // ACROSS
    segment, expert_view = rest % segments, rest // segments
    expert, view = expert_view // views, expert_view % views
    first = bound_of(cu, segment, rows)
    last = bound_of(cu, segment + 1, rows)
    row = tl.arange(0, ROWS)
    sums = zeros(ROWS, PART)
    for at in range(first, last, ROWS):
        valid = at + row < last
        start = tl.cast(expert_view, tl.int64) * rows + at
        if update is not None:
            base = begin(update, start, WIDTH)
            x = [load_part(base, row, valid, column, w, WIDTH, PART) for w in (0, 1, 2, 3)]
        base = begin(residual, start, WIDTH)
        sums = [sums[w] + load_part(base, row, valid, column, w, WIDTH, PART) for w in (0, 1, 2, 3)]
        if update is not None:
            if seed is not None:
                words = words_of(seed, view * rows + at + row, expert, 0, column, PART)
                x = [drop(x[w], words, threshold, kept_scale, w) for w in (0, 1, 2, 3)]
            sums = [sums[w] + x[w] for w in (0, 1, 2, 3)]
    share = 1.0 / tl.maximum(last - first, 1)
    line = begin(out, tl.cast(expert_view, tl.int64) * segments + segment, WIDTH)
    for w in tl.static_range(4):
        store_line(line, column, tl.sum(sums[w], 0) * share, w, WIDTH, PART)


@triton.jit
def segment_of(cu, row, rows, segments):
    """Return each row's segment, 1 / length of the segment, and whether the row is in a segment.

    Searches the last segment that does not begin after the row; with descending bounds, finds any segment or none.
    """
    found = tl.zeros_like(row)
    size = segments
    while size > 1:
        half = size // 2
        begins = tl.load(cu + found + half)
        found = tl.where(begins <= row, found + half, found)
        size -= half
    begins = tl.load(cu + found)
    ends = tl.load(cu + found + 1, mask=found < segments, other=0)
    covered = (begins <= row) & (row < ends)
    length = tl.minimum(ends, rows) - tl.maximum(begins, 0)
    return found, 1.0 / tl.maximum(length, 1), covered


# Gradients of the residual, the segment's gradient divided by its length, and of the update, its dropout; zeros in
# rows outside all segments. One program per block of rows and columns; it searches the segments of its rows.
# Traffic: two outputs once, 4 bytes per element in 16 bits; a segment's gradient from L2 for each of its rows.
# Bound: bytes, 0.20 GB and 61 us; 20 of 35 possible instructions per element.
@triton.jit(do_not_specialize=("rows", "segments"))
def pool_gradient_kernel(
    grad_out,
    cu,
    seed,
    grad_residual,
    grad_update,
    rows,
    views,
    segments,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    expert, first, column = place_of(tl.cdiv(views * rows, ROWS), WIDTH, PART, ROWS)
    row = tl.arange(0, ROWS)
    valid = first + row < views * rows
    view, of_view = (first + row) // rows, (first + row) % rows
    segment, share, covered = segment_of(cu, of_view, rows, segments)
    source = (tl.cast(expert, tl.int64) * views + view) * segments + segment
    covered = covered & valid
    grad = [load_part(grad_out, source, covered, column, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    grad = [each * share[:, None] for each in grad]
    start = tl.cast(expert, tl.int64) * (views * rows) + first
    if grad_residual is not None:
        base = begin(grad_residual, start, WIDTH)
        for w in tl.static_range(4):
            store_part(base, row, valid, column, grad[w], w, WIDTH, PART)
    if grad_update is not None:
        if seed is not None:
            words = words_of(seed, first + row, expert, 0, column, PART)
            grad = [drop(grad[w], words, threshold, kept_scale, w) for w in (0, 1, 2, 3)]
        base = begin(grad_update, start, WIDTH)
        for w in tl.static_range(4):
            store_part(base, row, valid, column, grad[w], w, WIDTH, PART)


# out (E, V, rows, WIDTH) of x (E, 2, rows, WIDTH), the original and the replaced rows: view v replaces modality
# v - 1. One program per block of rows and columns, for all views. Traffic: (2 + V) elements for V results; of the
# projections, of width 768, 0.51 GB and 151 us. Bound: bytes.
@triton.jit(do_not_specialize=("count", "rows"))
def views_kernel(
    x,
    modality,
    out,
    count,
    rows,
    VIEWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    end = valid_rows(count, rows)
    expert, first, column, at = view_place(rows, WIDTH, COLUMNS, ROWS)
    if count is not None and first >= end:
        return
    inside = inside_tile(first, end, column, WIDTH, COLUMNS, ROWS)
    replaced = modalities_of(modality, first, end, ROWS)
    start = 2 * tl.cast(expert, tl.int64) * rows + first
    original = tl.load(begin(x, start, WIDTH) + at, mask=inside)
    noise = tl.load(begin(x, start + rows, WIDTH) + at, mask=inside)
    start = VIEWS * tl.cast(expert, tl.int64) * rows + first
    for view in tl.static_range(VIEWS):
        values = tl.where(replaced[:, None] == view - 1, noise, original)
        tl.store(begin(out, start + view * rows, WIDTH) + at, values, mask=inside)


# Its gradient: the sum over the views that keep a row, in the order of the views, and that of the view that
# replaces it; zeros after the count. Traffic: (V + 2) elements. Bound: bytes.
@triton.jit(do_not_specialize=("count", "rows"))
def views_gradient_kernel(
    grad_out,
    modality,
    grad_x,
    count,
    rows,
    VIEWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    end = valid_rows(count, rows)
    expert, first, column, at = view_place(rows, WIDTH, COLUMNS, ROWS)
    inside = inside_tile(first, end, column, WIDTH, COLUMNS, ROWS)
    replaced = modalities_of(modality, first, end, ROWS)
    start = VIEWS * tl.cast(expert, tl.int64) * rows + first
    original = tl.zeros((ROWS, COLUMNS), tl.float32)
    noise = tl.zeros((ROWS, COLUMNS), tl.float32)
    for view in tl.static_range(VIEWS):
        base = begin(grad_out, start + view * rows, WIDTH)
        grad = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        here = replaced[:, None] == view - 1
        noise = tl.where(here, grad, noise)
        original += tl.where(here, 0.0, grad)
    start = 2 * tl.cast(expert, tl.int64) * rows + first
    kind = grad_x.dtype.element_ty
    inside = inside_tile(first, rows, column, WIDTH, COLUMNS, ROWS)
    tl.store(begin(grad_x, start, WIDTH) + at, original.to(kind), mask=inside)
    tl.store(begin(grad_x, start + rows, WIDTH) + at, noise.to(kind), mask=inside)


@triton.jit
def view_place(rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return expert and first row of a program, its columns, and the offsets of its tile's elements."""
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    block, blocks = tl.program_id(0) // ACROSS, tl.cdiv(rows, ROWS)
    at = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    return block // blocks, block % blocks * ROWS, column, at


@triton.jit
def inside_tile(first, end, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The elements of a tile before row `end`."""
    inside = (first + tl.arange(0, ROWS) < end)[:, None]
    if WIDTH % COLUMNS != 0:
        inside = inside & (column < WIDTH)[None, :]
    return inside


@triton.jit
def modalities_of(modality, first, end, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    return tl.load(modality + row, mask=row < end, other=-1)
