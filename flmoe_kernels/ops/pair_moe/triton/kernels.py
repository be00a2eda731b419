"""Triton kernels of pair_moe.

Constants of a compiled kernel are the experts' coefficients (so that a kind costs only what it needs), TOP_K, R,
V, and missing inputs, which are None. Lengths are variables. Tiles of pairs are in registers, one per expert;
nothing of size La x Lb is stored.

R and V are read in chunks of DEPTH_R and DEPTH_V columns for sums over them, and written in chunks of WIDE_R and
WIDE_V columns. Every written chunk has its own program, which recomputes the gate: any width works, and a width
that fits into one chunk needs one gate.

A loop loads the mask of its next block: if a matrix product depends on a mask that is loaded in the same step,
Triton 3.7 lays out the product's operands for 8-bit values. The mask of a program's own tokens is read after the
loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.products import dot

from .tiles import (
    count_valid,
    gate,
    lane_sums,
    later,
    load_sums,
    load_tokens,
    pair_values,
    store_sums,
    store_tokens,
    valid_tokens,
    whole_tiles,
)


@triton.jit
def zeros_if(needed: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if needed:
        return tl.zeros((ROWS, WIDTH), tl.float32)
    else:
        return 0.0


@triton.jit
def add_block(
    p,
    c,
    mass,
    masses,
    sums,
    b,
    j,
    valid_j,
    column,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    V: tl.constexpr,
    WIDE_V: tl.constexpr,
    LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a block of tokens j to sum_j p (as lane_sums) and sum_j p c_j, for experts that need them."""
    new_masses, new_sums = (), ()
    for e in tl.static_range(len(S1)):
        if mass is not None or S1[e] > 0.0:
            new_masses += (masses[e] + lane_sums(p[e], LANES),)
        else:
            new_masses += (0.0,)
        if S2[e] + S3[e] > 0.0:
            message = load_tokens(c, b, e, j, valid_j, column, V, WIDE_V)
            new_sums += (dot(p[e], message, sums[e], PRECISION),)
        else:
            new_sums += (0.0,)
    return new_masses, new_sums


@triton.jit
def message_sums(
    a,
    mass,
    total,
    b,
    e,
    i,
    valid_i,
    column,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_V: tl.constexpr,
):
    """One expert's S1 a_i sum_j p + S2 sum_j p c_j + S3 a_i * sum_j p c_j."""
    value = tl.zeros((ROWS, WIDE_V), tl.float32)
    if S1 + S3 > 0.0:
        own = load_tokens(a, b, e, i, valid_i, column, V, WIDE_V).to(tl.float32)
    if S1 > 0.0:
        value += S1 * own * mass[:, None]
    if S2 > 0.0:
        value += S2 * total
    if S3 > 0.0:
        value += S3 * own * total
    return value


