"""The GPU that kernels are compiled for, if it is not that of the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flmoe_kernels.core.settings import ScopedSetting


@dataclass(frozen=True)
class Target:
    """An NVIDIA GPU.

    architecture: 90 for sm_90. multiprocessors: persistent kernels run a fixed number of programs on each.
    """

    architecture: int
    multiprocessors: int

    def __str__(self) -> str:
        return f"sm_{self.architecture} with {self.multiprocessors} multiprocessors"


# An A100, an A10, an L40S, an H100 or H200, a B200 and an RTX 5090.
TARGETS = {
    target.architecture: target
    for target in (
        *(Target(80, 108), Target(86, 72), Target(89, 142)),
        *(Target(90, 132), Target(100, 148), Target(120, 170)),
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
