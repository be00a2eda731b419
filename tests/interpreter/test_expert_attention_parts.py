"""Tests of device functions of expert_attention's Triton kernels: masks, block places, offsets."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flmoe_kernels.ops.expert_attention import triton as kernels
from flmoe_kernels.ops.expert_attention.triton.tiles import (
    head_of,
    place,
    row_at,
    statistics_of,
)
from tests.support.inputs import cumulative, draw, make_seed


@triton.jit
def place_kernel(cu, slots, out, problems, rows, BLOCK: tl.constexpr):
    slot = tl.load(slots + tl.program_id(0))
    problem, first, length, start, others = place(cu, problems, rows, slot, BLOCK)
    out += tl.program_id(0) * 5
    tl.store(out, problem)
    tl.store(out + 1, first)
    tl.store(out + 2, length)
    tl.store(out + 3, start)
    tl.store(out + 4, others)


def places(cu: Tensor, rows: int, step: int = 1) -> dict[int, list[int]]:
    """Results of every step-th slot of blocks of 16 rows."""
    problems = cu.numel() - 1
    slots = torch.arange(0, rows // 16 + problems + 2, step, dtype=torch.int32)
    out = torch.full((len(slots), 5), -9, dtype=torch.int32)
    place_kernel[(len(slots),)](cu, slots, out, problems, rows, 16)
    return dict(zip(slots.tolist(), out.tolist(), strict=True))


@pytest.mark.parametrize(
    ("lengths", "lead", "tail", "step"),
    [
        ((), 0, 37, 1),
        ((15, 16, 17, 0, 33, 1), 5, 40, 1),
        ((0, 0, 64), 0, 0, 1),
        ((3, 0, 14, 2) * 20, 1, 0, 1),
        ((1, 3) * 2100, 16, 0, 151),
    ],
    ids=lambda x: str(len(x)) if isinstance(x, tuple) else str(x),
)
def test_every_block_has_one_slot(
    lengths: tuple[int, ...], lead: int, tail: int, step: int
) -> None:
    """Holds for all runs, including those for which the search takes two or three steps."""
    first = 0
    expected = {}
    for i, length in enumerate((lead, *lengths, tail)):
        others = length if 0 < i <= len(lengths) else 0
        for block in range(-(-length // 16)):
            slot = first // 16 + i + block
            assert slot not in expected
            expected[slot] = [i - 1, first, length, 16 * block, others]
        first += length
    found = places(cumulative(lengths, lead), first, step)
    busy = {slot: at for slot, at in found.items() if at[3] < at[2]}
    assert busy == {slot: at for slot, at in expected.items() if slot % step == 0}
    assert max(expected, default=0) < first // 16 + len(lengths) + 2


@pytest.mark.parametrize(
    "bounds", [[0, 2, 7], [-1, 2, 6], [0, 4, 2], [0, 2**31 - 1], [-(2**31), 0], [5, 1, 3, 0]]
)
def test_runs_out_of_range_touch_nothing_else(bounds: list[int]) -> None:
    """Such bounds reach the kernels only if values are not checked before, as on a GPU."""
    rows, cu = 6, torch.tensor(bounds, dtype=torch.int32)
    inside = (slice(None), slice(40, 40 + rows))
    wide = [torch.full((1, rows + 80, 2, 4), float("nan")) for _ in range(7)]
    for i, x in enumerate(wide[:4]):
        x[inside] = draw(1, rows, 2, 4, seed=i)
    q, k, v, grad_out, *grads = (x[inside] for x in wide)
    out, lse = kernels.forward(q, k, v, cu, make_seed(), 0.5, 1.0)
    results = out.nan_to_num(), lse.nan_to_num()
    kernels.backward(
        (grads[0], grads[1], grads[2]), grad_out, q, k, v, *results, cu, make_seed(), 0.5, 1.0
    )
    for x in wide[4:]:
        assert x[:, :40].isnan().all()
        assert x[:, 40 + rows :].isnan().all()
    for at in places(cu, rows).values():
        assert at[3] >= at[2] or (at[1] >= 0 and at[1] + at[2] <= rows)


@triton.jit
def offsets_kernel(x, statistics, out, group, rows, heads, head, first):
    """Byte offset in x, element offset in the statistics."""
    base, of_row, _ = x
    pointer, _ = head_of(x, group, rows, head, first)
    tl.store(out, pointer.to(tl.int64) - base.to(tl.int64))
    tl.store(out + 1, row_at(base, first, of_row).to(tl.int64) - base.to(tl.int64))
    at = statistics + statistics_of(group, rows, first, heads, head)
    tl.store(out + 2, at.to(tl.int64) - statistics.to(tl.int64))


@pytest.mark.parametrize(
    ("group", "rows", "heads", "head", "first"),
    [
        (7, 2**30 + 16, 2**28, 5, 2**20 + 3),
        (7, 2**20, 2**4, 5, 2**20 + 3),
        (0, 2**24, 2**9, 3, 2**23 + 1),
        (0, 2**10, 2**29, 11, 1),
        (2, 2**30, 1, 0, 0),
    ],
)
def test_offsets_pass_32_bits(group: int, rows: int, heads: int, head: int, first: int) -> None:
    """Each term of an offset exceeds 32 bits alone, and all together; no memory is read at the offsets."""
    of_row, of_head = 2**14, heads
    out = torch.zeros(3, dtype=torch.int64)
    x = (torch.zeros(1, dtype=torch.bfloat16), of_row, of_head)
    lse = torch.zeros(1, dtype=torch.int8)
    offsets_kernel[(1,)](x, lse, out, group, rows, heads, head, first)
    assert out.tolist() == [
        2 * ((group * rows + first) * of_row + head * of_head),
        2 * first * of_row,
        (group * rows + first) * heads + head,
    ]
