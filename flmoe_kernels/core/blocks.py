"""Memory of freed CPU tensors, kept for the next ones.

The C library returns blocks of more than 32 MiB to the system when they are freed, and the system clears the pages
that it hands out again. Where activations are that large, clearing took a quarter of a training step.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # smaller blocks are kept by the C library
_IDLE = (
    1024  # requests between sweeps, which release the blocks that were not used since the last one
)
_SLACK = 1.25  # kept bytes relative to the largest number of bytes that were in use at once


@dataclass(slots=True, eq=False)
class _Block:
    storage: torch.UntypedStorage  # tensors use slices of it, which hold a reference each
    last: int  # number of the request that took the block

    def unused(self) -> bool:
        return torch._C._storage_Use_Count(self.storage._cdata) == 1


class Blocks:
    """Blocks that were given out; one is given out again when no tensor uses it any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[_Block]] = {}
        self._requests = 0
        self._most = 0  # bytes in use at once since the last sweep

    def take(self, size: int) -> tuple[torch.UntypedStorage, bool] | None:
        """A storage of `size` bytes, and whether its pages are new; None while another call is at work."""
        # A signal handler may interrupt this function and call it again.
        if not self._lock.acquire(blocking=False):
            return None
        try:
            block, new = self._block(size)
            # A storage of its own: a change of the tensor's storage, or sharing it, does not concern the block.
            return block.storage[:size], new
        finally:
            self._lock.release()

    def _block(self, size: int) -> tuple[_Block, bool]:
        # Eight sizes for each power of two, because the number of valid tokens differs from batch to batch.
        step = 1 << max(size.bit_length() - 4, 0)
        size = -(-size // step) * step
        self._requests += 1
        if self._requests % _IDLE == 0:
            self._most = 0
            self._drop(lambda block: self._requests - block.last > _IDLE)
        for block in self._blocks.get(size, ()):
            if block.unused():
                block.last = self._requests
                return block, False
        self._make_room(size)
        block = _Block(torch.UntypedStorage(size, device="cpu"), self._requests)
        self._blocks.setdefault(size, []).append(block)
        return block, True

    def unlock(self) -> None:
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Release the blocks that no tensor uses."""
        with self._lock:
            self._drop(lambda block: True)

    def _drop(self, chosen: Callable[[_Block], bool]) -> None:
        """Release the unused blocks that are chosen."""
        for size, blocks in list(self._blocks.items()):
            kept = [block for block in blocks if not (block.unused() and chosen(block))]
            if kept:
                self._blocks[size] = kept
            else:
                del self._blocks[size]

    def _make_room(self, size: int) -> None:
        """Release least recently used blocks until at most _SLACK times the peak since the last sweep is kept."""
        unused = []
        used = size
        for each, blocks in self._blocks.items():
            free = [block for block in blocks if block.unused()]
            unused += [(block.last, each, block) for block in free]
            used += each * (len(blocks) - len(free))
        self._most = max(self._most, used)
        room = int(_SLACK * self._most) - used
        surplus = set()
        for _, each, block in sorted(unused, key=lambda item: -item[0]):
            room -= each
            if room < 0:
                surplus.add(block)
        if surplus:
            self._drop(surplus.__contains__)


_BLOCKS = Blocks()
if hasattr(os, "register_at_fork"):
    # Another thread may hold the lock at the fork.
    os.register_at_fork(after_in_child=_BLOCKS.unlock)


def empty(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """An uninitialised contiguous CPU tensor, and whether its pages are new."""
    size = math.prod(shape) * dtype.itemsize
    found = _BLOCKS.take(size) if size >= LEAST_BYTES else None
    if found is None:
        return torch.empty(shape, dtype=dtype, device="cpu"), False
    storage, new = found
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, tuple(shape), ()), new


def empty_cache() -> None:
    """Release the memory that the CPU kernels keep for their next call, as torch.cuda.empty_cache does on a GPU.

    The kernels keep the blocks of freed tensors of 1 MiB or more, at most 1.25 times the peak in use.
    """
    _BLOCKS.clear()
