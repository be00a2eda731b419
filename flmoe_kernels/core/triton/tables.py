"""Launch tables: which configuration a kernel gets on which GPU.

A table has one configuration of each key, which is what runs where nothing else is known, and beside it those
that replace it on an architecture. An operator's table stands in triton/table.py of its package, with the reason
of each choice; docs/launch_tables.md says how they were made.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Configuration = TypeVar("Configuration")

# Those whose limits differ: shared memory of sm_86 and sm_89 is 99 KiB for a block and 100 for an SM, of sm_80 163
# and 164, of sm_90 and sm_100 227 and 228; sm_90 and sm_100 have matrix instructions of their own.
KNOWN = (80, 86, 90, 100)
# sm_12x has neither the matrix instructions nor the shared memory of sm_100, but what sm_89 has of both.
_CONSUMER, _LIKE = 120, 86


@functools.cache
def known(architecture: int | None) -> int | None:
    """The one of KNOWN whose configurations an architecture gets: the nearest that is not newer.

    None, which gets the ones that are for all, where there is none or no GPU.
    """
    if architecture is None:
        return None
    if architecture >= _CONSUMER:
        return _LIKE
    return max((one for one in KNOWN if one <= architecture), default=None)


def architecture_of(device: torch.device) -> int | None:
    """90 for sm_90; None where no GPU tells: in the interpreter, and for tensors without data."""
    if device.type != "cuda":
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Table(dict[Key, Configuration], Generic[Key, Configuration]):
    """Configurations by key, and by architecture those that replace them there.

    Raises:
        ValueError: an architecture that is not in KNOWN.
    """

    def __init__(
        self,
        configurations: Mapping[Key, Configuration],
        replaced: Mapping[int, Mapping[Key, Configuration]] | None = None,
    ) -> None:
        super().__init__(configurations)
        self.replaced = {one: dict(found) for one, found in (replaced or {}).items()}
        unknown = set(self.replaced) - set(KNOWN)
        if unknown:
            raise ValueError(f"architecture: expected some of {KNOWN}, got {sorted(unknown)}")

    def tiles(self, key: Key, architecture: int | None = None, *narrower: Key) -> Configuration:
        """The configuration of a key on sm_`architecture`; of none, the one that is for all.

        narrower: keys of fewer calls, which only architectures have configurations of; the first that is there
        goes before `key`.
        """
        found = self.replaced.get(known(architecture) or 0, {})
        for one in (*narrower, key):
            if one in found:
                return found[one]
        return self[key]

    def replacements(self) -> Iterator[tuple[int, Key, Configuration]]:
        """Every configuration that is one architecture's own."""
        for architecture, found in self.replaced.items():
            for key, configuration in found.items():
                yield architecture, key, configuration