# y and mass; and the gradients of a and c, which are sums of the same form with other operands, see launch.py.
#     out_i = S1 a_i sum_j p + S2 sum_j p c_j + S3 a_i * sum_j p c_j
# One program per block of tokens i, chunk of V and sample, with a loop over blocks of j. Traffic: q, a and out
# once; k and c once per block of i, from L2. Bound, by counting instructions, not measured: the arithmetic of the
# softmax and, for as many cycles on sm_90, its exponentials and reciprocals; the matrix units wait. The sum of
# p c_j is therefore always a matrix product. For "pool" with unique_b and redundancy it could be avoided by
# summing p over rows, which would add work to the arithmetic units, the bottleneck.
@triton.jit(do_not_specialize=("rows", "columns"))
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
    LANES: tl.constexpr,
    HELD: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(S1)
    blocks, chunks = tl.cdiv(rows, ROWS), tl.cdiv(V, WIDE_V)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    b = tl.program_id(0) // blocks // chunks
    i, column = block * ROWS, chunk * WIDE_V
    valid_i = valid_tokens(None, b, i, rows, ROWS)
    masses, sums = (), ()
    for e in tl.static_range(EXPERTS):
        masses += (zeros_if(mass is not None or S1[e] > 0.0, ROWS, LANES),)
        sums += (zeros_if(S2[e] + S3[e] > 0.0, ROWS, WIDE_V),)
    tiles = (None,) * EXPERTS
    if HELD:
        tiles = whole_tiles(q, b, i, valid_i, (True,) * EXPERTS, R, DEPTH_R)
    valid_j = valid_tokens(mask_b, b, 0, columns, COLUMNS)
    for j in range(0, columns, COLUMNS):
        invalid = count_valid(mask_b, valid_j, j, columns) < COLUMNS
        p = gate(
            *(tiles, q, k, bias, b, i, valid_i, j, valid_j, invalid, scale),
            *(EXPERTS, TOP_K, R, DEPTH_R, PRECISION, PTX),
        )
        masses, sums = add_block(
            *(p, c, mass, masses, sums, b, j, valid_j, column),
            *(S1, S2, S3, V, WIDE_V, LANES, PRECISION),
        )
        valid_j = valid_tokens(mask_b, b, j + COLUMNS, columns, COLUMNS)
    valid_i = valid_tokens(mask_a, b, i, rows, ROWS)
    together = tl.zeros((ROWS, WIDE_V), tl.float32)
    for e in tl.static_range(EXPERTS):
        sum_p = tl.sum(masses[e], 1) if mass is not None or S1[e] > 0.0 else 0.0
        value = message_sums(
            *(a, sum_p, sums[e], b, e, i, valid_i, column),
            *(S1[e], S2[e], S3[e], V, ROWS, WIDE_V),
        )
        if REDUCE == "none":
            store_tokens(out, b, e, i, valid_i, rows, column, value, V)
        elif REDUCE == "experts":
            together += value
        else:
            # Here out has one row per block.
            pooled = tl.sum(tl.where(valid_i[:, None], value, 0.0), 0)[None, :]
            store_tokens(out, b, e, block, tl.full((1,), 1, tl.int1), blocks, column, pooled, V)
        if mass is not None and chunk == 0:
            store_sums(mass, b, e, i, valid_i, rows, sum_p, EXPERTS)
    if REDUCE == "experts":
        store_tokens(out, b, 0, i, valid_i, rows, column, together, V)


# The terms of the backward and the maps that depend on one side, with the gradient (or head) g of each token:
#     offset = base + C0 g . x,   factor = (C1 + C2 x) * g.
# One program per block of tokens and sample. Traffic: x and g once, factor once. Bound: bandwidth; short.
@triton.jit(do_not_specialize=("length",))
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


