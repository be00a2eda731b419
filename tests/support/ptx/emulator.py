"""Emulated launches: backend "triton" runs compiled kernels on CPU tensors, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.triton_driver import compiled_to_ptx

from .arithmetic import Array
from .machine import run
from .memory import Findings, GlobalMemory, Owners, Region
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
    with compiled_to_ptx(architecture, load, launch, device):
        yield findings


def _passed(value: Any, kind: Any) -> Iterator[Any]:
    """The parts of an argument that the compiled kernel has as parameters."""
    if isinstance(kind, tuple):
        for part, of_part in zip(value, kind, strict=True):
            yield from _passed(part, of_part)
    elif kind != "constexpr":
        yield value


def _parameters(
    program: Program, arguments: list[tuple[str, Any]], memory: GlobalMemory
) -> dict[str, Array]:
    """Values of a kernel's parameters; the last are pointers of Triton's own, which are not used."""
    granules: dict[int, int] = {}
    for _, value in arguments:
        if isinstance(value, Tensor):
            key = value.untyped_storage().data_ptr()
            granules[key] = min(granules.get(key, 16), value.itemsize)
    owners: dict[int, Owners] = {}
    found = {name: np.zeros(1, dtype) for name, dtype in program.parameters}
    for (name, dtype), (argument, value) in zip(program.parameters, arguments, strict=False):
        if isinstance(value, Tensor):
            value = memory.add(_region(argument, value, granules, owners))
        found[name][0] = value if dtype.kind == "f" else value % (1 << 8 * dtype.itemsize)
    assert len(arguments) <= len(found)
    # Registers hold unsigned integers.
    return {name: value.view(f"u{value.itemsize}") for name, value in found.items()}


def _region(name: str, x: Tensor, granules: dict[int, int], owners: dict[int, Owners]) -> Region:
    """The memory between the first and the last element of a tensor."""
    storage = x.untyped_storage()
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    key, low = storage.data_ptr(), int(x.storage_offset()) * x.itemsize
    if key not in owners:
        owners[key] = Owners(len(data), granules[key])
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    span = (last + 1) * x.itemsize if x.numel() else 0
    # Addresses have the tensor's own alignment.
    start = low - x.data_ptr() % 16
    assert start >= 0
    return Region(name, data[start:], low - start, low - start + span, start, owners[key])
