"""Memory of freed CPU tensors, kept for the next ones.

The C library returns blocks of more than 32 MiB to the system when they are freed, and the system clears the pages
that it hands out again. Where activations are that large, clearing took a quarter of a training step.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # smaller blocks are kept by the C library
_IDLE = 1024  # requests after which an unused block is returned
_SLACK = 1.25  # kept bytes relative to the largest number of bytes that were in use at once


@dataclass(slots=True, eq=False)
class _Block:
    storage: torch.UntypedStorage
    address: int
    last: int  # number of the request that took the block

    def unused(self) -> bool:
        # The storage's Python object counts as one user, however many references it has.
        alone = self.references() == _REFERENCES
        return alone and torch._C._storage_Use_Count(self.storage._cdata) == 1

    def references(self) -> int:
        return sys.getrefcount(self.storage)

    def intact(self, size: int) -> bool:
        """Whether nobody resized the storage or moved it to shared memory, which another process may read."""
        return self.storage.data_ptr() == self.address and self.storage.nbytes() == size


_REFERENCES = _Block(torch.UntypedStorage(0), 0, 0).references()  # if nobody else has one


class Blocks:
    """Blocks that were given out; one is given out again when no tensor uses it any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[_Block]] = {}
        self._requests = 0
        self._most = 0  # bytes in use at once since the last sweep

    def take(self, size: int) -> tuple[torch.UntypedStorage, bool]:
        """A storage of at least `size` bytes, and whether it is new."""
        # Eight sizes for each power of two, because the number of valid tokens differs from batch to batch.
        step = 1 << max(size.bit_length() - 4, 0)
        size = -(-size // step) * step
        with self._lock:
            self._requests += 1
            if self._requests % _IDLE == 0:
                self._most = 0
                self._drop(lambda block: self._requests - block.last > _IDLE)
            blocks = self._blocks.setdefault(size, [])
            for block in blocks:
                if block.unused() and block.intact(size):
                    block.last = self._requests
                    return block.storage, False
            self._make_room(size)
            storage = torch.UntypedStorage(size)
            self._blocks.setdefault(size, []).append(
                _Block(storage, storage.data_ptr(), self._requests)
            )
            return storage, True

    def unlock(self) -> None:
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Return the blocks that no tensor uses."""
        with self._lock:
            self._drop(lambda block: True)

    def _drop(self, chosen: Callable[[_Block], bool]) -> None:
        """Forget changed blocks, and of the unused ones those that are chosen."""
        for size, blocks in list(self._blocks.items()):
            kept = [
                block
                for block in blocks
                if block.intact(size) and not (block.unused() and chosen(block))
            ]
            if kept:
                self._blocks[size] = kept
            else:
                del self._blocks[size]

    def _make_room(self, size: int) -> None:
        """Return the least recently used blocks if there are more bytes than were ever in use at once."""
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
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype), False
    storage, new = _BLOCKS.take(size)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), ()), new


def empty_cache() -> None:
    """Return the memory that the CPU kernels keep for their next call, as torch.cuda.empty_cache does on a GPU.

    The kernels keep the blocks of freed tensors of 1 MiB or more, at most 1.25 times what a call needed at once.
    """
    _BLOCKS.clear()
