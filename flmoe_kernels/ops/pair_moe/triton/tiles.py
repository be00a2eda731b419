"""Helpers of pair_moe's Triton kernels: tiles of tokens, and the gate.

An operand is a tuple (pointer, stride over samples, stride over experts, stride over tokens); its last
dimension is contiguous. A block of tokens is a first index and a `valid` vector, False past the end and for
masked tokens, which are not read. Offsets of samples, experts and blocks are 64 bits wide; those
within a block fit 32 because launch.operand copies tensors with larger strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.products import dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def valid_tokens(mask, b, first, length, BLOCK: tl.constexpr):
    token = first + tl.arange(0, BLOCK)
    valid = token < length
    if mask is not None:
        valid = tl.load(mask + tl.cast(b, tl.int64) * length + token, mask=valid, other=False)
    return valid


@triton.jit
def count_valid(mask, valid, first, length):
    """Number of valid tokens in a block, the same for all threads."""
    if mask is not None:
        return tl.sum(valid.to(tl.int32), 0)
    else:
        return tl.minimum(length - first, valid.shape[0])


@triton.jit
def load_tokens(x, b, e, first, valid, column, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Load columns `column` to column + CHUNK of a block of one expert's tokens; zeros if not valid."""
    pointer, of_sample, of_expert, of_token = x
    start = pointer + column + tl.cast(b, tl.int64) * of_sample
    start += tl.full((), e, tl.int64) * of_expert + tl.cast(first, tl.int64) * of_token
    at = tl.arange(0, CHUNK)
    offsets = tl.arange(0, valid.shape[0])[:, None] * of_token + at[None, :]
    present = valid[:, None]
    if WIDTH % CHUNK != 0:
        present = present & (column + at < WIDTH)[None, :]
    return tl.load(start + offsets, mask=present, other=0.0)


@triton.jit
def store_tokens(x, b, e, first, valid, length, column, values, WIDTH: tl.constexpr):
    """Store a block of tokens below `length`, with zeros for tokens that are not valid."""
    pointer, of_sample, of_expert, of_token = x
    start = pointer + column + tl.cast(b, tl.int64) * of_sample
    start += tl.full((), e, tl.int64) * of_expert + tl.cast(first, tl.int64) * of_token
    row, at = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    present = (first + row < length)[:, None] & (column + at < WIDTH)[None, :]
    values = tl.where(valid[:, None], values, 0.0).to(pointer.dtype.element_ty)
    tl.store(start + row[:, None] * of_token + at[None, :], values, mask=present)


@triton.jit
def load_sums(sums, b, e, first, valid, length, EXPERTS: tl.constexpr):
    """A block of a contiguous (B, E, length) tensor."""
    at = sums + (tl.cast(b, tl.int64) * EXPERTS + e) * length + first
    return tl.load(at + tl.arange(0, valid.shape[0]), mask=valid, other=0.0)


@triton.jit
def store_sums(sums, b, e, first, valid, length, values, EXPERTS: tl.constexpr):
    at = sums + (tl.cast(b, tl.int64) * EXPERTS + e) * length + first
    row = tl.arange(0, valid.shape[0])
    tl.store(at + row, tl.where(valid, values, 0.0), mask=first + row < length)


