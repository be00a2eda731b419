"""Tests of the order of packed rows where the number of valid tokens is not read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels.layers.interaction_moe.packing import plan_tokens
from tests.support.inputs import draw_masks

CPU = torch.device("cpu")
LENGTHS = (5, 3, 4)


def masks_of(pattern: str, batch: int) -> list[Tensor | None] | None:
    if pattern == "padded":
        return [torch.zeros(batch, length, dtype=torch.bool) for length in LENGTHS]
    masks = draw_masks(pattern, 8, LENGTHS)
    return masks and [None if mask is None else mask[:batch] for mask in masks]


@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("pattern", ["partial", "padded_sample", "padded", "mixed"])
def test_valid_rows_come_first(pattern: str, batch: int) -> None:
    """The plan has the rows of a compact plan, in the same order, and then the other tokens in order."""
    masks = masks_of(pattern, batch)
    plan, compact = (
        plan_tokens(batch, LENGTHS, masks, CPU, reads=reads) for reads in (False, True)
    )
    assert (plan.compact, compact.compact) == (False, True)
    for name in ("cu_samples", "cu_segments"):
        assert torch.equal(getattr(plan, name), getattr(compact, name)), name
    count = int(plan.cu_samples[-1])
    for name in ("index", "position", "modality"):
        assert torch.equal(getattr(plan, name)[:count], getattr(compact, name)), name
    assert torch.equal(plan.index[count:], (~plan.valid).flatten().nonzero().flatten())
    assert plan.rows == batch * sum(LENGTHS)
