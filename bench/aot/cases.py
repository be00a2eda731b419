"""Cases of the ahead-of-time report: every kernel, in the shapes and classes of calls that use it.

A module of `operators` yields the cases of an operator. A case builds its launch from tensors on the meta device
through the functions that a call uses, so what is compiled is what runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, dtype, empty

from flmoe_kernels.core.triton.launches import Launch, assume_multiprocessors

OPERATORS = (
    *("pair_moe", "expert_attention", "expert_linear", "encoder_rows", "interaction_moe"),
    *("routed_mlp", "routing"),
)
# Multiprocessors of an A100, an H100 and a B200: persistent kernels start programs on each.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
ARCHITECTURES = tuple(MULTIPROCESSORS)


@dataclass(frozen=True)
class Built:
    """A launch and what the check expects of it.

    least: the least number of matrix instructions in its kernel, in one place for each product and step of a
    chunk; 0 for a kernel without products. tiles: the entry of its launch table in words; table: the bytes of
    shared memory stated there.
    """

    launch: Launch
    least: int = 0
    tiles: str = ""
    table: int | None = None


@dataclass(frozen=True)
class Case:
    """One launch of a kernel. quick: belongs to the set that the tests compile by default."""

    operator: str
    kernel: str
    shape: str
    dtype: str
    variant: str
    build: Callable[[int], Built] = field(compare=False)
    quick: bool = False

    @property
    def name(self) -> str:
        parts = (self.operator, self.kernel, self.shape, self.dtype, self.variant)
        return "/".join(part for part in parts if part)

    def built(self, architecture: int) -> Built:
        with assume_multiprocessors(MULTIPROCESSORS[architecture]):
            return self.build(architecture)


def cases() -> Iterator[Case]:
    for operator in OPERATORS:
        yield from importlib.import_module(f"{__package__}.operators.{operator}").cases()


def stated(shared: tuple[int, ...], architecture: int) -> int:
    """The entry for an architecture of a launch table's shared bytes, which are for sm_80, sm_90 and sm_100."""
    return shared[ARCHITECTURES.index(architecture)]


def meta(shape: tuple[int, ...], kind: dtype) -> Tensor:
    return empty(shape, dtype=kind, device="meta")


def dtype_name(kind: dtype) -> str:
    return str(kind).removeprefix("torch.")
