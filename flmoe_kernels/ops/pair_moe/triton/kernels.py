"""Triton kernels of pair_moe.

Constants of a compiled kernel are the experts' coefficients (so that a kind costs only what it needs), TOP_K, R,
V, and missing inputs, which are None. Lengths are variables. Tiles of pairs are in registers, one per expert;
nothing of size La x Lb is stored.

R and V are read in chunks of DEPTH_R and DEPTH_V columns for sums over them, and written in chunks of WIDE_R and
WIDE_V columns. Every written chunk has its own program, which recomputes the gate: any width works, and a width
that fits into one chunk needs one gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    dot,
    gate,
    load_sums,
    load_tokens,
    products,
    store_sums,
    store_tokens,
    valid_tokens,
)


# y and mass; and the gradients of a and c, which are sums of the same form with other operands, see launch.py.
#     out_i = S1 a_i sum_j p + S2 sum_j p c_j + S3 a_i * sum_j p c_j
# One program per block of tokens i, chunk of V and sample, with a loop over blocks of j. Traffic: q, a and out
# once; k and c once per block of i, from L2. Bound, by
# counting instructions, not measured: the arithmetic and exponentials of the softmax, for which the matrix units
# wait. Sums of p c_j are therefore a matrix product for every reduction: "pool" does not need it for unique_b and
# redundancy, but would then sum p over the rows of a tile, across warps, on the busier units.
@triton.jit
def accumulate_kernel(
    q,
    k,
    a,
    c,
    bias,
    mask_a,
    mask_b,
    out,
    mass,
    rows,
    columns,
    scale,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    TOP_K: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    REDUCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_R: tl.constexpr,
    WIDE_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(S1)
    blocks, chunks = tl.cdiv(rows, ROWS), tl.cdiv(V, WIDE_V)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    b = tl.program_id(0) // blocks // chunks
    i, column = block * ROWS, chunk * WIDE_V
    valid_i = valid_tokens(mask_a, b, i, rows, ROWS)
    masses, sums = (), ()
    for e in tl.static_range(EXPERTS):
        masses += (tl.zeros((ROWS,), tl.float32),)
        sums += (tl.zeros((ROWS, WIDE_V), tl.float32) if S2[e] + S3[e] > 0.0 else 0.0,)
    for j in range(0, columns, COLUMNS):
        valid_j = valid_tokens(mask_b, b, j, columns, COLUMNS)
        p = gate(
            *(q, k, bias, b, i, valid_i, j, valid_j, scale),
            *(EXPERTS, TOP_K, R, DEPTH_R, PRECISION),
        )
        new_masses, new_sums = (), ()
        for e in tl.static_range(EXPERTS):
            new_masses += (masses[e] + tl.sum(p[e], 1),)
            if S2[e] + S3[e] > 0.0:
                message = load_tokens(c, b, e, j, valid_j, column, V, WIDE_V)
                new_sums += (dot(p[e], message, sums[e], PRECISION),)
            else:
                new_sums += (0.0,)
        masses, sums = new_masses, new_sums
    together = tl.zeros((ROWS, WIDE_V), tl.float32)
    for e in tl.static_range(EXPERTS):
        value = tl.zeros((ROWS, WIDE_V), tl.float32)
        if S1[e] + S3[e] > 0.0:
            own = load_tokens(a, b, e, i, valid_i, column, V, WIDE_V).to(tl.float32)
        if S1[e] > 0.0:
            value += S1[e] * own * masses[e][:, None]
        if S2[e] > 0.0:
            value += S2[e] * sums[e]
        if S3[e] > 0.0:
            value += S3[e] * own * sums[e]
        if REDUCE == "none":
            store_tokens(out, b, e, i, valid_i, rows, column, value, V)
        elif REDUCE == "experts":
            together += value
        else:
            # Here out has one row per block.
            pooled = tl.sum(tl.where(valid_i[:, None], value, 0.0), 0)[None, :]
            store_tokens(out, b, e, block, tl.full((1,), 1, tl.int1), blocks, column, pooled, V)
        if mass is not None and chunk == 0:
            store_sums(mass, b, e, i, valid_i, rows, masses[e], EXPERTS)
    if REDUCE == "experts":
        store_tokens(out, b, 0, i, valid_i, rows, column, together, V)


# The terms of the backward and the maps that depend on one side, with the gradient (or head) g of each token:
#     offset = base + C0 g . x,   factor = (C1 + C2 x) * g.
# One program per block of tokens and sample. Traffic: x and g once, factor once. Bound: bandwidth; short.
@triton.jit
def project_kernel(
    x,
    g,
    base,
    mask,
    offset,
    factor,
    length,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_V: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(C0)
    blocks = tl.cdiv(length, ROWS)
    b, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    valid = valid_tokens(mask, b, i, length, ROWS)
    for e in tl.static_range(EXPERTS):
        total = tl.zeros((ROWS,), tl.float32)
        if base is not None:
            total += load_sums(base, b, e, i, valid, length, EXPERTS)
        if C0[e] + C1[e] + C2[e] > 0.0:
            for column in range(0, V, WIDE_V):
                own = load_tokens(x, b, e, i, valid, column, V, WIDE_V).to(tl.float32)
                cotangent = load_tokens(g, b, e, i, valid, column, V, WIDE_V).to(tl.float32)
                if C0[e] > 0.0:
                    # The selection keeps a product from being fused with the sum of another lane, which rounds
                    # differently.
                    terms = tl.where(valid[:, None], own * cotangent, 0.0)
                    total += C0[e] * tl.sum(terms, 1)
                if C1[e] + C2[e] > 0.0:
                    # Term by term, so that a NaN in x has no effect if its coefficient is 0.
                    product = tl.zeros_like(own)
                    if C1[e] > 0.0:
                        product += C1[e] * cotangent
                    if C2[e] > 0.0:
                        product += C2[e] * own * cotangent
                    store_tokens(factor, b, e, i, valid, length, column, product, V)
        store_sums(offset, b, e, i, valid, length, total, EXPERTS)


@triton.jit
def pair_values(
    u,
    w,
    offset_x,
    offset_z,
    b,
    e,
    x0,
    valid_x,
    z0,
    valid_z,
    length_x,
    length_z,
    PRODUCT: tl.constexpr,
    EXPERTS: tl.constexpr,
    V: tl.constexpr,
    DEPTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute offset_x + offset_z + u . w of one expert for a tile of pairs."""
    values = tl.zeros((valid_x.shape[0], valid_z.shape[0]), tl.float32)
    if PRODUCT:
        values = products(u, w, b, e, x0, valid_x, z0, valid_z, V, DEPTH_V, PRECISION)
    if offset_x is not None:
        values += load_sums(offset_x, b, e, x0, valid_x, length_x, EXPERTS)[:, None]
    if offset_z is not None:
        values += load_sums(offset_z, b, e, z0, valid_z, length_z, EXPERTS)[None, :]
    return values


