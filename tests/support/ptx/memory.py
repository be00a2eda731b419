"""Memory of emulated kernels, with checks of every access.

Findings are the kinds of mistakes with the first instructions that made them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .arithmetic import Array

if TYPE_CHECKING:
    from .machine import Group

# The address space of a tensor; addresses of tensor i start at (i + 1) << _SPACE.
_SPACE = 40
_NOBODY, _SEVERAL = -1, -2


class Findings(dict[str, list[str]]):
    """Mistakes by kind, with the first places of each."""


@dataclass(frozen=True)
class Access:
    """An instruction of some threads of a group."""

    group: Group
    threads: Array
    text: str

    def of(self, register: Array) -> Array:
        """The values of these threads."""
        return np.broadcast_to(register, self.group.count)[self.threads]

    def address(self, register: Array, offset: int) -> Array:
        return self.of(register).astype(np.int64) + offset

    def merge(self, register: Array, values: Array) -> Array:
        """A register with new values in these threads."""
        merged = np.array(np.broadcast_to(register, self.group.count))
        merged[self.threads] = values
        return merged

    def where(self, some: Array) -> Access:
        return Access(self.group, self.threads[some], self.text)

    def report(self, kind: str, wrong: Array, tensor: str = "") -> None:
        """Add a finding; wrong: which threads, or a table with a row for each of them."""
        if not wrong.any():
            return
        thread = self.threads[np.flatnonzero(wrong.reshape(len(self.threads), -1).any(1))[0]]
        place = f"CTA {self.group.cta[thread]}, thread {self.group.thread[thread]}"
        places = self.group.findings.setdefault(kind, [])
        if len(places) < 4:
            places.append(
                f"{self.group.program.name}: {self.text} ({place}{tensor and ', '}{tensor})"
            )


class Owners:
    """Which CTA wrote, and which read, every `granule` bytes of a tensor's storage in a launch."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        self.writer, self.reader = np.full((2, size // granule + 1), _NOBODY, np.int32)


@dataclass(frozen=True)
class Region:
    """The memory of a tensor argument: its elements are bytes `low` to `high` of data, which starts at byte
    `start` of a storage."""

    name: str
    data: Array
    low: int
    high: int
    start: int
    owners: Owners


def region_of(name: str, x: Tensor, granules: dict[int, int], owners: dict[int, Owners]) -> Region:
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


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self) -> None:
        self.tensors: list[Region] = []

    def add(self, tensor: Region) -> int:
        """Address of the first element."""
        self.tensors.append(tensor)
        return (len(self.tensors) << _SPACE) + tensor.low

    def load(self, access: Access, address: Array, dtype: np.dtype, count: int) -> Array:
        found = np.zeros((len(address), count), dtype)
        for tensor, some, at in self._locate(access, address, count * dtype.itemsize):
            me = access.group.cta[access.threads[some], None]
            cells = _cells(at + tensor.start, count * dtype.itemsize, tensor.owners.granule)
            writer, reader = tensor.owners.writer, tensor.owners.reader
            other = (writer[cells] != _NOBODY) & (writer[cells] != me)
            access.where(some).report("reads what another CTA writes", other, tensor.name)
            mine = (reader[cells] == _NOBODY) | (reader[cells] == me)
            reader[cells] = np.where(mine, me, _SEVERAL)
            # Several CTAs in one instruction.
            reader[cells[reader[cells] != me]] = _SEVERAL
            found[some] = _typed(tensor.data, dtype)[_elements(at, dtype, count)]
        return found

    def store(self, access: Access, address: Array, values: Array) -> None:
        count, size = values.shape[1], values.itemsize * values.shape[1]
        for tensor, some, at in self._locate(access, address, size):
            me = access.group.cta[access.threads[some], None]
            writer, reader = tensor.owners.writer, tensor.owners.reader
            cells = _cells(at + tensor.start, size, tensor.owners.granule)
            here = access.where(some)
            other = (reader[cells] != _NOBODY) & (reader[cells] != me)
            here.report("writes what another CTA reads", other, tensor.name)
            other = (writer[cells] != _NOBODY) & (writer[cells] != me)
            writer[cells] = me
            here.report(
                "writes what another CTA writes", other | (writer[cells] != me), tensor.name
            )
            data, places = _typed(tensor.data, values.dtype), _elements(at, values.dtype, count)
            data[places] = values[some]
            differ = data[places] != values[some]
            here.report("threads store different values", differ, tensor.name)

    def _locate(
        self, access: Access, address: Array, size: int
    ) -> Iterator[tuple[Region, Array, Array]]:
        """(tensor, which of the addresses, their offsets) of addresses within a tensor and aligned to `size`."""
        number, offset = (address >> _SPACE) - 1, address & ((1 << _SPACE) - 1)
        aligned = offset % size == 0
        access.report("misaligned", ~aligned)
        places = number[:1] if (number == number[:1]).all() else np.unique(number)
        for place in places:
            here = number == place
            if not 0 <= place < len(self.tensors):
                access.report("out of bounds", here, "no tensor")
                continue
            tensor = self.tensors[place]
            inside = (offset >= tensor.low) & (offset + size <= tensor.high)
            access.report("out of bounds", here & ~inside, tensor.name)
            some = np.flatnonzero(here & inside & aligned)
            if len(some):
                yield tensor, some, offset[some]


