"""Helpers of routed_mlp's Triton kernels: tile order, products, activations.

Rows are those of the permutation: expert e has offsets[e] to offsets[e + 1], and dropped rows, after offsets[E],
are group E. The place of a row is n * K + k. Offsets are clamped to the existing rows, and places out of range are
not valid, so that arbitrary tensors cannot cause accesses outside of buffers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.products import dot
from flmoe_kernels.ops.encoder.triton.rows_tiles import normal_tail

# Blocks of rows that are multiplied with all blocks of columns before the next blocks of rows.
BAND = tl.constexpr(8)
GELU, GELU_TANH, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def group_range(offsets, group, rows, EXPERTS: tl.constexpr):
    """First row and end of one or more groups; empty for groups after the dropped rows."""
    first = tl.load(offsets + group, mask=group <= EXPERTS, other=rows)
    end = tl.load(offsets + group + 1, mask=group < EXPERTS, other=rows)
    first = tl.minimum(tl.maximum(first, 0), rows)
    return first, tl.minimum(tl.maximum(end, first), rows)


@triton.jit
def block_ends(offsets, rows, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Number of blocks of ROWS rows up to the end of each of the first GROUPS groups."""
    group = tl.arange(0, triton.next_power_of_2(GROUPS))
    first, end = group_range(offsets, group, rows, EXPERTS)
    return tl.cumsum(tl.where(group < GROUPS, tl.cdiv(end - first, ROWS), 0), 0)


@triton.jit
def locate(tile, ends, ACROSS: tl.constexpr):
    """Group, block of its rows and block of columns of a tile.

    A group's tiles are ordered in bands of BAND blocks of rows; within a band, rows run fastest. Programs that run
    at the same time then read few blocks of weights and rows, repeatedly from L2.
    """
    index = tile // ACROSS
    group = tl.sum((ends <= index).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= index, ends, 0), 0)
    blocks = tl.min(tl.where(ends > index, ends, 0x7FFFFFFF), 0) - before
    inside = tile - before * ACROSS
    band = inside // (BAND * ACROSS) * BAND
    height = tl.minimum(blocks - band, BAND)
    inside -= band * ACROSS
    return group, band + inside % height, inside // height


@triton.jit
def load_places(permutation, row, end, rows):
    """Places of rows below `end`, and which of them are valid; 0 for the others."""
    valid = row < end
    place = tl.load(permutation + row, mask=valid, other=-1)
    valid = valid & (place >= 0) & (place < rows)
    return tl.where(valid, place, 0), valid


@triton.jit
def columns_of(block, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a block, and which are valid."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    return column, column < WIDTH


@triton.jit
def load_rows(
    x,
    row,
    end,
    block,
    permutation,
    rows,
    GATHER: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of columns of rows below `end`, or with GATHER of their tokens; zeros where not valid."""
    column, present = columns_of(block, WIDTH, COLUMNS)
    if GATHER > 0:
        place, valid = load_places(permutation, row, end, rows)
        source = place // GATHER
    else:
        source, valid = row, row < end
    at = source.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if WIDTH % COLUMNS == 0:
        return tl.load(x + at, mask=valid[:, None], other=0.0)
    return tl.load(x + at, mask=valid[:, None] & present[None, :], other=0.0)


@triton.jit
def multiply(
    a,
    source,
    w,
    second,
    expert,
    block,
    depth,
    start,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    OF_EXPERT: tl.constexpr,
    SECOND_OF_EXPERT: tl.constexpr,
    OF_INNER: tl.constexpr,
    OF_OUTER: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over k below `depth`, INNER or 0, of a[source, k] * w[expert, k, n] for a block of columns n.

    depth is not a constant, so that a loop with few rounds is not unrolled, which would take more registers.
    Rows of `a` have INNER elements. w is (E, INNER, OUTER) given by strides: the matrix in memory or its
    transpose. Rows that are not valid read row 0 of a, and their results are not stored: masks are
    only needed for incomplete chunks. With a `second` matrix, the result is a pair: each chunk of a is read once
    and multiplied with both. The sums are added to `start` if it is not None.
    """
    at = tl.arange(0, DEPTH)
    column, present = columns_of(block, OUTER, COLUMNS)
    if INNER * OUTER >= 2**31:
        at, column = at.to(tl.int64), column.to(tl.int64)
    left = a + source.to(tl.int64)[:, None] * INNER + at[None, :]
    inside = at[:, None] * OF_INNER + column[None, :] * OF_OUTER
    right = w + expert.to(tl.int64) * OF_EXPERT + inside
    stride = tl.full((), OF_INNER, tl.int64 if INNER * OUTER >= 2**31 else tl.int32)
    total = tl.zeros((source.shape[0], COLUMNS), tl.float32) if start is None else start
    if second is not None:
        right_second = second + expert.to(tl.int64) * SECOND_OF_EXPERT + inside
        total_second = tl.zeros((source.shape[0], COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        if INNER % DEPTH == 0 and OUTER % COLUMNS == 0:
            x = tl.load(left + k)
            y = tl.load(right + k * stride)
            if second is not None:
                z = tl.load(right_second + k * stride)
        else:
            here = k + at < INNER
            x = tl.load(left + k, mask=here[None, :], other=0.0)
            mask = here[:, None] & present[None, :]
            y = tl.load(right + k * stride, mask=mask, other=0.0)
            if second is not None:
                z = tl.load(right_second + k * stride, mask=mask, other=0.0)
        total = dot(x, y, total, PRECISION)
        if second is not None:
            total_second = dot(x, z, total_second, PRECISION)
    if second is not None:
        return total, total_second
    else:
        return total


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Value and derivative; the codes are the positions in ACTIVATIONS of reference.py."""
    if ACT == GELU:
        tail, bell = normal_tail(x)
        share = tl.where(x < 0.0, tail, 1.0 - tail)
        slope = share + x * (bell * 0.3989422804014327)
        value = x * share
    elif ACT == GELU_TANH:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = share + x * share * (1.0 - share) * inner
        value = x * share
    elif ACT == RELU:
        # NaN is not below 0 and passes.
        slope = tl.where(x <= 0.0, 0.0, 1.0)
        value = tl.where(x <= 0.0, 0.0, x)
    else:
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
        value = x * share
    return value, slope
