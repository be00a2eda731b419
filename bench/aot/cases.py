"""The one list of what is compiled ahead of time: every kernel, at the shapes and in the classes that it is used.

An operator's part is in `operators`, and holds a function `cases()`. A case makes its launch from tensors on the
meta device through the same functions that a call takes, so what is compiled here is what runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from torch import Tensor, dtype, empty

from bench.aot.architectures import ARCHITECTURES, Architecture
from bench.aot.costs import Work
from flmoe_kernels.core.triton.launches import Launch, assume_multiprocessors

OPERATORS = (
    *("pair_moe", "expert_attention", "expert_linear", "encoder_rows", "interaction_moe"),
    *("routed_mlp", "routing"),
)
# This module; a request may name another that lists cases.
CASES = "bench.aot.cases"
# Of a case that the quick set leaves out; in one that everything depends on; where one stands for all.
NONE, ALL, ONE = (), (80, 90, 100), (90,)


@dataclass(frozen=True)
class Built:
    """A launch and what it must do.

    least: matrix instructions that its kernel has at least, in one place for each product and step of a chunk.
    tiles: the class of its launch table that it is in, by words; table: the shared bytes that are stated there.
    """

    launch: Launch
    work: Work
    least: int = 0
    tiles: str = ""
    table: int | None = None


@dataclass(frozen=True)
class Case:
    """One launch of a kernel. quick: the architectures that the quick set compiles it for."""

    operator: str
    kernel: str
    shape: str
    dtype: str
    variant: str
    build: Callable[[Architecture], Built] = field(compare=False)
    quick: tuple[int, ...] = ALL

    @property
    def name(self) -> str:
        parts = (self.operator, self.kernel, self.shape, self.dtype, self.variant)
        return "/".join(part for part in parts if part)

    def built(self, architecture: Architecture) -> Built:
        """For a GPU of this architecture: launches depend on its launch table and on how many SMs it has."""
        with assume_multiprocessors(architecture.multiprocessors):
            return self.build(architecture)


def cases() -> Iterator[Case]:
    for operator in OPERATORS:
        yield from importlib.import_module(f"{__package__}.operators.{operator}").cases()


def listed(module: str) -> dict[str, Case]:
    """What `cases()` of a module yields, by name."""
    found: dict[str, Case] = {}
    for case in importlib.import_module(module).cases():
        if case.name in found:
            raise ValueError(f"two cases are named {case.name}")
        found[case.name] = case
    return found


def chosen(
    every: Collection[Case],
    operators: Collection[str] = (),
    shapes: Collection[str] = (),
    dtypes: Collection[str] = (),
) -> list[Case]:
    """Those of these operators, shapes and dtypes; of all where none is named.

    Raises:
        ValueError: there is no case of a name that was given; names those that there are.
    """
    wanted = {"operator": operators, "shape": shapes, "dtype": dtypes}
    for attribute, names in wanted.items():
        known = dict.fromkeys(getattr(case, attribute) for case in every)
        for name in names:
            if name not in known:
                raise ValueError(f"{attribute}: expected one of {', '.join(known)}, got {name!r}")
    return [
        case
        for case in every
        if all(not names or getattr(case, a) in names for a, names in wanted.items())
    ]


def stated(shared: tuple[int, ...], device: Architecture) -> int:
    """Of a launch table's shared bytes on sm_80, sm_90 and sm_100."""
    return shared[list(ARCHITECTURES).index(device.number)]


def meta(shape: tuple[int, ...], kind: dtype) -> Tensor:
    return empty(shape, dtype=kind, device="meta")


def dtype_name(kind: dtype) -> str:
    return str(kind).removeprefix("torch.")
