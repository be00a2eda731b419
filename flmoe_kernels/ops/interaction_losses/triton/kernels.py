"""Triton kernels of the interaction losses: triplets and cosines.

Latents are (experts, views, batch, width), contiguous, with views = modalities + 1. The first UNIQUE experts, one
per modality or none, have uniqueness losses, the last two are synergy and redundancy. exists (batch, modalities)
bool: whether the view that replaces a modality exists for a sample; None: all. A loss is a mean over what exists.
A program has a block of samples of one expert; distances, products and losses are float32. Sums stay within a
program, except the mean over the batch, whose parts `mean_kernel` adds in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

MARGIN = tl.constexpr(1.0)
TRIPLET_EPS = tl.constexpr(1e-7)
NORM_FLOOR = tl.constexpr(1e-12)
COUNTED = tl.constexpr(128)  # samples per step of share_of


@triton.jit
def view_of(latents, expert, view, first, batch, width, VIEWS: tl.constexpr):
    """Pointer to sample `first` of a view; offsets within a block of samples fit 32 bits."""
    sample = (tl.cast(expert, tl.int64) * VIEWS + view) * batch + first
    return latents + sample * width


@triton.jit
def load_tile(x, row, valid, column, width, CHUNK: tl.constexpr):
    at = column + tl.arange(0, CHUNK)
    present = valid[:, None] & (at < width)[None, :]
    return tl.load(x + row[:, None] * width + at[None, :], mask=present, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, row, valid, column, width, values, CHUNK: tl.constexpr):
    at = column + tl.arange(0, CHUNK)
    present = valid[:, None] & (at < width)[None, :]
    tl.store(x + row[:, None] * width + at[None, :], values.to(x.dtype.element_ty), mask=present)


@triton.jit
def difference(x_tile, y_tile, column, width, CHUNK: tl.constexpr):
    """Compute x - y + eps, as in the triplet's distance; 0 after the last column."""
    inside = (column + tl.arange(0, CHUNK) < width)[None, :]
    return tl.where(inside, x_tile - y_tile + TRIPLET_EPS, 0.0)


@triton.jit
def distance(x, y, row, valid, width, CHUNK: tl.constexpr):
    total = tl.zeros((row.shape[0],), tl.float32)
    for column in range(0, width, CHUNK):
        x_tile = load_tile(x, row, valid, column, width, CHUNK)
        y_tile = load_tile(y, row, valid, column, width, CHUNK)
        apart = difference(x_tile, y_tile, column, width, CHUNK)
        inside = (column + tl.arange(0, CHUNK) < width)[None, :]
        # The selection keeps squares from being fused with sums of other lanes, which round differently.
        total += tl.sum(tl.where(inside, apart * apart, 0.0), 1)
    return tl.sqrt(total)


@triton.jit
def product(x, y, row, valid, width, CHUNK: tl.constexpr):
    total = tl.zeros((row.shape[0],), tl.float32)
    for column in range(0, width, CHUNK):
        x_tile = load_tile(x, row, valid, column, width, CHUNK)
        y_tile = load_tile(y, row, valid, column, width, CHUNK)
        # Selected as above; by rows, because a selection of columns spills 8 bytes in the gradient.
        total += tl.sum(tl.where(valid[:, None], x_tile * y_tile, 0.0), 1)
    return total


@triton.jit
def norm(x, row, valid, width, CHUNK: tl.constexpr):
    length = tl.sqrt(product(x, x, row, valid, width, CHUNK))
    # Not a maximum: that would lose a NaN.
    return tl.where(length < NORM_FLOOR, NORM_FLOOR, length)


@triton.jit
def has_view(exists, sample, valid, modality, MODALITIES: tl.constexpr):
    # An early return does not work: the compiler would still compile the load from None.
    # A conditional expression spills 8 bytes on sm_80.
    if exists is None:  # noqa: SIM108
        here = valid
    else:
        here = tl.load(exists + sample * MODALITIES + modality, mask=valid, other=0) != 0
    return here


