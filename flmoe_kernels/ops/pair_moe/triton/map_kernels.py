"""Triton kernel of the contributions of pairs, see kernels.py."""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import gate, pair_values, valid_tokens


# Contributions phi = p * (offset_i + offset_j + u_i . c_j) of the rows first .. rows, dense; or, as KEYS, 64-bit
# integers that order them with their sum over the experts: larger phi first, then lower (i, j). One program per
# tile and sample. Traffic: the output, once. Bound: writing the output.
@triton.jit(do_not_specialize=("first", "end", "rows", "columns"))
def map_kernel(
    q,
    k,
    u,
    c,
    offset_i,
    offset_j,
    bias,
    mask_a,
    mask_b,
    out,
    first,
    end,
    rows,
    columns,
    scale,
    PRODUCT: tl.constexpr,
    OFFSET_X: tl.constexpr,
    OFFSET_Z: tl.constexpr,
    TOP_K: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_R: tl.constexpr,
    DEPTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(PRODUCT)
    down, across = tl.cdiv(end - first, ROWS), tl.cdiv(columns, COLUMNS)
    j = tl.program_id(0) % across * COLUMNS
    i = tl.program_id(0) // across % down * ROWS + first
    b = tl.program_id(0) // across // down
    valid_i = valid_tokens(mask_a, b, i, rows, ROWS)
    valid_j = valid_tokens(mask_b, b, j, columns, COLUMNS)
    # Pairs that are not valid are replaced below.
    tiles = (None,) * EXPERTS
    p = gate(
        *(tiles, q, k, bias, b, i, valid_i, j, valid_j, False, scale),
        *(EXPERTS, TOP_K, R, DEPTH_R, PRECISION, PTX),
    )
    row, column = i + tl.arange(0, ROWS), j + tl.arange(0, COLUMNS)
    place = tl.cast(row, tl.int64)[:, None] * columns + column[None, :]
    inside = (row < end)[:, None] & (column < columns)[None, :]
    valid = valid_i[:, None] & valid_j[None, :]
    size = tl.cast(end - first, tl.int64) * columns
    start = (
        out + tl.cast(b, tl.int64) * (EXPERTS + KEYS) * size - tl.cast(first, tl.int64) * columns
    )
    together = tl.zeros((ROWS, COLUMNS), tl.float32)
    for e in tl.static_range(EXPERTS):
        value = pair_values(
            *(tiles, u, c, offset_i, offset_j, b, e, i, valid_i, j, valid_j, rows, columns),
            *(PRODUCT[e], OFFSET_X[e], OFFSET_Z[e], EXPERTS, V, DEPTH_V, PRECISION),
        )
        value = tl.where(valid, p[e] * value, 0.0)
        together += value
        if KEYS:
            tl.store(start + e * size + place, order_keys(value, place, valid), mask=inside)
        else:
            tl.store(start + e * size + place, value, mask=inside)
    if KEYS:
        tl.store(start + EXPERTS * size + place, order_keys(together, place, valid), mask=inside)


@triton.jit
def order_keys(value, place, valid):
    """Integer keys in the order of (value, -place); the smallest integer if not valid. NaN is above infinity."""
    # Use one bit pattern for NaN and one for zero, then invert the bits of negative numbers so that they ascend.
    value = tl.where(value == 0.0, 0.0, value)
    bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (tl.cast(bits, tl.int64) << 32) | (0xFFFFFFFF - place)
    return tl.where(valid, key, -0x8000000000000000)
