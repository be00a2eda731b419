"""Triton kernels of the reweighting: pooled inputs, mixture of logits.

Sums are float32 and stay within a program.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

# The floor of torch.nn.functional.normalize.
NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def span_of(lengths, modality):
    """First token and number of tokens of a modality in the concatenated tokens; lengths: 2 n + 3 for n tokens."""
    first, length = 0, lengths[0] // 2 - 1
    for m in tl.static_range(1, len(lengths)):
        first += tl.where(modality >= m, lengths[m - 1] // 2 - 1, 0)
        length = tl.where(modality == m, lengths[m] // 2 - 1, length)
    return first, length


@triton.jit
def valid_tokens(mask, place, inside):
    """The valid tokens of a block; mask None: all that are `inside`."""
    # An early return does not work: the compiler would still compile the load from None.
    return inside if mask is None else tl.load(mask + place, mask=inside, other=False)


# Means of each modality's valid tokens, with length 1 if the modality is normalised. A program has one sample
# and modality and all columns. Traffic: tokens once; bytes are the bound, 8.5 MB in bfloat16 at
# mmimdb.
@triton.jit(do_not_specialize=("total",))
def features_kernel(
    tokens,
    mask,
    features,
    statistics,
    lengths,
    normalized,
    total,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    modalities: tl.constexpr = len(lengths)
    sample, modality = tl.program_id(0) // modalities, tl.program_id(0) % modalities
    first, length = span_of(lengths, modality)
    place = tl.cast(sample, tl.int64) * total + first
    column = tl.arange(0, CHUNK)
    sums = tl.zeros((TOKENS, CHUNK), tl.float32)
    counts = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        valid = valid_tokens(mask, place + token, token < length)
        counts += tl.where(valid, 1.0, 0.0)
        at = (place + token)[:, None] * WIDTH + column[None, :]
        present = valid[:, None] & (column < WIDTH)[None, :]
        sums += tl.load(tokens + at, mask=present, other=0.0).to(tl.float32)
    scale = 1.0 / tl.maximum(tl.sum(counts, 0), 1.0)
    mean = tl.sum(sums, 0) * scale
    wanted = ((normalized >> modality) & 1) == 1
    size = tl.sqrt(tl.sum(mean * mean, 0))
    # The length is a constant below its floor, and without normalisation.
    free = tl.where(wanted & (size >= NORM_FLOOR), 1.0, 0.0)
    size = tl.where(size < NORM_FLOOR, NORM_FLOOR, size)
    size = tl.where(wanted, size, 1.0)
    row = tl.cast(tl.program_id(0), tl.int64)
    tl.store(
        features + row * WIDTH + column,
        (mean / size).to(features.dtype.element_ty),
        mask=column < WIDTH,
    )
    # The factor for the backward, and whether the length depends on the mean.
    tl.store(statistics + row * 2, scale / size)
    tl.store(statistics + row * 2 + 1, free)


# The gradient of each token: that of its modality's mean, 0 where it is padded. A program has a block of tokens of
# one sample and modality and all columns. Traffic: the gradient of the tokens once; bytes are the bound.
@triton.jit(do_not_specialize=("total", "slots"))
def features_gradient_kernel(
    grad_features,
    features,
    statistics,
    mask,
    grad_tokens,
    lengths,
    total,
    slots,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    modalities: tl.constexpr = len(lengths)
    slot, group = tl.program_id(0) % slots, tl.program_id(0) // slots
    sample, modality = group // modalities, group % modalities
    first, length = span_of(lengths, modality)
    row = tl.cast(group, tl.int64)
    column = tl.arange(0, CHUNK)
    inside = column < WIDTH
    grad = tl.load(grad_features + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    unit = tl.load(features + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale, free = tl.load(statistics + row * 2), tl.load(statistics + row * 2 + 1)
    grad = scale * (grad - free * tl.sum(grad * unit, 0) * unit)
    token = slot * TOKENS + tl.arange(0, TOKENS)
    place = tl.cast(sample, tl.int64) * total + first + token
    valid = valid_tokens(mask, place, token < length)
    values = tl.where(valid[:, None], grad[None, :], 0.0)
    tl.store(
        grad_tokens + place[:, None] * WIDTH + column[None, :],
        values.to(grad_tokens.dtype.element_ty),
        mask=(token < length)[:, None] & inside[None, :],
    )


@triton.jit
def expert_column(x, lane, expert):
    """Column x[:, expert] of a tile (rows, lanes)."""
    return tl.sum(tl.where((lane == expert)[None, :], x, 0.0), 1)


@triton.jit
def logits_at(logits, of_expert, expert, row, column, classes):
    offsets = tl.cast(expert, tl.int64) * of_expert + row[:, None] * classes + column[None, :]
    return logits + offsets


# weights = softmax(scores / temperature) over experts, mixed = sum_e weights_e * logits_e. A program has a block
# of samples. Traffic: everything once; a few KiB, latency-bound, hence a single launch.
@triton.jit(do_not_specialize=("batch", "of_expert"))
def mix_kernel(
    scores,
    logits,
    weights,
    mixed,
    batch,
    classes,
    of_expert,
    temperature,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    valid, used = row < batch, lane < EXPERTS
    at = row[:, None] * EXPERTS + lane[None, :]
    of_weights = valid[:, None] & used[None, :]
    value = tl.load(scores + at, mask=of_weights, other=0.0).to(tl.float32) / temperature
    value = tl.where(used[None, :], value, -float("inf"))
    share = tl.exp(value - tl.max(value, 1)[:, None])
    share = share / tl.sum(share, 1)[:, None]
    tl.store(weights + at, share.to(weights.dtype.element_ty), mask=of_weights)
    for start in range(0, classes, CHUNK):
        column = start + tl.arange(0, CHUNK)
        present = valid[:, None] & (column < classes)[None, :]
        total = tl.zeros((ROWS, CHUNK), tl.float32)
        for expert in range(EXPERTS):
            pointers = logits_at(logits, of_expert, expert, row, column, classes)
            part = tl.load(pointers, mask=present, other=0.0).to(tl.float32)
            total += expert_column(share, lane, expert)[:, None] * part
        pointers = mixed + row[:, None] * classes + column[None, :]
        tl.store(pointers, total.to(mixed.dtype.element_ty), mask=present)


# With g = grad_mixed and d_e = grad_weights_e + g . logits_e:  grad_logits_e = weights_e g,
# grad_scores_e = weights_e (d_e - sum_f weights_f d_f) / temperature. A program has a block of samples;
# latency-bound.
@triton.jit(do_not_specialize=("batch", "of_expert"))
def mix_gradient_kernel(
    grad_weights,
    grad_mixed,
    weights,
    logits,
    grad_scores,
    grad_logits,
    batch,
    classes,
    of_expert,
    temperature,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    valid, used = row < batch, lane < EXPERTS
    at = row[:, None] * EXPERTS + lane[None, :]
    of_weights = valid[:, None] & used[None, :]
    share = tl.load(weights + at, mask=of_weights, other=0.0).to(tl.float32)
    inner = tl.zeros((ROWS, LANES), tl.float32)
    if grad_weights is not None:
        inner += tl.load(grad_weights + at, mask=of_weights, other=0.0).to(tl.float32)
    for start in range(0, classes, CHUNK):
        column = start + tl.arange(0, CHUNK)
        present = valid[:, None] & (column < classes)[None, :]
        grad = tl.zeros((ROWS, CHUNK), tl.float32)
        if grad_mixed is not None:
            pointers = grad_mixed + row[:, None] * classes + column[None, :]
            grad += tl.load(pointers, mask=present, other=0.0).to(tl.float32)
        for expert in range(EXPERTS):
            pointers = logits_at(logits, of_expert, expert, row, column, classes)
            part = tl.load(pointers, mask=present, other=0.0).to(tl.float32)
            # The selections keep products from being fused with sums of other lanes, which round differently.
            dots = tl.sum(tl.where(present, grad * part, 0.0), 1)
            inner += tl.where((lane == expert)[None, :], dots[:, None], 0.0)
            if grad_logits is not None:
                values = expert_column(share, lane, expert)[:, None] * grad
                of_grad = tl.cast(batch, tl.int64) * classes
                pointers = logits_at(grad_logits, of_grad, expert, row, column, classes)
                tl.store(pointers, values.to(grad_logits.dtype.element_ty), mask=present)
    if grad_scores is not None:
        together = tl.sum(tl.where(of_weights, share * inner, 0.0), 1)
        values = share * (inner - together[:, None]) / temperature
        tl.store(grad_scores + at, values.to(grad_scores.dtype.element_ty), mask=of_weights)
