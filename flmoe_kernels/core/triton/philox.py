"""Dropout masks of a tile, by the generator of flmoe_kernels.core.dropout.

A counter gives the draws of eight columns, 32 apart and in pairs. The sixteen counters of a row and 128 columns
match the layout of a tile in the matrix units: a thread has columns 2 t, 2 t + 1 of every eight columns, which are
whole counters, so threads do not exchange draws.

Cost: a round is two 32 x 32 -> 64 bit multiplications and two three-way exclusive ors. In round 1 all operands
belong to a row or to a column's counter, and so do half of those of rounds 2 and 3; values that are broadcast are
computed once per row or counter. That leaves 9 products and 11 exclusive ors per counter: 2.5 instructions per
element of a tile of 128 columns, 5 for 64 adjacent columns, where only two of the four words are used, but 2.5 if
the columns are four runs that start 32 apart. Comparing a draw
(the upper half in place, the lower half after a shift) and selecting the value take 2.5 more.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)
_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def philox(seed, block, row, head, problem):
    """The four words of each counter; the counters' parts broadcast together."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = block, row, head, problem
    for _ in tl.static_range(_ROUNDS):
        product0, product1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        high0, low0 = (product0 >> 32).to(tl.uint32), product0.to(tl.uint32)
        high1, low1 = (product1 >> 32).to(tl.uint32), product1.to(tl.uint32)
        # Combine the narrower operands first, so that this is not computed for every element.
        c0, c1 = high1 ^ (c1 ^ key0), low1
        c2, c3 = high0 ^ (c3 ^ key1), low0
        key0, key1 = key0 + _W0, key1 + _W1
    return c0, c1, c2, c3


@triton.jit
def kept_elements(
    seed, threshold, problem, head, row, first, COLUMNS: tl.constexpr, SPREAD: tl.constexpr = False
):
    """The kept elements of a tile (rows, COLUMNS) from column `first`: adjacent columns, and `first` a multiple of
    COLUMNS, or with SPREAD four runs that start 32 columns apart, and `first` % 32 a multiple of their length."""
    tl.static_assert(COLUMNS == 128 or COLUMNS == 64 or COLUMNS == 32 or COLUMNS == 16)
    LANES: tl.constexpr = COLUMNS // 8 if SPREAD else (COLUMNS // 2 if COLUMNS < 32 else 16)
    WORDS: tl.constexpr = COLUMNS // (2 * LANES)
    block = first // 128 * 16 + first // 2 % 16 + tl.arange(0, LANES)
    word0, word1, word2, word3 = philox(
        tl.load(seed),
        block.to(tl.uint32)[None, :],
        row.to(tl.uint32)[:, None],
        tl.cast(head, tl.uint32),
        tl.cast(problem, tl.uint32),
    )
    # Column = 2 * LANES * word + 2 * lane + half. The words are in a thread's own registers, so they are selected
    # at compile time. `join` would be equivalent, but the compiler would then choose another layout for the
    # product of sm_80 that uses p.
    word = tl.arange(0, WORDS)[None, :, None, None]
    if WORDS == 4:
        upper, odd = word >= 2, word % 2 == 1
    elif COLUMNS == 64:
        upper, odd = first // 64 % 2 == 1, word == 1
    else:
        upper, odd = first // 64 % 2 == 1, first // 32 % 2 == 1
    words = tl.where(
        upper,
        tl.where(odd, _spread(word3), _spread(word2)),
        tl.where(odd, _spread(word1), _spread(word0)),
    )
    half = tl.arange(0, 2)[None, None, None, :]
    draws = tl.where(half == 0, words << 16, words)
    # A draw in the upper 16 bits is below the threshold if the word is below the shifted threshold.
    limit = tl.cast(threshold, tl.uint32) << 16
    return tl.reshape(draws, (row.shape[0], COLUMNS)) < limit


@triton.jit
def _spread(words):
    return words[:, None, :, None]