@triton.jit
def share_of(exists, expert, batch, UNIQUE: tl.constexpr, MODALITIES: tl.constexpr):
    """One over the number of terms of an expert's loss; 0 without any."""
    if exists is None:
        views = tl.where(expert < UNIQUE, MODALITIES - 1, MODALITIES)
        count = (batch * views).to(tl.float32)
    else:
        terms = tl.zeros((COUNTED,), tl.float32)
        for first in range(0, batch, COUNTED):
            sample = first + tl.arange(0, COUNTED)
            valid = sample < batch
            if expert < UNIQUE:
                own = has_view(exists, sample, valid, expert, MODALITIES)
                terms -= tl.where(own, 1.0, 0.0)
            else:
                own = valid
            for other in range(MODALITIES):
                both = own & has_view(exists, sample, valid, other, MODALITIES)
                terms += tl.where(both, 1.0, 0.0)
        count = tl.sum(terms, 0)
    return tl.where(count == 0, 0.0, 1.0 / count)


# Parts of the losses, one per block of samples: their sum over the block times share_of. A program has a
# block of one expert. Traffic: each view of the expert comes from memory once; the full view (and a uniqueness
# expert's own view) is read again for every other view, from the nearest cache. 2 to 8 FLOP per element, so bytes
# are the bound: 0.6 MB in bfloat16 at mmimdb, which takes less time than a launch.
@triton.jit(do_not_specialize=("batch", "blocks"))
def losses_kernel(
    latents,
    exists,
    parts,
    batch,
    width,
    blocks,
    UNIQUE: tl.constexpr,
    VIEWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    MODALITIES: tl.constexpr = VIEWS - 1
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first = block * ROWS
    row = tl.arange(0, ROWS)
    valid = first + row < batch
    full = view_of(latents, expert, 0, first, batch, width, VIEWS)
    total = tl.zeros((ROWS,), tl.float32)
    if expert < UNIQUE:
        own = view_of(latents, expert, 1 + expert, first, batch, width, VIEWS)
        negative = distance(full, own, row, valid, width, CHUNK)
        with_own = has_view(exists, first + row, valid, expert, MODALITIES)
        for other in range(MODALITIES):
            if other != expert:
                view = view_of(latents, expert, 1 + other, first, batch, width, VIEWS)
                value = distance(full, view, row, valid, width, CHUNK) - negative + MARGIN
                # A NaN must not become a loss of 0.
                value = tl.where(value < 0, 0.0, value)
                both = with_own & has_view(exists, first + row, valid, other, MODALITIES)
                total += tl.where(both, value, 0.0)
    else:
        length = norm(full, row, valid, width, CHUNK)
        for other in range(MODALITIES):
            view = view_of(latents, expert, 1 + other, first, batch, width, VIEWS)
            both = length * norm(view, row, valid, width, CHUNK)
            cosine = product(full, view, row, valid, width, CHUNK) / both
            value = tl.where(expert == UNIQUE, cosine, 1.0 - cosine)
            here = has_view(exists, first + row, valid, other, MODALITIES)
            total += tl.where(here, value, 0.0)
    part = tl.sum(total, 0) * share_of(exists, expert, batch, UNIQUE, MODALITIES)
    tl.store(parts + expert * blocks + block, part)


# Sums of parts (experts, blocks), one program per expert: a few hundred bytes, latency-bound.
@triton.jit(do_not_specialize=("blocks",))
def mean_kernel(parts, losses, blocks, BLOCKS: tl.constexpr):
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCKS)
    total = tl.zeros((BLOCKS,), tl.float32)
    for block in range(0, blocks, BLOCKS):
        total += tl.load(parts + expert * blocks + block + at, mask=block + at < blocks, other=0.0)
    tl.store(losses + expert, tl.sum(total, 0).to(losses.dtype.element_ty))


