"""Triton kernels of routing: choice of experts, order of rows.

Rows are n * K + k. Counting uses sums and cumulative sums of integers in a fixed order, without atomics: the
position of a row depends only on the rows before it. An index out of range counts as dropped, because checking
values would synchronize with the GPU; it is never used as an address. Dropped rows are group E.

Bound: launches. Even at N K = 131072 and E = 64, about 2 MiB are read and written, a few microseconds each.
"""

# Triton kernels have no type annotations, see pyproject.toml.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = tl.constexpr(-0x80000000)


@triton.jit
def order_keys(x):
    """Integers in the order of float32 values: NaN is largest and equal to itself, +0 equals -0."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


# The TOP_K experts of a block of tokens, best first, and their weights. One program per block, whose logits are in
# registers: TOP_K times the largest key is selected (ties: the lowest expert) and removed. Its rank is its
# position in the output, so that weights need no second search. Traffic: logits, index and weight once.
@triton.jit(do_not_specialize=("tokens",))
def gate_kernel(
    logits,
    index,
    weight,
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    OVER_ALL: tl.constexpr,
    TOKENS: tl.constexpr,
):
    LANES: tl.constexpr = triton.next_power_of_2(EXPERTS)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, LANES)[None, :]
    present = (n < tokens)[:, None] & (e < EXPERTS)
    n = n.to(tl.int64)[:, None]
    x = tl.load(logits + n * EXPERTS + e, mask=present, other=0.0).to(tl.float32)
    # The smallest integer is not the key of any value; it stands for missing and removed experts.
    key = tl.where(present, order_keys(x), _LEAST)
    rank = tl.full((TOKENS, LANES), TOP_K, tl.int32)
    for k in range(TOP_K):
        best = tl.max(key, 1)[:, None]
        lowest = tl.min(tl.where(key == best, e, LANES), 1)[:, None]
        rank = tl.where(e == lowest, k, rank)
        key = tl.where(e == lowest, _LEAST, key)
    top = tl.sum(tl.where(rank == 0, x, 0.0), 1)[:, None]
    share = tl.exp(x - top)
    chosen = present & (rank < TOP_K)
    counted = present if OVER_ALL else chosen
    share = share / tl.sum(tl.where(counted, share, 0.0), 1)[:, None]
    to = n * TOP_K + rank
    tl.store(index + to, tl.broadcast_to(e, (TOKENS, LANES)).to(tl.int64), mask=chosen)
    tl.store(weight + to, share.to(weight.dtype.element_ty), mask=chosen)


@triton.jit
def groups_of(
    index, mask, first, rows, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr
):
    """Expert of STEP rows from `first` on; EXPERTS where dropped, masked or out of range, -1 past the end."""
    row, whole = first + tl.arange(0, STEP), first + STEP <= rows
    # A load without a mask takes two values at a time.
    expert = tl.load(index + row) if whole else tl.load(index + row, mask=row < rows, other=-1)
    kept = (expert >= 0) & (expert < EXPERTS)
    if mask is not None:
        kept = kept & tl.load(mask + row // CHOICES, mask=row < rows, other=False)
    return tl.where(row < rows, tl.where(kept, expert, EXPERTS), -1).to(tl.int32)


@triton.jit
def one_hot(group, LANES: tl.constexpr):
    return (group[:, None] == tl.arange(0, LANES)[None, :]).to(tl.int32)


# counts[block, group] of a block of rows. One program per block, STEP rows at a time.
@triton.jit(do_not_specialize=("rows",))
def count_kernel(
    index,
    mask,
    counts,
    rows,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    LANES: tl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    lane = tl.arange(0, LANES)
    found = tl.zeros((LANES,), tl.int32)
    for step in range(0, BLOCK, STEP):
        first = tl.program_id(0) * BLOCK + step
        group = groups_of(index, mask, first, rows, EXPERTS, CHOICES, STEP)
        found += tl.sum(one_hot(group, LANES), 0)
    line = counts + tl.program_id(0).to(tl.int64) * (EXPERTS + 1)
    tl.store(line + lane, found, mask=lane <= EXPERTS)


# counts[block, group] become the number of rows of the group in the blocks before; totals are also stored. One
# program per WIDE groups processes the blocks in order.
@triton.jit(do_not_specialize=("blocks",))
def scan_kernel(
    counts,
    totals,
    blocks,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    lane = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    before = tl.zeros((WIDE,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block.to(tl.int64)[:, None] * (EXPERTS + 1) + lane[None, :]
        inside = (block < blocks)[:, None] & (lane <= EXPERTS)[None, :]
        own = tl.load(counts + at, mask=inside, other=0)
        tl.store(counts + at, tl.cumsum(own, 0) - own + before[None, :], mask=inside)
        before += tl.sum(own, 0)
    tl.store(totals + lane, before, mask=lane <= EXPERTS)


@triton.jit
def positions(group, before, LANES: tl.constexpr):
    """Position of each row in its group, after the first `before`; and the new number of rows in each group."""
    own = one_hot(group, LANES)
    place = tl.sum(own * (tl.cumsum(own, 0) - 1 + before[None, :]), 1)
    return place, before + tl.sum(own, 0)


# The stable permutation. One program per block of rows; the first one also writes counts and offsets.
@triton.jit(do_not_specialize=("rows",))
def place_kernel(
    index,
    before,
    totals,
    counts,
    offsets,
    permutation,
    rows,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    LANES: tl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    lane = tl.arange(0, LANES)
    total = tl.load(totals + lane, mask=lane <= EXPERTS, other=0)
    start = tl.cumsum(total, 0) - total
    if tl.program_id(0) == 0:
        tl.store(counts + lane, total, mask=lane < EXPERTS)
        tl.store(offsets + lane, start, mask=lane <= EXPERTS)
    line = before + tl.program_id(0).to(tl.int64) * (EXPERTS + 1)
    start += tl.load(line + lane, mask=lane <= EXPERTS, other=0)
    for step in range(0, BLOCK, STEP):
        first = tl.program_id(0) * BLOCK + step
        group = groups_of(index, None, first, rows, EXPERTS, 1, STEP)
        place, start = positions(group, start, LANES)
        row = first + tl.arange(0, STEP)
        tl.store(permutation + place, row, mask=row < rows)


# The rows that an expert keeps: the first `capacity`, or without counts all rows that are not masked.
@triton.jit(do_not_specialize=("rows", "capacity"))
def limit_kernel(
    index,
    mask,
    before,
    kept,
    rows,
    capacity,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    LANES: tl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    lane = tl.arange(0, LANES)
    count = tl.zeros((LANES,), tl.int32)
    if before is not None:
        line = before + tl.program_id(0).to(tl.int64) * (EXPERTS + 1)
        count += tl.load(line + lane, mask=lane <= EXPERTS, other=0)
    for step in range(0, BLOCK, STEP):
        first = tl.program_id(0) * BLOCK + step
        row = first + tl.arange(0, STEP)
        group = groups_of(index, mask, first, rows, EXPERTS, CHOICES, STEP)
        keep = group < EXPERTS
        if before is not None:
            place, count = positions(group, count, LANES)
            keep = keep & (place < capacity)
        tl.store(kept + row, tl.where(keep, group, -1).to(tl.int64), mask=row < rows)