@triton.jit
def lane_sums(x, LANES: tl.constexpr):
    """Partial sums [rows, LANES] over the columns of a tile of pairs, to be added over tiles and then over lanes.

    In the tiles of mma.sync and wgmma, a thread has columns 2 t and 2 t + 1 of every 8. With LANES from
    launch.lanes_of each partial sum belongs to one thread, and a loop over tiles exchanges nothing.
    """
    parts = tl.reshape(x, (x.shape[0], x.shape[1] // (2 * LANES), LANES, 2))
    return tl.sum(tl.sum(parts, 3), 1)


@triton.jit
def later(x, PTX: tl.constexpr):
    """x, as a value that the compiler does not know. What depends on it is computed after a loop, not before, and
    holds no registers in the loop."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return x


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x for x from 1 to 8, to one unit in the last place: in PTX one instruction, not a division's seven."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def whole_tiles(x, b, first, valid, NEEDED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The experts' tiles of x for `products`, loaded before a loop over z; 0.0 if not NEEDED, or if x is read in
    chunks."""
    tiles = ()
    for e in tl.static_range(len(NEEDED)):
        if NEEDED[e] and WIDTH <= CHUNK:
            tiles += (load_tokens(x, b, e, first, valid, 0, WIDTH, CHUNK),)
        else:
            tiles += (0.0,)
    return tiles


@triton.jit
def products(
    tile,
    x,
    z,
    b,
    e,
    x0,
    valid_x,
    z0,
    valid_z,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i . z_j of one expert for a tile of pairs, in float32 (z may be of a narrower type than x).

    tile: that of x from whole_tiles; None to load it here.
    """
    total = tl.zeros((valid_x.shape[0], valid_z.shape[0]), tl.float32)
    if WIDTH <= CHUNK:
        left = load_tokens(x, b, e, x0, valid_x, 0, WIDTH, CHUNK) if tile is None else tile
        right = load_tokens(z, b, e, z0, valid_z, 0, WIDTH, CHUNK).to(left.dtype)
        total = dot(left, tl.trans(right), total, PRECISION)
    else:
        # This loop must not be unrolled: all chunks of x would be held at once.
        for column in range(0, WIDTH, CHUNK):
            left = load_tokens(x, b, e, x0, valid_x, column, WIDTH, CHUNK)
            right = load_tokens(z, b, e, z0, valid_z, column, WIDTH, CHUNK).to(left.dtype)
            total = dot(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def finite_product(x, UNIT: tl.constexpr):
    """x * UNIT, finite if x is."""
    MOST: tl.constexpr = 3.4028234663852886e38
    product = x * UNIT
    return tl.where(tl.abs(x) <= MOST, tl.clamp(product, -MOST, MOST), product)


@triton.jit
def gate(
    tiles,
    x,
    z,
    bias,
    b,
    x0,
    valid_x,
    z0,
    valid_z,
    invalid,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Probabilities of the experts for a tile of pairs, one [x, z] tile each.

    If `invalid`, which is the same for all threads, they are 0 where z is not valid; tiles of valid tokens skip
    these selections. The caller handles rows x that are not valid, when it stores them.
    """
    # The unit of exp2 is folded into scale and bias, but not with top_k: its rounding could separate equal logits.
    UNIT: tl.constexpr = 1.0 if TOP_K < EXPERTS else LOG2_E
    logits = ()
    for e in tl.static_range(EXPERTS):
        logit = products(tiles[e], x, z, b, e, x0, valid_x, z0, valid_z, WIDTH, CHUNK, PRECISION)
        logit *= scale * UNIT
        if bias is not None:
            logit += finite_product(tl.load(bias + e).to(tl.float32), UNIT)
        logits += (logit,)
    largest = logits[0]
    for e in tl.static_range(1, EXPERTS):
        largest = tl.maximum(largest, logits[e])
    total = tl.zeros_like(largest)
    weights = ()
    for e in tl.static_range(EXPERTS):
        power = logits[e] - largest
        if TOP_K < EXPERTS:
            power *= LOG2_E
        weight = tl.exp2(power)
        if TOP_K < EXPERTS:
            before = tl.zeros_like(largest).to(tl.int32)
            for other in tl.static_range(EXPERTS):
                if other < e:
                    before += (logits[other] >= logits[e]).to(tl.int32)
                elif other > e:
                    before += (logits[other] > logits[e]).to(tl.int32)
            # An unselected expert gets a negative value, too small to change the total, which is at least 1.
            weight = tl.where(before < TOP_K, weight, -2e-38)
        total += weight
        weights += (weight,)
    share = reciprocal(total, PTX)
    p = ()
    if invalid:
        # Both, because weights and share may be NaN.
        share, weights = select_valid(share, weights, valid_z)
    for e in tl.static_range(EXPERTS):
        value = weights[e] * share
        if TOP_K < EXPERTS:
            # If weights are NaN: 0 for an unselected expert, NaN for a selected expert of weight 0.
            value = tl.where(weights[e] < 0.0, 0.0, value)
        p += (value,)
    return p


@triton.jit
def select_valid(share, weights, valid_z):
    selected = ()
    for e in tl.static_range(len(weights)):
        selected += (tl.where(valid_z[None, :], weights[e], 0.0),)
    return tl.where(valid_z[None, :], share, 0.0), selected


@triton.jit
def pair_values(
    tiles,
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
    OFFSET_X: tl.constexpr,
    OFFSET_Z: tl.constexpr,
    EXPERTS: tl.constexpr,
    V: tl.constexpr,
    DEPTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute offset_x + offset_z + u . w of one expert for a tile of pairs."""
    values = tl.zeros((valid_x.shape[0], valid_z.shape[0]), tl.float32)
    if PRODUCT:
        values = products(tiles[e], u, w, b, e, x0, valid_x, z0, valid_z, V, DEPTH_V, PRECISION)
    if OFFSET_X:
        values += load_sums(offset_x, b, e, x0, valid_x, length_x, EXPERTS)[:, None]
    if OFFSET_Z:
        values += load_sums(offset_z, b, e, z0, valid_z, length_z, EXPERTS)[None, :]
    return values
