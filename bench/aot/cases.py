"""Cases of the ahead-of-time report: every kernel at its shapes.

Each module of `operators` has the USES of one operator, (use, outputs, quick), and a function `built` for an
output of a use. It builds the launch from tensors on the meta device with the same functions as a real call, so
the compiled kernel is the one that runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, dtype, empty

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import TARGETS, Architecture, assume

OPERATORS = (
    *("pair_moe", "expert_attention", "expert_linear", "encoder_rows", "encoder_fused"),
    *("interaction_moe", "routed_mlp", "routing"),
)
# Those that the launch tables state shared memory of; the report also compiles for the others in TARGETS.
ARCHITECTURES: tuple[Architecture, ...] = (80, 90, 100)


@dataclass(frozen=True)
class Built:
    """A launch and the limits that the check uses.

    least: minimum number of matrix instructions in the kernel: one for each product and each step of a chunk;
    0 for a kernel without products. tiles: description of its entry in the launch table. table: bytes of shared
    memory that this entry states.
    """

    launch: Launch
    least: int = 0
    tiles: str = ""
    table: int | None = None


@dataclass(frozen=True)
class Case:
    """One launch of a kernel. quick: the tests compile this case by default."""

    operator: str
    kernel: str
    shape: str
    dtype: str
    variant: str
    build: Callable[[Architecture], Built] = field(compare=False)
    quick: bool = False

    @property
    def name(self) -> str:
        parts = (self.operator, self.kernel, self.shape, self.dtype, self.variant)
        return "/".join(part for part in parts if part)

    def built(self, architecture: Architecture) -> Built:
        with assume(TARGETS[architecture]):
            return self.build(architecture)


def cases() -> Iterator[Case]:
    for operator in OPERATORS:
        module = importlib.import_module(f"{__package__}.operators.{operator}")
        for use, outputs, quick in module.USES:
            for output in outputs:
                build = partial(module.built, use, output)
                kind = dtype_name(use.dtype)
                yield Case(operator, output, use.shape, kind, use.variant, build, quick)


def stated(shared: tuple[int, ...], architecture: Architecture) -> int | None:
    """Shared bytes for an architecture, from a launch table's entries for ARCHITECTURES; None for others."""
    return dict(zip(ARCHITECTURES, shared, strict=True)).get(architecture)


def meta(shape: tuple[int, ...], kind: dtype) -> Tensor:
    return empty(shape, dtype=kind, device="meta")


def dtype_name(kind: dtype) -> str:
    return str(kind).removeprefix("torch.")
