"""Helpers of expert_attention's Triton kernels: positions, rows, products.

An operand is a tuple (pointer, stride over rows, stride over heads); its last dimension is contiguous, and a
group's rows follow those of the previous one. `head_of` narrows it to (pointer, stride over rows) at a first row.
Offsets of heads and first rows are 64 bits wide; those within a block fit 32 because launch.readable copies larger
strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.products import dot

# Candidates that a step of `find_run` reads at a time: one step finds one of 64 runs, two one of 4096. Each warp
# reads them in two halves, so that the sum over a half needs no barrier.
_HALF = tl.constexpr(32)


@triton.jit
def boundary(cu, run, problems, rows):
    """The first row of a run: run 0 is what precedes the first problem, run p + 1 is problem p, and run
    problems + 1 what follows the last. Kept within 0..rows, whatever cu holds."""
    inner = (run > 0) & (run <= problems + 1)
    bound = tl.load(cu + run - 1, mask=inner, other=0)
    bound = tl.minimum(tl.maximum(bound, 0), rows)
    return tl.where(run > problems + 1, rows, bound)


@triton.jit
def starts_by(cu, problems, rows, slot, low, at, span, BLOCK: tl.constexpr):
    """1 for each of the runs low + at, at < span, whose first slot is not after `slot`."""
    start = boundary(cu, low + at, problems, rows) // BLOCK + low + at
    return ((at < span) & (start <= slot)).to(tl.int32)


@triton.jit
def find_run(cu, problems, rows, slot, BLOCK: tl.constexpr):
    """The last run r with boundary(r) // BLOCK + r <= slot, by a search that reads 2 * _HALF runs at a time."""
    low = tl.full((), 0, tl.int32)
    span = tl.full((), 2, tl.int32) + problems
    while span > 1:
        step = (span + 2 * _HALF - 1) // (2 * _HALF)
        at = tl.arange(0, _HALF) * step
        below = starts_by(cu, problems, rows, slot, low, at, span, BLOCK)
        below += starts_by(cu, problems, rows, slot, low, at + _HALF * step, span, BLOCK)
        below = tl.sum(below, 0)
        skipped = tl.maximum(below - 1, 0) * step
        low += skipped
        span = tl.minimum(step, span - skipped)
    return low


@triton.jit
def place(cu, problems, rows, slot, BLOCK: tl.constexpr):
    """The position of a program: (problem, its first row, its length, the block's first row within it, number
    of rows that it attends to).

    The grid must not depend on the values of cu. Run r owns the slots from boundary(r) // BLOCK + r on: at least
    as many as its blocks and at most one more, so rows // BLOCK + problems + 2 slots are enough for any
    runs. A slot without a block starts after the length; rows outside all problems attend to nothing.
    """
    run = find_run(cu, problems, rows, slot, BLOCK)
    first = boundary(cu, run, problems, rows)
    length = tl.maximum(boundary(cu, run + 1, problems, rows) - first, 0)
    start = (slot - first // BLOCK - run) * BLOCK
    # A slot before the first run occurs only if cu is not non-decreasing.
    start = tl.where(start < 0, length, start)
    covered = (run > 0) & (run <= problems) & (start < length)
    return run - 1, first, length, start, tl.where(covered, length, 0)


# A tile of keys is either COLUMNS adjacent ones or, with SPREAD, four runs of COLUMNS / 4 keys that are 32 apart:
# a quarter of a dropout counter's 128 columns, which then use all four of its words.
@triton.jit
def tile_columns(COLUMNS: tl.constexpr, SPREAD: tl.constexpr):
    """The columns of a tile, from its first."""
    at = tl.arange(0, COLUMNS)
    return at // (COLUMNS // 4) * 32 + at % (COLUMNS // 4) if SPREAD else at


@triton.jit
def tile_start(tile, COLUMNS: tl.constexpr, SPREAD: tl.constexpr):
    """The first column of a tile."""
    if SPREAD:
        PARTS: tl.constexpr = 128 // COLUMNS
        return tile // PARTS * 128 + tile % PARTS * (COLUMNS // 4)
    else:
        return tile * COLUMNS


@triton.jit
def tile_count(length, COLUMNS: tl.constexpr, SPREAD: tl.constexpr):
    """The number of tiles that have columns below a length."""
    if SPREAD:
        rest = tl.cdiv(tl.minimum(length % 128, 32), COLUMNS // 4)
        return length // 128 * (128 // COLUMNS) + rest
    else:
        return tl.cdiv(length, COLUMNS)


@triton.jit
def tile_whole(length, COLUMNS: tl.constexpr, SPREAD: tl.constexpr):
    """The number of the first tiles whose columns all are below a length."""
    if SPREAD:
        PARTS: tl.constexpr = 128 // COLUMNS
        return length // 128 * PARTS
    else:
        return length // COLUMNS


@triton.jit
def replace_outside(x, inside, value, ragged, BRANCH: tl.constexpr):
    """x in columns that are `inside`, `value` in the others, which only `ragged` tiles have."""
    if BRANCH:
        if ragged:
            x = tl.where(inside[None, :], x, value)
    else:
        x = tl.where(inside[None, :], x, value)
    return x


@triton.jit
def head_of(x, group, rows, head, first):
    pointer, of_row, of_head = x
    start = pointer + tl.cast(head, tl.int64) * of_head
    return row_at(start, tl.cast(group, tl.int64) * rows + first, of_row), of_row


@triton.jit
def row_at(pointer, first, of_row):
    return pointer + tl.cast(first, tl.int64) * of_row


@triton.jit
def statistics_of(group, rows, first, heads, head):
    """Where row `first` of a head stands in lse and delta, (G, rows, H); rows are `heads` apart."""
    return (tl.cast(group, tl.int64) * rows + first) * heads + head


@triton.jit
def load_rows(x, first, row, valid, column, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Columns `column` to column + CHUNK of the rows first + row of a head.

    Zeros where not `valid`; None: every row is.
    """
    pointer, of_row = x
    at = tl.arange(0, CHUNK)
    pointers = row_at(pointer, first, of_row) + column
    pointers = pointers + row[:, None] * of_row + at[None, :]
    if WIDTH % CHUNK == 0:
        if valid is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        present = (column + at < WIDTH)[None, :]
        if valid is not None:
            present = present & valid[:, None]
        return tl.load(pointers, mask=present, other=0.0)


@triton.jit
def store_rows(x, row, valid, column, values, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    pointer, of_row = x
    at = tl.arange(0, CHUNK)
    pointers = pointer + column + row[:, None] * of_row + at[None, :]
    present = valid[:, None]
    if WIDTH % CHUNK != 0:
        present = present & (column + at < WIDTH)[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=present)


@triton.jit
def store_zeros(x, row, valid, column, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    nothing = tl.zeros((row.shape[0], CHUNK), tl.float32)
    store_rows(x, row, valid, column, nothing, WIDTH, CHUNK)


@triton.jit
def products(
    x_tile,
    z_tile,
    x,
    x_first,
    x_row,
    x_valid,
    z,
    z_first,
    z_row,
    z_valid,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i . z_j for a tile of rows of x and z, in float32; the tiles are their first chunks."""
    total = tl.zeros((x_tile.shape[0], z_tile.shape[0]), tl.float32)
    total = dot(x_tile, tl.trans(z_tile), total, PRECISION)
    for column in range(CHUNK, WIDTH, CHUNK):
        left = load_rows(x, x_first, x_row, x_valid, column, WIDTH, CHUNK)
        right = load_rows(z, z_first, z_row, z_valid, column, WIDTH, CHUNK)
        total = dot(left, tl.trans(right), total, PRECISION)
    return total