# The gradient of all views in one launch. A program has a block of one expert and CHUNK columns; it sums the
# gradient of the full view in registers, and recomputes the statistics over all columns. Traffic: latents once
# from memory, once more from a cache, and the gradient once; bytes are the bound.
@triton.jit(do_not_specialize=("batch", "blocks"))
def gradient_kernel(
    grad_losses,
    latents,
    exists,
    grad_latents,
    batch,
    width,
    blocks,
    UNIQUE: tl.constexpr,
    VIEWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    MODALITIES: tl.constexpr = VIEWS - 1
    chunks = tl.cdiv(width, CHUNK)
    column, rest = tl.program_id(0) % chunks * CHUNK, tl.program_id(0) // chunks
    expert, first = rest // blocks, rest % blocks * ROWS
    row = tl.arange(0, ROWS)
    valid = first + row < batch
    grad = tl.load(grad_losses + expert).to(tl.float32)
    grad *= share_of(exists, expert, batch, UNIQUE, MODALITIES)
    full = view_of(latents, expert, 0, first, batch, width, VIEWS)
    full_tile = load_tile(full, row, valid, column, width, CHUNK)
    grad_full = tl.zeros((ROWS, CHUNK), tl.float32)
    if expert < UNIQUE:
        own = view_of(latents, expert, 1 + expert, first, batch, width, VIEWS)
        negative = distance(full, own, row, valid, width, CHUNK)
        with_own = has_view(exists, first + row, valid, expert, MODALITIES)
        active = tl.zeros((ROWS,), tl.float32)
        for other in range(MODALITIES):
            if other != expert:
                view = view_of(latents, expert, 1 + other, first, batch, width, VIEWS)
                length = distance(full, view, row, valid, width, CHUNK)
                both = with_own & has_view(exists, first + row, valid, other, MODALITIES)
                inside = tl.where(both & ~(length - negative + MARGIN < 0), 1.0, 0.0)
                active += inside
                # A distance of 0 has no direction.
                factor = tl.where((length == 0) | (inside == 0), 0.0, grad / length)
                view_tile = load_tile(view, row, valid, column, width, CHUNK)
                apart = difference(full_tile, view_tile, column, width, CHUNK)
                # 0 * NaN is NaN.
                apart = tl.where(inside[:, None] > 0, apart * factor[:, None], 0.0)
                grad_full += apart
                grad_view = view_of(grad_latents, expert, 1 + other, first, batch, width, VIEWS)
                store_tile(grad_view, row, valid, column, width, -apart, CHUNK)
        none = (negative == 0) | (active == 0)
        factor = tl.where(none, 0.0, -grad * active / negative)
        own_tile = load_tile(own, row, valid, column, width, CHUNK)
        apart = difference(full_tile, own_tile, column, width, CHUNK) * factor[:, None]
        apart = tl.where(active[:, None] > 0, apart, 0.0)
        grad_full += apart
        grad_own = view_of(grad_latents, expert, 1 + expert, first, batch, width, VIEWS)
        store_tile(grad_own, row, valid, column, width, -apart, CHUNK)
    else:
        share = tl.where(expert == UNIQUE, grad, -grad)
        length = norm(full, row, valid, width, CHUNK)
        for other in range(MODALITIES):
            view = view_of(latents, expert, 1 + other, first, batch, width, VIEWS)
            view_tile = load_tile(view, row, valid, column, width, CHUNK)
            view_length = norm(view, row, valid, width, CHUNK)
            both = length * view_length
            cosine = product(full, view, row, valid, width, CHUNK) / both
            # Below the floor, the length is a constant.
            back_full = tl.where(length > NORM_FLOOR, cosine / (length * length), 0.0)
            back = tl.where(view_length > NORM_FLOOR, cosine / (view_length * view_length), 0.0)
            one = 1.0 / both
            here = has_view(exists, first + row, valid, other, MODALITIES)[:, None]
            values = share * (one[:, None] * view_tile - back_full[:, None] * full_tile)
            grad_full += tl.where(here, values, 0.0)
            grad_view = view_of(grad_latents, expert, 1 + other, first, batch, width, VIEWS)
            values = share * (one[:, None] * full_tile - back[:, None] * view_tile)
            values = tl.where(here, values, 0.0)
            store_tile(grad_view, row, valid, column, width, values, CHUNK)
    grad_view = view_of(grad_latents, expert, 0, first, batch, width, VIEWS)
    store_tile(grad_view, row, valid, column, width, grad_full, CHUNK)
