"""The GPU that kernels are compiled for, if it is not that of the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from flmoe_kernels.core.settings import ScopedSetting

# 90 for sm_90 of NVIDIA, "gfx942" of AMD.
Architecture: TypeAlias = int | str

# Maximum shared memory of a block in KiB: of AMD, of other architectures of NVIDIA.
_SHARED = {80: 163, 90: 227, 100: 227}
_SHARED_OF_AMD, _SHARED_OF_OTHERS = 64, 99


def architecture_name(architecture: Architecture) -> str:
    """sm_90 or gfx942."""
    return architecture if isinstance(architecture, str) else f"sm_{architecture}"


def most_shared(architecture: Architecture) -> int:
    """Maximum shared memory of a block (LDS of a workgroup on AMD) in bytes."""
    if isinstance(architecture, str):
        return 1024 * _SHARED_OF_AMD
    return 1024 * _SHARED.get(architecture, _SHARED_OF_OTHERS)


@dataclass(frozen=True)
class Target:
    """A GPU.

    multiprocessors: persistent kernels run a fixed number of programs on each.
    """

    architecture: Architecture
    multiprocessors: int

    def __str__(self) -> str:
        return f"{architecture_name(self.architecture)} with {self.multiprocessors} multiprocessors"


# An A100, an A10, an L40S, an H100 or H200, a B200 and an RTX 5090; half an MI250 and an MI300X.
TARGETS = {
    target.architecture: target
    for target in (
        *(Target(80, 108), Target(86, 72), Target(89, 142)),
        *(Target(90, 132), Target(100, 148), Target(120, 170)),
        *(Target("gfx90a", 104), Target("gfx942", 304)),
    )
}

_assumed: ScopedSetting[Target | None] = ScopedSetting(None)


def assumed() -> Target | None:
    """The assumed GPU for tensors on the CPU and the meta device; None if no GPU is assumed."""
    return _assumed.get()


@contextmanager
def assume(target: Target) -> Iterator[None]:
    """Within the `with` block, in all threads, tensors that are not on a GPU stand for those of `target`."""
    with _assumed.override(target):
        yield