# Gradients of q and a (or, with swapped sides, of k and c), so that sums stay within a program. From the gradient
# of p,
#     gp = offset_x + offset_z + u . w,    d = p * (gp - sum over experts of p * gp):
#     grad_x = scale * sum_z d z,    grad_bias = sum of d,
# and grad_own, that of a or c, is a sum as in accumulate_kernel with w instead of c.
# One program per block of x, chunk of R and V, and sample. Traffic: x, u, own and the gradients once; z and w once
# per block of x, from L2. Bound: the arithmetic, twice the softmax's. Registers: two tiles of pairs and up to two
# sums per expert, so that loop invariants are not kept in registers (disable_licm); launch.py computes grad_own in
# accumulate_kernel, with a gate of its own, where the sums do not fit.
@triton.jit(do_not_specialize=("length_x", "length_z"))
def gradient_kernel(
    x,
    z,
    u,
    w,
    own,
    offset_x,
    offset_z,
    bias,
    mask_x,
    mask_z,
    grad_x,
    grad_own,
    grad_bias,
    length_x,
    length_z,
    scale,
    PRODUCT: tl.constexpr,
    OFFSET_X: tl.constexpr,
    OFFSET_Z: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    TOP_K: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_R: tl.constexpr,
    DEPTH_V: tl.constexpr,
    WIDE_R: tl.constexpr,
    WIDE_V: tl.constexpr,
    LANES: tl.constexpr,
    HELD: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(PRODUCT)
    blocks, chunks = tl.cdiv(length_x, ROWS), 1
    if grad_x is not None:
        chunks = tl.cdiv(R, WIDE_R)
    if grad_own is not None:
        chunks = max(chunks, tl.cdiv(V, WIDE_V))
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    b = tl.program_id(0) // blocks // chunks
    x0, column_r, column_v = block * ROWS, chunk * WIDE_R, chunk * WIDE_V
    valid_x = valid_tokens(None, b, x0, length_x, ROWS)
    masses, values, sums, totals = (), (), (), ()
    for e in tl.static_range(EXPERTS):
        masses += (zeros_if(grad_own is not None and S1[e] > 0.0, ROWS, LANES),)
        values += (zeros_if(grad_own is not None and S2[e] + S3[e] > 0.0, ROWS, WIDE_V),)
        sums += (zeros_if(grad_x is not None, ROWS, WIDE_R),)
        totals += (zeros_if(grad_bias is not None, ROWS, LANES),)
    tiles, factors = (None,) * EXPERTS, (None,) * EXPERTS
    if HELD:
        tiles = whole_tiles(x, b, x0, valid_x, (True,) * EXPERTS, R, DEPTH_R)
        factors = whole_tiles(u, b, x0, valid_x, PRODUCT, V, DEPTH_V)
    seen = 0
    valid_z = valid_tokens(mask_z, b, 0, length_z, COLUMNS)
    for z0 in tl.range(0, length_z, COLUMNS, disable_licm=True):
        count = count_valid(mask_z, valid_z, z0, length_z)
        seen += count
        p = gate(
            *(tiles, x, z, bias, b, x0, valid_x, z0, valid_z, count < COLUMNS, scale),
            *(EXPERTS, TOP_K, R, DEPTH_R, PRECISION, PTX),
        )
        if grad_own is not None:
            masses, values = add_block(
                *(p, w, None, masses, values, b, z0, valid_z, column_v),
                *(S1, S2, S3, V, WIDE_V, LANES, PRECISION),
            )
        if grad_x is not None or grad_bias is not None:
            cotangents = ()
            mean = tl.zeros((ROWS, COLUMNS), tl.float32)
            for e in tl.static_range(EXPERTS):
                cotangent = pair_values(
                    *(factors, u, w, offset_x, offset_z, b, e, x0, valid_x, z0, valid_z),
                    *(length_x, length_z, PRODUCT[e], OFFSET_X[e], OFFSET_Z[e]),
                    *(EXPERTS, V, DEPTH_V, PRECISION),
                )
                if TOP_K < EXPERTS:
                    # An expert that was not selected for the pair has no part, whatever its values are.
                    cotangent = tl.where(p[e] == 0.0, 0.0, cotangent)
                mean += p[e] * cotangent
                cotangents += (cotangent,)
            new_sums, new_totals = (), ()
            for e in tl.static_range(EXPERTS):
                d = p[e] * (cotangents[e] - mean)
                if TOP_K < EXPERTS:
                    d = tl.where(p[e] != 0.0, d, 0.0)
                if grad_x is not None:
                    other = load_tokens(z, b, e, z0, valid_z, column_r, R, WIDE_R)
                    new_sums += (dot(d, other, sums[e], PRECISION),)
                else:
                    new_sums += (0.0,)
                new_totals += (totals[e] + lane_sums(d, LANES) if grad_bias is not None else 0.0,)
            sums, totals = new_sums, new_totals
        valid_z = valid_tokens(mask_z, b, z0 + COLUMNS, length_z, COLUMNS)
    x0, b = later(x0, PTX), later(b, PTX)
    # Without a valid pair the gradient is zero, also where u is infinite.
    # A vector, because the interpreter of Triton 3.9 rejects masks with a scalar condition.
    some = tl.full((ROWS,), seen, tl.int32) > 0
    valid_x = valid_tokens(mask_x, b, x0, length_x, ROWS) & some
    for e in tl.static_range(EXPERTS):
        if grad_own is not None:
            value = message_sums(
                *(own, tl.sum(masses[e], 1) if S1[e] > 0.0 else 0.0, values[e]),
                *(b, e, x0, valid_x, column_v, S1[e], S2[e], S3[e], V, ROWS, WIDE_V),
            )
            store_tokens(grad_own, b, e, x0, valid_x, length_x, column_v, value, V)
        if grad_x is not None:
            store_tokens(grad_x, b, e, x0, valid_x, length_x, column_r, sums[e] * scale, R)
        if grad_bias is not None and chunk == 0:
            total = tl.sum(tl.where(valid_x, tl.sum(totals[e], 1), 0.0), 0)
            tl.store(grad_bias + (tl.cast(b, tl.int64) * blocks + block) * EXPERTS + e, total)
