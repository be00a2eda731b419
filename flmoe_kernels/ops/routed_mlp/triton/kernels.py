"""Triton kernels of routed_mlp: grouped matrix products.

Of R = N K rows, expert e has those from offsets[e] to offsets[e + 1] of the permutation; rows after offsets[E] are
dropped. Offsets are read on the GPU, so grids depend only on shapes. The products over rows are persistent: a
fixed number of programs processes the tiles (expert, block of rows, block of columns) in an order that keeps
weights in L2, see tiles.locate; a second program on the same SM multiplies while the first finishes a tile. Sums
have a fixed order, without atomics.

    forward    hidden_kernel      h = x w_in^T + b_in, and act(h)                2 D F FLOP per row; gated 4 D F
               rows_kernel        weight (act(h) w_out^T + b_out), at n, k       2 D F
               sum_kernel         out[n], over k; not for K = 1
    backward   hidden_gradient    grad of h, weight act(h), parts of the next    2 D F
               choice_gradient    grad of weight
               weight_gradient    grads of w_in and b_in, of w_out and b_out     2 x 2 D F, gated 3 x 2 D F
               rows_kernel        grad of x, at n, k; then sum_kernel            2 D F, gated 4 D F

act(h) is stored in a second buffer instead of being recomputed by the second product, where each of its D / 128
blocks of columns would compute it again. Rows at n, k have x's dtype: half the bytes of float32, but one more
rounding of each of K rows.

Tiles in bfloat16 and float16 are 128 x 128 over 64 at a time, accumulated in float32 and finished in slices of
columns, so that two programs of eight warps share an SM of sm_90 at 128 registers if widths are whole tiles.
Bound on an H100 in bfloat16, an estimate: routed_large by the matrix units, routed_small by memory and launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flmoe_kernels.core.triton.products import dot, slices

from .tiles import (
    RELU,
    activate,
    block_ends,
    columns_of,
    group_range,
    load_places,
    load_rows,
    locate,
    multiply,
)


# hidden (R, F) by row, before activation (for the backward) and after it. The loads gather the rows of x. With a
# gate, gate (R, F) is x w_gate^T + b_gate, and active is act(gate) hidden. Traffic: w_in and w_gate once
# per band of rows, x from L2, two or three outputs. Bound: the matrix units.
@triton.jit(do_not_specialize=("rows",))
def hidden_kernel(
    x,
    w,
    bias,
    w_gate,
    b_gate,
    offsets,
    permutation,
    hidden,
    gate,
    active,
    rows,
    depth,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    OF_EXPERT: tl.constexpr,
    GATE_OF_EXPERT: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ACROSS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    ends = block_ends(offsets, rows, EXPERTS, EXPERTS, ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * ACROSS, tl.num_programs(0)):
        e, down, across = locate(tile, ends, ACROSS)
        first, end = group_range(offsets, e, rows, EXPERTS)
        first += down * ROWS
        at = tl.arange(0, ROWS)
        place, valid = load_places(permutation, first + at, end, rows)
        value = multiply(
            *(x, place // CHOICES, w, w_gate, e, across, depth, None),
            *(D, F, OF_EXPERT, GATE_OF_EXPERT, 1, D, COLUMNS, DEPTH, PRECISION),
        )
        start = first.to(tl.int64) * F
        if w_gate is None:
            parts = slices(value, SLICES)
        else:
            parts, gates = slices(value[0], SLICES), slices(value[1], SLICES)
        for i in tl.static_range(SLICES):
            column, present = columns_of(across * SLICES + i, F, COLUMNS // SLICES)
            value = parts[i]
            if bias is not None:
                own = tl.load(bias + e * F + column, mask=present, other=0.0)
                value += own.to(tl.float32)[None, :]
            to = at[:, None] * F + column[None, :]
            inside = valid[:, None] & present[None, :]
            tl.store(hidden + start + to, value.to(hidden.dtype.element_ty), mask=inside)
            if w_gate is None:
                value, _ = activate(value, ACT)
            else:
                before = gates[i]
                if b_gate is not None:
                    own = tl.load(b_gate + e * F + column, mask=present, other=0.0)
                    before += own.to(tl.float32)[None, :]
                tl.store(gate + start + to, before.to(gate.dtype.element_ty), mask=inside)
                share, _ = activate(before, ACT)
                value *= share
            tl.store(active + start + to, value.to(active.dtype.element_ty), mask=inside)


# out (R, OUTER) by place, from rows `a` (R, INNER) by row: the outputs of rows before they are summed, and the
# gradients of x, which with a gate are sums of two products. Dropped rows are the last group; their tiles multiply
# nothing and store zeros. Traffic: w once per band of rows, a from L2, out once. Bound: the matrix units.
@triton.jit(do_not_specialize=("rows",))
def rows_kernel(
    a,
    w,
    a_gate,
    w_gate,
    bias,
    weight,
    offsets,
    permutation,
    out,
    rows,
    EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    OF_EXPERT: tl.constexpr,
    GATE_OF_EXPERT: tl.constexpr,
    OF_INNER: tl.constexpr,
    OF_OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ACROSS: tl.constexpr = (OUTER + COLUMNS - 1) // COLUMNS
    ends = block_ends(offsets, rows, EXPERTS, EXPERTS + 1, ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * ACROSS, tl.num_programs(0)):
        group, down, across = locate(tile, ends, ACROSS)
        first, end = group_range(offsets, group, rows, EXPERTS)
        row = first + down * ROWS + tl.arange(0, ROWS)
        place, valid = load_places(permutation, row, end, rows)
        # Numbers, because Triton's interpreter rejects masks made of a scalar condition.
        kept_end, width = tl.where(group < EXPERTS, end, 0), tl.where(group < EXPERTS, OUTER, 0)
        e = tl.minimum(group, EXPERTS - 1)
        source, depth = tl.where(valid, row, 0), tl.where(group < EXPERTS, INNER, 0)
        value = multiply(
            *(a, source, w, None, e, across, depth, None, INNER, OUTER, OF_EXPERT, 0),
            *(OF_INNER, OF_OUTER, COLUMNS, DEPTH, PRECISION),
        )
        if w_gate is not None:
            value = multiply(
                *(a_gate, source, w_gate, None, e, across, depth, value, INNER, OUTER),
                *(GATE_OF_EXPERT, 0, OF_INNER, OF_OUTER, COLUMNS, DEPTH, PRECISION),
            )
        if weight is not None:
            share = tl.load(weight + place, mask=valid & (row < kept_end), other=0.0).to(tl.float32)
        to = out + place.to(tl.int64)[:, None] * OUTER
        parts = slices(value, SLICES)
        for i in tl.static_range(SLICES):
            column, present = columns_of(across * SLICES + i, OUTER, COLUMNS // SLICES)
            value = parts[i]
            if bias is not None:
                own = tl.load(bias + e * OUTER + column, mask=column < width, other=0.0)
                value += own.to(tl.float32)[None, :]
            if weight is not None:
                value *= share[:, None]
            inside = valid[:, None] & present[None, :]
            tl.store(to + column[None, :], value.to(out.dtype.element_ty), mask=inside)


# With g = grad_out w_out of a row: grad_hidden = weight g act'(h); active = weight act(h), for the gradient of
# w_out; and dots[row, block of columns] = g . act(h) of these columns, for the gradient of weight. The order of
# the stores frees registers early; the other order spills on sm_90. With a gate, act(gate) hidden is in the place
# of act(h), and both gradients of the hidden layer come from one product. Traffic: w_out once per band of rows,
# grad_out from L2, hidden and gate, two or three outputs. Bound: the matrix units.
@triton.jit(do_not_specialize=("rows",))
def hidden_gradient_kernel(
    grad_out,
    w,
    weight,
    hidden,
    gate,
    offsets,
    permutation,
    grad_hidden,
    grad_gate,
    active,
    dots,
    rows,
    depth,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ACROSS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    ends = block_ends(offsets, rows, EXPERTS, EXPERTS, ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * ACROSS, tl.num_programs(0)):
        e, down, across = locate(tile, ends, ACROSS)
        first, end = group_range(offsets, e, rows, EXPERTS)
        first += down * ROWS
        at = tl.arange(0, ROWS)
        place, valid = load_places(permutation, first + at, end, rows)
        grad = multiply(
            *(grad_out, place // CHOICES, w, None, e, across, depth, None),
            *(D, F, D * F, 0, F, 1, COLUMNS, DEPTH, PRECISION),
        )
        share = tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
        product = tl.zeros((ROWS,), tl.float32)
        start = first.to(tl.int64) * F
        parts = slices(grad, SLICES)
        for i in tl.static_range(SLICES):
            column, present = columns_of(across * SLICES + i, F, COLUMNS // SLICES)
            to = at[:, None] * F + column[None, :]
            inside = valid[:, None] & present[None, :]
            change = parts[i]
            kind = grad_hidden.dtype.element_ty
            if gate is None:
                activated, grad_activated = hidden, grad_hidden
            else:
                activated, grad_activated = gate, grad_gate
            before = tl.load(activated + start + to, mask=inside, other=0.0).to(tl.float32)
            value, slope = activate(before, ACT)
            if gate is not None:
                factor = tl.load(hidden + start + to, mask=inside, other=0.0).to(tl.float32)
                change *= factor
            change *= slope
            if ACT == RELU:
                # As in torch, a NaN does not pass where the activation is 0.
                change = tl.where(slope == 0.0, 0.0, change)
            change *= share[:, None]
            tl.store(grad_activated + start + to, change.to(kind), mask=inside)
            if gate is not None:
                through = parts[i] * value * share[:, None]
                tl.store(grad_hidden + start + to, through.to(kind), mask=inside)
                value *= factor
            each = parts[i] * value
            if F % COLUMNS != 0:
                # Columns after F are sums over zero weights: NaN if the gradient is infinite.
                each = tl.where(present[None, :], each, 0.0)
            product += tl.sum(each, 1)
            value *= share[:, None]
            tl.store(active + start + to, value.to(active.dtype.element_ty), mask=inside)
        line = dots + first.to(tl.int64) * ACROSS + across
        tl.store(line + at * ACROSS, product, mask=valid)


# Gradient of weight[n, k]: the sum of a row's dots, plus grad_out . b_out. Programs process blocks of rows as
# above, including dropped rows, which get zeros. Traffic: grad_out from L2, which is the bound.
@triton.jit(do_not_specialize=("rows",))
def choice_gradient_kernel(
    dots,
    grad_out,
    bias,
    offsets,
    permutation,
    grad_weight,
    rows,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    ends = block_ends(offsets, rows, EXPERTS, EXPERTS + 1, ROWS)
    part = tl.arange(0, triton.next_power_of_2(PARTS))[None, :]
    for tile in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        group, down, _ = locate(tile, ends, 1)
        first, end = group_range(offsets, group, rows, EXPERTS)
        row = first + down * ROWS + tl.arange(0, ROWS)
        place, valid = load_places(permutation, row, end, rows)
        kept = valid & (row < tl.where(group < EXPERTS, end, 0))
        at = row.to(tl.int64)[:, None] * PARTS + part
        own = tl.load(dots + at, mask=kept[:, None] & (part < PARTS), other=0.0)
        total = tl.sum(own, 1)
        if bias is not None:
            e = tl.minimum(group, EXPERTS - 1)
            line = grad_out + (place // CHOICES).to(tl.int64)[:, None] * D
            products = tl.zeros((ROWS, WIDE), tl.float32)
            for block in range(tl.cdiv(D, WIDE)):
                column, present = columns_of(block, D, WIDE)
                inside = kept[:, None] & present[None, :]
                g = tl.load(line + column[None, :], mask=inside, other=0.0).to(tl.float32)
                b = tl.load(bias + e * D + column, mask=present, other=0.0).to(tl.float32)
                # Selected, so that dropped rows stay 0 for any bias.
                products += tl.where(inside, g * b[None, :], 0.0)
            total += tl.sum(products, 1)
        tl.store(grad_weight + place, total.to(grad_weight.dtype.element_ty), mask=valid)


# parts (E, P, splits, Q) = sum over an expert's rows of left^T right, and bias_parts (E, splits, P) = sum of left,
# weighted if there are weights; for one split they are grad and bias. Either may be missing. left and right are by
# row, or gathered from tokens with LEFT_OF and RIGHT_OF rows each; 0 means by row. One program per tile of an
# expert and split, a part of its rows; the last programs sum biases, which waits for memory while the others
# multiply. Experts without rows get zeros.
# Traffic: rows once per tile, from L2, and the gradients. Bound: the matrix units.
@triton.jit(do_not_specialize=("rows", "splits"))
def weight_gradient_kernel(
    left,
    right,
    weight,
    offsets,
    permutation,
    grad,
    bias,
    parts,
    bias_parts,
    rows,
    splits,
    EXPERTS: tl.constexpr,
    LEFT_OF: tl.constexpr,
    RIGHT_OF: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DOWN: tl.constexpr = (P + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (Q + COLUMNS - 1) // COLUMNS
    products = 0 if grad is None else splits * (EXPERTS * DOWN * ACROSS)
    program = tl.program_id(0)
    multiplies = program < products
    across = tl.where(multiplies, program % ACROSS, 0)
    block = tl.where(multiplies, program // ACROSS, program - products)
    down, split, e = block % DOWN, block // DOWN % splits, block // DOWN // splits
    first, end = group_range(offsets, e, rows, EXPERTS)
    part = tl.cdiv(tl.cdiv(end - first, DEPTH), splits) * DEPTH
    first = tl.minimum(first + split * part, end)
    end = tl.minimum(first + part, end)
    at = tl.arange(0, DEPTH)
    p, present = columns_of(down, P, ROWS)
    if multiplies:
        if grad is not None:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for r in range(first, end, DEPTH):
                x = load_rows(left, r + at, end, down, permutation, rows, LEFT_OF, P, ROWS)
                y = load_rows(right, r + at, end, across, permutation, rows, RIGHT_OF, Q, COLUMNS)
                total = dot(tl.trans(x), y, total, PRECISION)
            q, there = columns_of(across, Q, COLUMNS)
            inside = present[:, None] & there[None, :]
            if parts is None or splits == 1:
                to = grad + ((e * P + p).to(tl.int64) * splits + split)[:, None] * Q
                tl.store(to + q[None, :], total.to(grad.dtype.element_ty), mask=inside)
            else:
                line = parts + ((e * P + p).to(tl.int64) * splits + split)[:, None] * Q
                tl.store(line + q[None, :], total, mask=inside)
    elif bias is not None:
        sums = tl.zeros((DEPTH, ROWS), tl.float32)
        for r in range(first, end, DEPTH):
            x = load_rows(left, r + at, end, down, permutation, rows, LEFT_OF, P, ROWS)
            x = x.to(tl.float32)
            if weight is not None:
                place, valid = load_places(permutation, r + at, end, rows)
                x *= tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)[:, None]
            sums += x
        line, value = (e * splits + split).to(tl.int64) * P, tl.sum(sums, 0)
        if bias_parts is None or splits == 1:
            tl.store(bias + line + p, value.to(bias.dtype.element_ty), mask=present)
        else:
            tl.store(bias_parts + line + p, value, mask=present)


# out (lines, WIDTH) = sum over k of parts (lines, COUNT, WIDTH), in the order of k; with COUNT 0, of `splits`
# parts. Traffic: parts and out once, which is the bound.
@triton.jit(do_not_specialize=("lines", "splits"))
def sum_kernel(
    parts,
    out,
    lines,
    splits,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    ACROSS: tl.constexpr = (WIDTH + WIDE - 1) // WIDE
    line = tl.program_id(0) // ACROSS * LINES + tl.arange(0, LINES)
    column, present = columns_of(tl.program_id(0) % ACROSS, WIDTH, WIDE)
    inside = (line < lines)[:, None] & present[None, :]
    line = line.to(tl.int64)[:, None]
    total = tl.zeros((LINES, WIDE), tl.float32)
    count = splits if COUNT == 0 else COUNT
    for k in range(count):
        at = (line * count + k) * WIDTH + column[None, :]
        total += tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    at = line * WIDTH + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
