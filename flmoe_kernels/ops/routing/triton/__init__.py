"""Routing through Triton: allocations and launches.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it. Reading the values of an index would wait, so a row out of range counts as dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous, expect
from flmoe_kernels.core.triton.launches import Launch, run
from flmoe_kernels.core.triton.tables import blocks_of, power_of_two

from .kernels import count_kernel, gate_kernel, limit_kernel, place_kernel, scan_kernel

__all__ = ["dispatch", "gate", "limit"]
# Places are int32, and so are the kernels' sums of a few more of them.
_MOST_ROWS = 2**30
# Rows counted per program, and logits or flags of (row, group) held at a time.
BLOCK, _HELD = 512, 4096
# Blocks and groups that a program of the scan holds at a time.
_SCAN = (64, 16)


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
    index = logits.new_empty((tokens, top_k), dtype=torch.int64)
    weight = logits.new_empty((tokens, top_k))
    each = min(128, max(1, _HELD // power_of_two(experts)))
    arguments = {"logits": logits.contiguous(), "index": index, "weight": weight, "tokens": tokens}
    constants = {"EXPERTS": experts, "TOP_K": top_k, "OVER_ALL": over_all, "TOKENS": each}
    run([_launch(gate_kernel, blocks_of(tokens, each), arguments, constants)], logits.device)
    return index, weight


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    _check_rows(index)
    expect("mask", mask, index.shape[:1], torch.bool, index.device)
    index, mask = index.contiguous(), contiguous(mask)
    kept = torch.empty_like(index)
    # Without counts `before`, the number of rows per expert is not limited.
    before: Tensor | None = None
    found: list[Launch] = []
    if capacity is not None:
        before, _, found = _counts(index, mask, experts)
    arguments: dict[str, Any] = {"index": index, "mask": mask, "before": before, "kept": kept}
    arguments |= {"rows": index.numel(), "capacity": min(index.numel(), capacity or 0)}
    constants = {**_steps(experts), "CHOICES": index.shape[-1]}
    found.append(_launch(limit_kernel, blocks_of(index.numel(), BLOCK), arguments, constants))
    run(found, index.device)
    return kept


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(index)
    index = index.contiguous()
    sizes = (experts, experts + 1, index.numel())
    if not index.numel():
        counts, offsets, permutation = (index.new_zeros((n,), dtype=torch.int32) for n in sizes)
        return counts, offsets, permutation
    counts, offsets, permutation = (index.new_empty((n,), dtype=torch.int32) for n in sizes)
    before, totals, found = _counts(index, None, experts)
    arguments: dict[str, Any] = {
        "index": index,
        "before": before,
        "totals": totals,
        "rows": index.numel(),
    }
    arguments |= {"counts": counts, "offsets": offsets, "permutation": permutation}
    blocks = blocks_of(index.numel(), BLOCK)
    found.append(_launch(place_kernel, blocks, arguments, _steps(experts)))
    run(found, index.device)
    return counts, offsets, permutation


def _counts(
    index: Tensor, mask: Tensor | None, experts: int
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Each group's rows in the blocks before (blocks, E + 1), totals (E + 1), and the launches that count them."""
    blocks, (high, wide) = blocks_of(index.numel(), BLOCK), _SCAN
    before = index.new_empty((blocks, experts + 1), dtype=torch.int32)
    totals = index.new_empty((experts + 1,), dtype=torch.int32)
    counted: dict[str, Any] = {
        "index": index,
        "mask": mask,
        "counts": before,
        "rows": index.numel(),
    }
    choices = {**_steps(experts), "CHOICES": index.shape[-1]}
    scanned = {"counts": before, "totals": totals, "blocks": blocks}
    sizes = {"EXPERTS": experts, "BLOCKS": high, "WIDE": wide}
    launches = [
        _launch(count_kernel, blocks, counted, choices),
        _launch(scan_kernel, blocks_of(experts + 1, wide), scanned, sizes),
    ]
    return before, totals, launches


def _steps(experts: int) -> dict[str, Any]:
    step = min(BLOCK, max(8, _HELD // power_of_two(experts + 1)))
    return {"EXPERTS": experts, "BLOCK": BLOCK, "STEP": step}


def _launch(
    kernel: Any, programs: int, arguments: dict[str, Any], constants: dict[str, Any]
) -> Launch:
    return Launch(kernel, programs, arguments, constants, warps=4, stages=2)


def _check_rows(index: Tensor) -> None:
    expect("index", index, index.shape, torch.int64, index.device)
    if index.numel() > _MOST_ROWS:
        raise ValueError(f"index: expected up to 2^30 rows N * K, got {index.numel()}")
