"""Row-wise Triton kernels between the encoder's matrix products.

Every kernel reads and writes each element once, in vectors of 16 bytes if widths allow, and recomputes dropout
masks from (seed, expert, row, column). Rows are contiguous, (E, views * rows, WIDTH); only the first `count` of
every view are computed, see view_rows.py. Sums over rows are stored in parts, which another kernel adds in an
order that depends only on shapes. A missing argument (no dropout, no gradient, no count) is None, and its code is
not compiled.

All are memory-bound if operands come from memory: while an H100 moves one byte (3.35 TB/s), its 132 SMs issue 8.8
instructions of a thread. The numbers at each kernel are for bfloat16 at mmimdb (198144 rows of 256): the time for
its bytes, and its instructions, counted in the code compiled for sm_90 with dropout. They are predictions, not
measured.
"""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

from .rows_tiles import (
    across,
    begin,
    columns_of,
    drop,
    gelu,
    gelu_slope,
    load_line,
    load_part,
    store_line,
    store_part,
    words_of,
    zeros,
)
from .view_rows import valid_rows


# sum = residual + dropout(update), or without a residual u + dropout(u), u = dropout(update), or without an update
# the residual. Then its layer norm, with the mean and 1 / sqrt(variance + eps) of each row for the backward. One
# program per block of whole rows, which stay in registers between the sums over them: first the mean, then the
# centred squares. Traffic: both inputs and both outputs once, 8 bytes per element in 16 bits; gains and shifts
# from L2, once per block. Bound: bytes, 0.41 GB and 121 us; 28 of 70 possible instructions per element.
@triton.jit(do_not_specialize=("count", "rows"))
def norm_kernel(
    residual,
    update,
    gain,
    shift,
    seed,
    total,
    normed,
    mean,
    rstd,
    count,
    rows,
    views,
    eps,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    problem, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    expert, end = problem // views, valid_rows(count, rows)
    if count is not None and first >= end:
        return
    row = tl.arange(0, ROWS)
    valid = first + row < end
    start = tl.cast(problem, tl.int64) * rows + first
    if update is None:
        base = begin(residual, start, WIDTH)
        x = [load_part(base, row, valid, 0, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    else:
        base = begin(update, start, WIDTH)
        x = [load_part(base, row, valid, 0, w, WIDTH, PART) for w in (0, 1, 2, 3)]
        place = problem % views * rows + first + row
        x = branch(x, seed, place, expert, threshold, kept_scale, residual is None, PART)
        if residual is not None:
            base = begin(residual, start, WIDTH)
            x = [x[w] + load_part(base, row, valid, 0, w, WIDTH, PART) for w in (0, 1, 2, 3)]
        base = begin(total, start, WIDTH)
        for w in tl.static_range(4):
            store_part(base, row, valid, 0, x[w], w, WIDTH, PART)
    middle = across(x) / WIDTH
    x = [centred(x[w], middle, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    spread = tl.rsqrt(across([each * each for each in x]) / WIDTH + eps)
    base = begin(normed, start, WIDTH)
    for w in tl.static_range(4):
        scale = load_line(begin(gain, expert, WIDTH), w, WIDTH, PART)
        offset = load_line(begin(shift, expert, WIDTH), w, WIDTH, PART)
        store_part(
            *(base, row, valid, 0, x[w] * spread[:, None] * scale + offset),
            *(w, WIDTH, PART),
        )
    tl.store(mean + start + row, middle, mask=valid)
    tl.store(rstd + start + row, spread, mask=valid)


@triton.jit
def centred(x, middle, WORD: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Compute x - middle; 0 after the last column."""
    if WIDTH % (4 * PART) == 0:
        return x - middle[:, None]
    else:
        return tl.where((columns_of(0, WORD, PART) < WIDTH)[None, :], x - middle[:, None], 0.0)


@triton.jit
def branch(x, seed, row, expert, threshold, kept_scale, TWICE: tl.constexpr, PART: tl.constexpr):
    """Compute dropout(x), or with TWICE u + dropout(u), u = dropout(x); linear in x, and its own transpose."""
    if seed is not None:
        words = words_of(seed, row, expert, 0, 0, PART)
        x = [drop(x[w], words, threshold, kept_scale, w) for w in (0, 1, 2, 3)]
        if TWICE:
            words = words_of(seed, row, expert, 1, 0, PART)
            x = [x[w] + drop(x[w], words, threshold, kept_scale, w) for w in (0, 1, 2, 3)]
    elif TWICE:
        x = [each + each for each in x]
    return x


# Gradients of the residual and the update, and each program's part of the gradients of gain and shift. With n the
# norm before gain and shift, and g = grad_normed * gain:
#     grad_sum' = grad_sum + rstd (g - mean(g) - n mean(g n)),   grad_gain = sum over rows of grad_normed n.
# One program per chunk of rows of a view; it processes blocks of whole rows and keeps its sums in registers, so it
# has half as many rows at a time as the forward. Rows after the count get zeros. Traffic: three inputs and two
# outputs once, 10 bytes per element in 16 bits; parts (E, chunks, 2, WIDTH) in float32, about 2% of it. Bound:
# bytes, 0.51 GB and 151 us; fewer than 64 of 88 possible instructions per element.
@triton.jit(do_not_specialize=("count", "rows", "chunk"))
def norm_gradient_kernel(
    grad_total,
    grad_normed,
    total,
    mean,
    rstd,
    gain,
    seed,
    grad_residual,
    grad_update,
    parts,
    count,
    rows,
    views,
    chunk,
    threshold,
    kept_scale,
    TWICE: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunks = tl.cdiv(rows, chunk)
    problem, begins = tl.program_id(0) // chunks, tl.program_id(0) % chunks * chunk
    ends, end = tl.minimum(begins + chunk, rows), valid_rows(count, rows)
    norm_gradient_rows(
        *(grad_total, grad_normed, total, mean, rstd, gain, seed, grad_residual, grad_update),
        *(parts, count is not None, problem, begins, ends, end, rows, views, threshold, kept_scale),
        *(TWICE, WIDTH, PART, ROWS),
    )


@triton.jit
def norm_gradient_rows(
    grad_total,
    grad_normed,
    total,
    mean,
    rstd,
    gain,
    seed,
    grad_residual,
    grad_update,
    parts,
    COUNTED: tl.constexpr,
    problem,
    begins,
    ends,
    end,
    rows,
    views,
    threshold,
    kept_scale,
    TWICE: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The kernel above for rows `begins` to `ends` of a problem, of which those before `end` are valid.

    grad_normed may be grad_residual or grad_update, which then replaces it.
    """
    expert = problem // views
    row = tl.arange(0, ROWS)
    line = begin(gain, expert, WIDTH)
    gains = [load_line(line, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    of_gain, of_shift = zeros(ROWS, PART), zeros(ROWS, PART)
    for first in range(begins, tl.minimum(ends, end), ROWS):
        valid = first + row < end
        start = tl.cast(problem, tl.int64) * rows + first
        grad = zeros(ROWS, PART)
        if grad_normed is not None:
            base = begin(grad_normed, start, WIDTH)
            grad = [load_part(base, row, valid, 0, w, WIDTH, PART) for w in (0, 1, 2, 3)]
            base = begin(total, start, WIDTH)
            x = [load_part(base, row, valid, 0, w, WIDTH, PART) for w in (0, 1, 2, 3)]
            middle = tl.load(mean + start + row, mask=valid, other=0.0)
            spread = tl.load(rstd + start + row, mask=valid, other=0.0)
            x = [centred(x[w], middle, w, WIDTH, PART) * spread[:, None] for w in (0, 1, 2, 3)]
            if parts is not None:
                of_gain = [of_gain[w] + grad[w] * x[w] for w in (0, 1, 2, 3)]
                of_shift = [of_shift[w] + grad[w] for w in (0, 1, 2, 3)]
            grad = [grad[w] * gains[w] for w in (0, 1, 2, 3)]
            if WIDTH == 1:
                # Exactly 0: fused multiply-adds leave a rounding error, which rstd multiplies by 1 / sqrt(eps).
                grad = [(grad[w] + x[w]) * 0.0 for w in (0, 1, 2, 3)]
            else:
                level = across(grad) / WIDTH
                slope = across([grad[w] * x[w] for w in (0, 1, 2, 3)]) / WIDTH
                grad = [
                    spread[:, None] * (grad[w] - level[:, None] - x[w] * slope[:, None])
                    for w in (0, 1, 2, 3)
                ]
        if grad_total is not None:
            base = begin(grad_total, start, WIDTH)
            grad = [grad[w] + load_part(base, row, valid, 0, w, WIDTH, PART) for w in (0, 1, 2, 3)]
        # Other threads may still read the rows of grad_normed that the stores replace.
        tl.debug_barrier()
        if grad_residual is not None:
            base = begin(grad_residual, start, WIDTH)
            for w in tl.static_range(4):
                store_part(base, row, valid, 0, grad[w], w, WIDTH, PART)
        if grad_update is not None:
            place = problem % views * rows + first + row
            grad = branch(grad, seed, place, expert, threshold, kept_scale, TWICE, PART)
            base = begin(grad_update, start, WIDTH)
            for w in tl.static_range(4):
                store_part(base, row, valid, 0, grad[w], w, WIDTH, PART)
    if COUNTED:
        for first in range(tl.maximum(begins, end), ends, ROWS):
            start = tl.cast(problem, tl.int64) * rows + first
            rest, nothing = first + row < ends, zeros(ROWS, PART)
            for w in tl.static_range(4):
                if grad_residual is not None:
                    base = begin(grad_residual, start, WIDTH)
                    store_part(base, row, rest, 0, nothing[w], w, WIDTH, PART)
                if grad_update is not None:
                    base = begin(grad_update, start, WIDTH)
                    store_part(base, row, rest, 0, nothing[w], w, WIDTH, PART)
    if parts is not None:
        line = begin(parts, 2 * tl.program_id(0), WIDTH)
        for w in tl.static_range(4):
            store_line(line, 0, tl.sum(of_gain[w], 0), w, WIDTH, PART)
            store_line(line + WIDTH, 0, tl.sum(of_shift[w], 0), w, WIDTH, PART)


# grad_gain and grad_shift from the parts of the kernel above. One program per block of columns of one of the two.
# Bound: latency; the parts are in L2.
@triton.jit(do_not_specialize=("chunks",))
def norm_sum_kernel(
    parts,
    grad_gain,
    grad_shift,
    chunks,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    which, expert = tl.program_id(0) // ACROSS % 2, tl.program_id(0) // ACROSS // 2
    line = tl.arange(0, LINES)
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    base = begin(parts, 2 * tl.cast(expert, tl.int64) * chunks + which, WIDTH)
    for first in range(0, chunks, LINES):
        inside = (first + line < chunks)[:, None] & (column < WIDTH)[None, :]
        at = (first + line)[:, None] * (2 * WIDTH) + column[None, :]
        total += tl.load(base + at, mask=inside, other=0.0)
    values = tl.sum(total, 0)
    at = expert * WIDTH + column
    if grad_gain is not None:
        inside = column < tl.where(which == 0, WIDTH, 0)
        tl.store(grad_gain + at, values.to(grad_gain.dtype.element_ty), mask=inside)
    if grad_shift is not None:
        inside = column < tl.where(which == 1, WIDTH, 0)
        tl.store(grad_shift + at, values.to(grad_shift.dtype.element_ty), mask=inside)


# dropout(GELU(x)), exact. One program per block of rows and columns. Traffic: 4 bytes per element in 16 bits.
# Bound at width 512: bytes, 0.41 GB and 121 us, and almost as much 33 of 35 possible instructions per element.
@triton.jit(do_not_specialize=("count", "rows"))
def gelu_kernel(
    x,
    seed,
    out,
    count,
    rows,
    views,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    problem, first, column = place_of(tl.cdiv(rows, ROWS), WIDTH, PART, ROWS)
    expert, end = problem // views, valid_rows(count, rows)
    if count is not None and first >= end:
        return
    row = tl.arange(0, ROWS)
    valid = first + row < end
    start = tl.cast(problem, tl.int64) * rows + first
    base = begin(x, start, WIDTH)
    values = [load_part(base, row, valid, column, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    values = [gelu(each) for each in values]
    if seed is not None:
        place = problem % views * rows + first + row
        words = words_of(seed, place, expert, 0, column, PART)
        values = [drop(values[w], words, threshold, kept_scale, w) for w in (0, 1, 2, 3)]
    base = begin(out, start, WIDTH)
    for w in tl.static_range(4):
        store_part(base, row, valid, column, values[w], w, WIDTH, PART)


# Its gradient: dropout(grad_out) (cdf(x) + x pdf(x)). As above; 6 bytes per element, 0.61 GB and 182 us, 36 of 53
# possible instructions.
@triton.jit(do_not_specialize=("count", "rows"))
def gelu_gradient_kernel(
    grad_out,
    x,
    seed,
    grad_x,
    count,
    rows,
    views,
    threshold,
    kept_scale,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    problem, first, column = place_of(tl.cdiv(rows, ROWS), WIDTH, PART, ROWS)
    expert, end = problem // views, valid_rows(count, rows)
    if count is not None and first >= end:
        return
    row = tl.arange(0, ROWS)
    valid = first + row < end
    start = tl.cast(problem, tl.int64) * rows + first
    base = begin(grad_out, start, WIDTH)
    grad = [load_part(base, row, valid, column, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    base = begin(x, start, WIDTH)
    values = [load_part(base, row, valid, column, w, WIDTH, PART) for w in (0, 1, 2, 3)]
    if seed is not None:
        place = problem % views * rows + first + row
        words = words_of(seed, place, expert, 0, column, PART)
        grad = [drop(grad[w], words, threshold, kept_scale, w) for w in (0, 1, 2, 3)]
    base = begin(grad_x, start, WIDTH)
    for w in tl.static_range(4):
        store_part(base, row, valid, column, grad[w] * gelu_slope(values[w]), w, WIDTH, PART)


@triton.jit
def place_of(blocks, WIDTH: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
    """Problem, first row and first column of a program: columns run fastest, then `blocks` blocks of rows."""
    ACROSS: tl.constexpr = (WIDTH + 4 * PART - 1) // (4 * PART)
    column, rest = tl.program_id(0) % ACROSS * (4 * PART), tl.program_id(0) // ACROSS
    return rest // blocks, rest % blocks * ROWS, column
