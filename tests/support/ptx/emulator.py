"""Emulated launches: backend "triton" runs compiled kernels on CPU tensors, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from flmoe_kernels.core.triton import plans
from tests.support.triton_driver import compiled_to_ptx

from .arithmetic import Array
from .machine import run
from .memory import Findings, GlobalMemory, Owners, region_of
from .program import Program


@contextmanager
def emulated(
    architecture: int = 80, damage: Callable[[str], str] | None = None
) -> Iterator[Findings]:
    """Within the `with` block, kernels are compiled for sm_`architecture` and their PTX is executed.

    Args:
        architecture: its launch tables are used; instructions that only sm_90 and later have are refused.
        damage: a change of every kernel's PTX.

    Yields:
        The findings so far: mistakes that the kernels made.
    """
    findings = Findings()

    def load(ptx: str) -> Program:
        return Program(ptx if damage is None else damage(ptx))

    def launch(
        source: Any, metadata: Any, grid: tuple[int, int, int], program: Program, values: list[Any]
    ) -> None:
        assert grid[1:] == (1, 1)
        assert not metadata.global_scratch_size
        arguments = [
            (name, value)
            for name, value, kind in zip(
                source.fn.arg_names, values, source.signature.values(), strict=True
            )
            for value in _passed(value, kind)
        ]
        memory = GlobalMemory()
        parameters = _parameters(program, arguments, memory)
        run(program, memory, parameters, grid[0], metadata.num_warps, metadata.shared, findings)

    device = architecture if damage is None else None
    with (
        compiled_to_ptx(architecture, load, launch, device),
        pytest.MonkeyPatch.context() as patch,
    ):
        # The emulator takes the memory of tensors, not addresses.
        patch.setattr(plans, "hooked", lambda: True)
        yield findings


def _passed(value: Any, kind: Any) -> Iterator[Any]:
    """The parts of an argument that the compiled kernel has as parameters."""
    if isinstance(kind, tuple):
        for part, of_part in zip(value, kind, strict=True):
            yield from _passed(part, of_part)
    elif kind != "constexpr":
        yield value


def _parameters(program: Program, arguments: list[tuple[str, Any]], memory: GlobalMemory) -> Array:
    """Bytes of a kernel's parameters; the last are pointers of Triton's own, which are not used."""
    granules: dict[int, int] = {}
    for _, value in arguments:
        if isinstance(value, Tensor):
            key = value.untyped_storage().data_ptr()
            granules[key] = min(granules.get(key, 16), value.itemsize)
    owners: dict[int, Owners] = {}
    last, size, _ = program.parameters[-1]
    found = np.zeros(last + size, np.uint8)
    for (first, size, dtype), (argument, value) in zip(program.parameters, arguments, strict=False):
        if isinstance(value, Tensor):
            value = memory.add(region_of(argument, value, granules, owners))
        found[first : first + size].view(dtype)[0] = (
            value if dtype.kind == "f" else value % (1 << 8 * size)
        )
    assert len(arguments) <= len(program.parameters)
    return found
