"""Launch tables: configurations of kernels by class of call and architecture.

A table has one default configuration for each key, and replacements for some keys and architectures. The table of
an operator is in its triton/table.py with the reasons for the choices; docs/launch_tables.md explains the method.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from .target import Architecture, assumed

Key = TypeVar("Key", bound=Hashable)
Configuration = TypeVar("Configuration")

# Architectures whose limits differ. Shared memory of a block and of an SM: 163 and 164 KiB on sm_80, 99 and 100 on
# sm_86 and sm_89, 227 and 228 on sm_90 and sm_100; sm_90 and sm_100 have their own matrix instructions.
# AMD: all GPUs whose names start with gfx, with 64 KiB; GPUs with more memory do not use it.
AMD = "gfx"
KNOWN = (80, 86, 90, 100, AMD)
# sm_12x has the shared memory and the matrix instructions of sm_89, not those of sm_100.
_CONSUMER, _LIKE = 120, 86


@functools.cache
def known(architecture: Architecture | None) -> Architecture | None:
    """The architecture in KNOWN whose configurations are used: AMD, or the nearest of NVIDIA that is not newer.

    None (default configurations) if there is no such architecture or no GPU.
    """
    if architecture is None:
        return None
    if isinstance(architecture, str):
        return AMD
    if architecture >= _CONSUMER:
        return _LIKE
    return max((x for x in KNOWN if isinstance(x, int) and x <= architecture), default=None)


_ASSUMED: ContextVar[Architecture | None] = ContextVar("architecture", default=None)


@contextmanager
def assume_architecture(architecture: Architecture | None) -> Iterator[None]:
    """Within the `with` block, tensors on the meta device stand for those of a GPU of this architecture."""
    token = _ASSUMED.set(architecture)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def architecture_of(device: torch.device) -> Architecture | None:
    """Architecture of a device; None in the interpreter and for the meta device, unless a GPU is assumed."""
    if device.type != "cuda":
        if device.type == "meta" and (architecture := _ASSUMED.get()) is not None:
            return architecture
        target = assumed()
        return None if target is None else target.architecture
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(device: int) -> Architecture:
    if torch.version.hip:
        # gfx942:sramecc+:xnack-. Its compute capability would be 9.4, as if it were newer than sm_90.
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def blocks_of(length: int, block: int) -> int:
    """The number of blocks that cover a length."""
    return -(-length // block)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def chunk_of(width: int, most: int) -> int:
    """Chunk size for reading or writing a width, at least 16 because of matrix products."""
    return min(most, max(16, power_of_two(width)))


@dataclass(frozen=True)
class RowTiles:
    """Tiles of a row-wise kernel: elements of a tensor held per program, maximum columns, warps, maximum rows.

    shared: maximum bytes per block on sm_80, sm_90 and sm_100 in the cases of the ahead-of-time report, with
    Triton 3.7.1.
    """

    elements: int
    columns: int
    warps: int
    shared: int
    rows: int = 1 << 20

    def shape(self, columns: int) -> tuple[int, int]:
        """Rows and columns per program, powers of two; the number of rows that exist does not matter, so that no
        kernel is compiled for it."""
        chunk = min(power_of_two(columns), self.columns)
        return min(self.rows, max(1, self.elements // chunk)), chunk


class Table(dict[Key, Configuration], Generic[Key, Configuration]):
    """Default configurations by key, and replacements by architecture.

    Raises:
        ValueError: an architecture is not in KNOWN.
    """

    def __init__(
        self,
        configurations: Mapping[Key, Configuration],
        replaced: Mapping[Architecture, Mapping[Key, Configuration]] | None = None,
    ) -> None:
        super().__init__(configurations)
        self.replaced = {number: dict(entries) for number, entries in (replaced or {}).items()}
        unknown = set(self.replaced) - set(KNOWN)
        if unknown:
            raise ValueError(f"architecture: expected some of {KNOWN}, got {sorted(unknown)}")

    def tiles(
        self, key: Key, architecture: Architecture | None = None, *narrower: Key
    ) -> Configuration:
        """The configuration of a key on an architecture; for None, the default configuration.

        narrower: more specific keys, which only have entries for some architectures; the first with an entry is
        used instead of `key`.
        """
        entries = self.replaced.get(known(architecture) or 0, {})
        for candidate in (*narrower, key):
            if candidate in entries:
                return entries[candidate]
        return self[key]

    def replacements(self) -> Iterator[tuple[Architecture, Key, Configuration]]:
        """Architecture, key and configuration of every replacement."""
        for architecture, entries in self.replaced.items():
            for key, configuration in entries.items():
                yield architecture, key, configuration