@dataclass(frozen=True)
class _Copy:
    """Asynchronous copies: their places, values, warps, CTAs, and the numbers of their groups."""

    at: Array
    values: Array
    warp: Array
    block: Array
    number: Array

    def where(self, some: Array) -> _Copy:
        return _Copy(*(getattr(self, field.name)[some] for field in dataclasses.fields(self)))


class SharedMemory:
    """Shared memory of the CTAs of a group.

    For every `granule` bytes: whether they were written, the warps that wrote and read them since the last
    barrier, and the number of copies in flight.
    """

    def __init__(self, ctas: int, size: int, granule: int, warps: int) -> None:
        self.size, self.granule = size, granule
        self.block_size = -(-size // 16) * 16
        cells = ctas * self.block_size // granule
        self.data = np.full(ctas * self.block_size, 0xCD, np.uint8)
        self.written = np.zeros(cells, bool)
        self.writer = np.full(cells, _NOBODY, np.int8)
        self.readers = np.zeros((cells, warps), bool)
        self.in_flight = np.zeros(cells, np.int8)
        # Number of committed copy groups of each CTA.
        self.committed = np.zeros(ctas, np.int64)
        self.copies: list[_Copy] = []

    def load(self, access: Access, address: Array, dtype: np.dtype, count: int) -> Array:
        at, cells, warp = self._locate(access, address, count * dtype.itemsize)
        access.report("uninitialised", ~self.written[cells])
        access.report("reads a copy in flight", self.in_flight[cells] > 0)
        access.report("race: read after write", self._other(self.writer[cells], warp))
        self.readers[cells, warp] = True
        return _typed(self.data, dtype)[_elements(at, dtype, count)]

    def store(self, access: Access, address: Array, values: Array) -> None:
        count = values.shape[1]
        at, cells, warp = self._locate(access, address, values.itemsize * count)
        data, places = _typed(self.data, values.dtype), _elements(at, values.dtype, count)
        # Several warps may store replicas of a value.
        changes = (data[places] != values).any(1)
        self._check_write(access, cells, warp, changes[:, None])
        data[places] = values
        self.written[cells] = True
        self.writer[cells] = warp
        differ = data[places] != values
        access.report("threads store different values", differ)

    def copy(self, access: Access, address: Array, values: Array) -> None:
        """An asynchronous copy, which writes when it is waited for."""
        at, cells, warp = self._locate(access, address, values.shape[1])
        self._check_write(access, cells, warp, np.ones((1, 1), bool))
        self.in_flight[cells] += 1
        block = access.group.block[access.threads]
        self.copies.append(_Copy(at, values, warp, block, self.committed[block]))

    def commit(self, access: Access) -> None:
        self.committed[np.unique(access.group.block[access.threads])] += 1

    def wait(self, access: Access, left: int) -> None:
        """Finish all groups of copies but the last `left`."""
        here = np.zeros(len(self.committed), bool)
        here[access.group.block[access.threads]] = True
        waiting, self.copies = self.copies, []
        for copy in waiting:
            done = here[copy.block] & (copy.number < self.committed[copy.block] - left)
            self.copies.append(copy.where(~done))
            copy = copy.where(done)
            size = copy.values.shape[1]
            cells = _cells(copy.at, size, self.granule)
            self.data[copy.at[:, None] + np.arange(size)] = copy.values
            self.in_flight[cells] -= 1
            self.written[cells] = True
            self.writer[cells] = copy.warp
        self.copies = [copy for copy in self.copies if len(copy.at)]

    def barrier(self, access: Access) -> None:
        blocks = np.unique(access.group.block[access.threads])
        self.writer.reshape(len(self.committed), -1)[blocks] = _NOBODY
        self.readers.reshape(len(self.committed), -1)[blocks] = False

    def _locate(self, access: Access, address: Array, size: int) -> tuple[Array, Array, Array]:
        """Places in data, cells and warps of an access; a wrong address becomes 0."""
        address = address & 0xFFFFFFFF
        wrong = {
            "misaligned shared": address % size != 0,
            "out of bounds shared": address + size > self.size,
        }
        for kind, some in wrong.items():
            access.report(kind, some)
        address = np.where(np.logical_or(*wrong.values()), 0, address)
        at = address + access.group.block[access.threads] * self.block_size
        return at, _cells(at, size, self.granule), access.group.warp[access.threads, None]

    @staticmethod
    def _other(writer: Array, warp: Array) -> Array:
        return (writer != _NOBODY) & (writer != warp)

    def _check_write(self, access: Access, cells: Array, warp: Array, changes: Array) -> None:
        access.report("writes into a copy in flight", self.in_flight[cells] > 0)
        other = self._other(self.writer[cells], warp) & changes
        access.report("race: write after write", other)
        others = self.readers[cells].sum(2) > self.readers[cells, warp]
        access.report("race: write after read", others)


class LocalMemory:
    """The stacks of the threads of a group."""

    def __init__(self, threads: int, size: int) -> None:
        self.data = np.zeros((threads, size), np.uint8)
        self.written = np.zeros((threads, size), bool)

    def load(self, access: Access, address: Array, dtype: np.dtype, count: int) -> Array:
        places = self._locate(access, address, count * dtype.itemsize)
        access.report("uninitialised", ~self.written[places])
        return np.ascontiguousarray(self.data[places]).view(dtype)

    def store(self, access: Access, address: Array, values: Array) -> None:
        places = self._locate(access, address, values.itemsize * values.shape[1])
        self.data[places], self.written[places] = np.ascontiguousarray(values).view("u1"), True

    def _locate(self, access: Access, address: Array, size: int) -> tuple[Array, Array]:
        outside = (address < 0) | (address + size > self.data.shape[1])
        access.report("out of bounds", outside, "local memory")
        address = np.where(outside, 0, address)
        return access.threads[:, None], address[:, None] + np.arange(size)


def _cells(at: Array, size: int, granule: int) -> Array:
    """The cells of accesses of `size` bytes, one row for each."""
    return at[:, None] // granule + np.arange(max(1, size // granule))


def _typed(data: Array, dtype: np.dtype) -> Array:
    return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


def _elements(at: Array, dtype: np.dtype, count: int) -> Array:
    return at[:, None] // dtype.itemsize + np.arange(count)