# Gradient of q (or of k with swapped sides), so that sums stay within a program. From the gradient of p,
#     gp = offset_x + offset_z + u . w,    d = p * (gp - sum over experts of p * gp):
#     grad_x = scale * sum_z d z,    grad_bias = sum of d.
# One program per block of x, chunk of R and sample. Traffic: x, u and grad_x once; z and w once per block of x,
# from L2. Bound: the arithmetic, twice the softmax's. Registers: two tiles of pairs per expert; sums of p w would
# not fit as well, so accumulate_kernel recomputes the gate for the gradients of a and c.
@triton.jit
def gate_gradient_kernel(
    x,
    z,
    u,
    w,
    offset_x,
    offset_z,
    bias,
    mask_x,
    mask_z,
    grad_x,
    grad_bias,
    length_x,
    length_z,
    scale,
    PRODUCT: tl.constexpr,
    TOP_K: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_R: tl.constexpr,
    DEPTH_V: tl.constexpr,
    WIDE_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(PRODUCT)
    blocks, chunks = tl.cdiv(length_x, ROWS), tl.cdiv(R, WIDE_R)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    b = tl.program_id(0) // blocks // chunks
    x0, column = block * ROWS, chunk * WIDE_R
    valid_x = valid_tokens(mask_x, b, x0, length_x, ROWS)
    sums, totals = (), ()
    for _ in tl.static_range(EXPERTS):
        sums += (tl.zeros((ROWS, WIDE_R), tl.float32) if grad_x is not None else 0.0,)
        totals += (tl.zeros((ROWS,), tl.float32) if grad_bias is not None else 0.0,)
    for z0 in range(0, length_z, COLUMNS):
        valid_z = valid_tokens(mask_z, b, z0, length_z, COLUMNS)
        p = gate(
            *(x, z, bias, b, x0, valid_x, z0, valid_z, scale),
            *(EXPERTS, TOP_K, R, DEPTH_R, PRECISION),
        )
        cotangents = ()
        mean = tl.zeros((ROWS, COLUMNS), tl.float32)
        for e in tl.static_range(EXPERTS):
            cotangent = pair_values(
                *(u, w, offset_x, offset_z, b, e, x0, valid_x, z0, valid_z, length_x, length_z),
                *(PRODUCT[e], EXPERTS, V, DEPTH_V, PRECISION),
            )
            if TOP_K < EXPERTS:
                # An expert that was not selected for the pair has no part, whatever its values are.
                cotangent = tl.where(p[e] == 0.0, 0.0, cotangent)
            mean += p[e] * cotangent
            cotangents += (cotangent,)
        new_sums, new_totals = (), ()
        for e in tl.static_range(EXPERTS):
            # Selected, not only multiplied: where z is masked, an infinity in w must not become NaN.
            present = valid_z[None, :]
            if TOP_K < EXPERTS:
                present = present & (p[e] != 0.0)
            d = tl.where(present, p[e] * (cotangents[e] - mean), 0.0)
            if grad_x is not None:
                other = load_tokens(z, b, e, z0, valid_z, column, R, WIDE_R)
                new_sums += (dot(d, other, sums[e], PRECISION),)
            else:
                new_sums += (0.0,)
            new_totals += (totals[e] + tl.sum(d, 1) if grad_bias is not None else 0.0,)
        sums, totals = new_sums, new_totals
    for e in tl.static_range(EXPERTS):
        if grad_x is not None:
            store_tokens(grad_x, b, e, x0, valid_x, length_x, column, sums[e] * scale, R)
        if grad_bias is not None and chunk == 0:
            total = tl.sum(tl.where(valid_x, totals[e], 0.0), 0)
            tl.store(grad_bias + (tl.cast(b, tl.int64) * blocks + block) * EXPERTS + e, total)


# Contributions phi = p * (offset_i + offset_j + u_i . c_j) of the rows first .. rows, dense; or, as KEYS, 64-bit
# integers that order them with their sum over the experts: larger phi first, then lower (i, j). One program per
# tile and sample. Traffic: the output, once. Bound: that.
@triton.jit
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
    TOP_K: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_R: tl.constexpr,
    DEPTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(PRODUCT)
    down, across = tl.cdiv(end - first, ROWS), tl.cdiv(columns, COLUMNS)
    j = tl.program_id(0) % across * COLUMNS
    i = tl.program_id(0) // across % down * ROWS + first
    b = tl.program_id(0) // across // down
    valid_i = valid_tokens(mask_a, b, i, rows, ROWS)
    valid_j = valid_tokens(mask_b, b, j, columns, COLUMNS)
    p = gate(
        *(q, k, bias, b, i, valid_i, j, valid_j, scale),
        *(EXPERTS, TOP_K, R, DEPTH_R, PRECISION),
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
            *(u, c, offset_i, offset_j, b, e, i, valid_i, j, valid_j, rows, columns),
            *(PRODUCT[e], EXPERTS, V, DEPTH_V, PRECISION),
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
