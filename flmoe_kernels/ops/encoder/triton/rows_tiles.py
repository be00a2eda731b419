"""Helpers of the encoder's row-wise Triton kernels: tiles, dropout, sums.

A counter of the generator gives the draws of eight columns, 32 apart and in pairs (flmoe_kernels.core.dropout). A
tile of rows is therefore stored as four parts: part w has the columns whose draws are in word w of the counters,
32 of every 128. Each part is read and written in pieces of 64 bytes (128 in float32), which are whole sectors. A
thread has the same columns of every part, so every counter is computed once and used completely.

Offsets within a tile are 32 bits wide, the start of a tile is 64 bits wide.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.philox import philox


@triton.jit
def begin(pointer, row, WIDTH: tl.constexpr):
    """The address of a row."""
    return pointer + tl.cast(row, tl.int64) * WIDTH


@triton.jit
def columns_of(first, WORD: tl.constexpr, PART: tl.constexpr):
    """The PART columns of part WORD of the 4 * PART from `first` on, a multiple of 128."""
    at = tl.arange(0, PART)
    return first + at // 32 * 128 + WORD * 32 + at % 32


@triton.jit
def inside_of(valid, column, WIDTH: tl.constexpr, PART: tl.constexpr):
    if WIDTH % (4 * PART) == 0:
        return valid[:, None]
    else:
        return valid[:, None] & (column < WIDTH)[None, :]


@triton.jit
def load_part(
    pointer, row, valid, first, WORD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr
):
    """Load part WORD of rows at `pointer` in float32; zeros if not `valid` and after the last column."""
    column = columns_of(first, WORD, PART)
    pointers = pointer + row[:, None] * WIDTH + column[None, :]
    inside = inside_of(valid, column, WIDTH, PART)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_part(
    pointer, row, valid, first, values, WORD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr
):
    column = columns_of(first, WORD, PART)
    pointers = pointer + row[:, None] * WIDTH + column[None, :]
    inside = inside_of(valid, column, WIDTH, PART)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_line(pointer, WORD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Load part WORD of one row, (1, PART) in float32."""
    column = columns_of(0, WORD, PART)
    return tl.load(pointer + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_line(pointer, first, values, WORD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    column = columns_of(first, WORD, PART)
    tl.store(pointer + column, values.to(pointer.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def words_of(seed, row, expert, stream, first, PART: tl.constexpr):
    """The four words of the counters of a tile, each (rows, PART / 2)."""
    counter = first // 8 + tl.arange(0, PART // 2)
    return philox(
        tl.load(seed),
        counter.to(tl.uint32)[None, :],
        row.to(tl.uint32)[:, None],
        tl.cast(expert, tl.uint32),
        tl.cast(stream, tl.uint32),
    )


@triton.jit
def drop(values, words, threshold, kept_scale, WORD: tl.constexpr):
    """Dropout of part WORD."""
    # A draw in the upper 16 bits is below the threshold if the word is below the shifted threshold.
    limit = tl.cast(threshold, tl.uint32) << 16
    draws = tl.interleave(words[WORD] << 16, words[WORD])
    return tl.where(draws < limit, values * kept_scale, 0.0)


@triton.jit
def across(parts):
    """Sum each row over its parts."""
    return tl.sum((parts[0] + parts[1]) + (parts[2] + parts[3]), 1)


@triton.jit
def zeros(ROWS: tl.constexpr, PART: tl.constexpr):
    """The four parts of a tile of zeros."""
    return [tl.zeros((ROWS, PART), tl.float32) for _ in (0, 1, 2, 3)]


@triton.jit
def normal_tail(x):
    """P(X > |x|) of a standard normal X, and exp(-x^2 / 2).

    Uses exp(-x^2 / 2) t q(t) with t = 1 / (1 + 0.35 |x|) and the polynomial q of degree 8 with the smallest
    relative error, 3e-8, for |x| < 13.2, the range of float32; fitted to the scaled erfc. The tail keeps digits
    that 1 + erf(x) would lose, and there are no branches between polynomials: compiled for sm_90 the kernel has 33
    instructions per element, but 46 with the library's erf, which would be slower than memory.
    """
    size = tl.abs(x)
    root = tl.rsqrt(1.0 + 0.35 * size)
    t = root * root
    q = t * -0.0291088858 + 0.143788001
    q = t * q - 0.255326813
    q = t * q + 0.158721488
    q = t * q - 0.0227903889
    q = t * q + 0.105369045
    q = t * q + 0.119869126
    q = t * q + 0.139856699
    q = t * q + 0.139621712
    bell = tl.exp2(x * x * -0.7213475204444817)
    return bell * (t * q), bell


@triton.jit
def gelu(x):
    """x cdf(x)."""
    tail, _ = normal_tail(x)
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_slope(x):
    """The derivative: cdf(x) + x pdf(x)."""
    tail, bell = normal_tail(x)
    return tl.where(x < 0.0, tail, 1.0 - tail) + x * (bell * 0.3989422804014327)
