"""Launches of routing's Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import blocks_of, power_of_two

from .kernels import count_kernel, gate_kernel, limit_kernel, place_kernel, scan_kernel

# Rows counted per program, and logits or flags of (row, group) held at a time.
BLOCK, _HELD = 512, 4096
# Blocks and groups that a program of the scan holds at a time.
_SCAN = (64, 16)
_WARPS, _STAGES = 4, 2


def gate_launch(logits: Tensor, index: Tensor, weight: Tensor, over_all: bool) -> Launch:
    tokens, experts = logits.shape
    each = min(128, max(1, _HELD // power_of_two(experts)))
    return Launch(
        gate_kernel,
        blocks_of(tokens, each),
        {"logits": logits, "index": index, "weight": weight, "tokens": tokens},
        {"EXPERTS": experts, "TOP_K": index.shape[1], "OVER_ALL": over_all, "TOKENS": each},
        _WARPS,
        _STAGES,
    )


def count_blocks(index: Tensor) -> int:
    return blocks_of(index.numel(), BLOCK)


def _steps(experts: int) -> dict[str, Any]:
    step = min(BLOCK, max(8, _HELD // power_of_two(experts + 1)))
    return {"EXPERTS": experts, "BLOCK": BLOCK, "STEP": step}


def count_launches(
    index: Tensor, mask: Tensor | None, counts: Tensor, totals: Tensor
) -> list[Launch]:
    """Launches of counts (count_blocks, E + 1), each group's rows in the blocks before; totals (E + 1)."""
    blocks, groups = counts.shape
    high, wide = _SCAN
    return [
        Launch(
            count_kernel,
            blocks,
            {"index": index, "mask": mask, "counts": counts, "rows": index.numel()},
            {**_steps(groups - 1), "CHOICES": index.shape[-1]},
            _WARPS,
            _STAGES,
        ),
        Launch(
            scan_kernel,
            blocks_of(groups, wide),
            {"counts": counts, "totals": totals, "blocks": blocks},
            {"EXPERTS": groups - 1, "BLOCKS": high, "WIDE": wide},
            _WARPS,
            _STAGES,
        ),
    ]


def place_launch(
    index: Tensor,
    before: Tensor,
    totals: Tensor,
    counts: Tensor,
    offsets: Tensor,
    permutation: Tensor,
) -> Launch:
    arguments = {"index": index, "before": before, "totals": totals, "counts": counts}
    arguments |= {"offsets": offsets, "permutation": permutation}
    return Launch(
        place_kernel,
        count_blocks(index),
        {**arguments, "rows": index.numel()},
        _steps(counts.numel()),
        _WARPS,
        _STAGES,
    )


def limit_launch(
    index: Tensor,
    mask: Tensor | None,
    before: Tensor | None,
    kept: Tensor,
    experts: int,
    capacity: int,
) -> Launch:
    """Launch of limit; without counts `before`, the number of rows per expert is not limited."""
    return Launch(
        limit_kernel,
        count_blocks(index),
        {
            **{"index": index, "mask": mask, "before": before, "kept": kept},
            **{"rows": index.numel(), "capacity": capacity},
        },
        {**_steps(experts), "CHOICES": index.shape[-1]},
        _WARPS,
        _STAGES,
    )
