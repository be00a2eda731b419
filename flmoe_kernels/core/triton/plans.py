"""Plans: launches of a call that are recorded once and repeated with other addresses.

Checks, tiles, allocations and Triton's launcher take the host longer than a small kernel takes the GPU. They
depend only on shapes, strides, dtypes, options and the alignment of addresses. A function that is called again
with the same ones runs once more on the meta device, where its launches are recorded. Later calls allocate results
and one buffer for all tensors between, and pass addresses to compiled kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import tuning
from .launches import Launch, current, interpreted, matrix_precision, record
from .tables import architecture_of, assume_architecture

Function = Callable[..., Sequence[Tensor]]

# Keys that are kept; then all are forgotten. A plan takes some 100 KiB.
_MOST = 512
# Bytes to which parts of a buffer are aligned, as in torch's allocator for GPUs.
_ALIGNMENT = 512
# Releases of Triton whose arguments of a compiled kernel's `run` are those of `_repeat`.
_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
# On AMD a compiled kernel also depends on the sizes of storages, which are not in the key.
_PLANNED = torch.version.hip is None
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

# None after the first call; False if the launches cannot be recorded.
_plans: dict[Any, Plan | bool | None] = {}


def planned(tensors: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a function of this many tensors and of options, which returns tensors; see `repeated`.

    Options are positional, hashable or lists.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            options = tuple([tuple(x) if isinstance(x, list) else x for x in args[tensors:]])

            def compute(*inputs: Tensor | None) -> Sequence[Tensor]:
                results = function(*inputs, *options)
                return (results,) if isinstance(results, Tensor) else results

            results = repeated(compute, args[:tensors], function, options)
            return results[0] if len(results) == 1 else tuple(results)

        return call

    return decorate


def repeated(
    function: Function, inputs: Sequence[Tensor | None], *options: Any
) -> Sequence[Tensor]:
    """function(*inputs), from a plan if it was called before with the same options and similar inputs.

    Args:
        function: allocates its results, calls `run`, and computes nothing itself, otherwise it is not recorded. It
            depends on the inputs only by shape, stride and dtype.
        inputs: at least one is a tensor.
        options: hashable; a name of the function, and all else that it depends on.
    """
    first = _first(inputs)
    if tuning.enabled() or first.is_meta or not _PLANNED:
        return function(*inputs)
    key = (
        options,
        -1 if first.is_cuda else _driver(),
        first.dtype is torch.float32 and matrix_precision(first.dtype, first.device),
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in inputs],
    )
    plan = _plans.get(key, True)
    if isinstance(plan, Plan):
        return plan.run(inputs)
    if plan is None:
        _plans[key] = _recorded(function, inputs)
    results = function(*inputs)
    if plan is True:
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[key] = None
    return results


def _first(inputs: Sequence[Tensor | None]) -> Tensor:
    for x in inputs:
        if x is not None:
            return x
    raise ValueError("inputs: expected at least one tensor")


def _driver() -> int:
    """Without a GPU: the number of a test's device, -2 in the interpreter."""
    return -2 if interpreted() else int(triton.runtime.driver.active.get_current_device())


class _NotRecordable(Exception):
    """A function computes something without a launch."""


class _OnlyLaunches(TorchDispatchMode):
    """Refuses every operator that is neither an allocation nor a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _ALLOCATIONS:
            # Composite operators such as `contiguous` return a view or a copy.
            given = {x.untyped_storage()._cdata for x in _tensors(args)}
            returned = _tensors(results if isinstance(results, tuple | list) else (results,))
            copied = any(x.untyped_storage()._cdata not in given for x in returned)
            if copied or func._schema.is_mutable:
                raise _NotRecordable(str(func))
        return results


def _recorded(function: Function, inputs: Sequence[Tensor | None]) -> Plan | bool | None:
    first = _first(inputs)
    if not _sees_operators():
        return None
    like = [
        x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        for x in inputs
    ]
    try:
        assumed = assume_architecture(architecture_of(first.device))
        with assumed, _OnlyLaunches(), record() as launches:
            results = function(*like)
        return Plan(launches, like, results)
    except _NotRecordable:
        return False


def _sees_operators() -> bool:
    """False where torch's dispatch to Python is disabled: a copy would not be noticed there."""
    try:
        with _OnlyLaunches():
            torch.zeros((), device="meta")
    except _NotRecordable:
        return True
    return False


@dataclass
class _Step:
    """A launch with tensors on the meta device; and its arguments in the kernel's order.

    addresses: index of an argument, number of a buffer, offset in bytes. tuples: index of an argument, and a
    (buffer, offset) pair for each of its parts. A part that is not a tensor is (-1, value): buffer -1 has
    address 0.
    """

    launch: Launch
    values: list[Any]
    addresses: list[tuple[int, int, int]]
    tuples: list[tuple[int, list[tuple[int, int]]]]


class Plan:
    """Recorded launches. Buffers are the inputs, the results, and one with all other tensors, which share memory
    unless they are needed at the same time."""

    def __init__(
        self,
        launches: Sequence[Launch],
        inputs: Sequence[Tensor | None],
        results: Sequence[Tensor],
    ) -> None:
        self._inputs = len(inputs)
        self._results = [(x.shape, x.dtype) for x in results]
        self._scratch = len(inputs) + len(results)
        # The start of each storage: buffer and offset.
        self._places: dict[int, tuple[int, int]] = {}
        for number, x in enumerate((*inputs, *results)):
            if x is None or not x.numel():
                continue
            storage = x.untyped_storage()
            if storage._cdata in self._places or storage.nbytes() != _bytes_of(x):
                raise _NotRecordable("results with shared memory")
            if number >= len(inputs) and not x.is_contiguous():
                raise _NotRecordable("results that are not contiguous")
            self._places[storage._cdata] = number, 0
        self._bytes = self._arrange(launches)
        self._steps = [self._step(launch) for launch in launches]
        # By the addresses of the inputs modulo 16.
        self._kernels: dict[tuple[int, ...], list[Any]] = {}

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        device = _first(inputs).device
        results = [torch.empty(shape, dtype=x, device=device) for shape, x in self._results]
        scratch = (
            torch.empty(self._bytes, dtype=torch.uint8, device=device) if self._bytes else None
        )
        self.launch(device, [*inputs, *results, scratch])
        return results

    def launch(self, device: torch.device, buffers: Sequence[Tensor | None]) -> None:
        addresses = [0 if x is None else x.data_ptr() for x in buffers]
        alignment = tuple([address & 15 for address in addresses[: self._inputs]])
        kernels = self._kernels.get(alignment)
        with current(device):
            if kernels is None or hooked():
                kernels = self._launch(device, buffers)
                # In the interpreter every kernel is None, and nothing is cached.
                if None not in kernels:
                    self._kernels[alignment] = [
                        (x.run, x.function, x.packed_metadata) for x in kernels
                    ]
            elif torch.autograd.profiler._is_profiler_enabled:
                steps = zip(self._steps, kernels, strict=True)
                for own, group in groupby(steps, lambda step: step[0].launch.range):
                    with torch.profiler.record_function(own.name) if own else nullcontext():
                        _repeat(group, addresses)
            else:
                _repeat(zip(self._steps, kernels, strict=True), addresses)

    def _launch(self, device: torch.device, buffers: Sequence[Tensor | None]) -> list[Any]:
        """Launch with tensors, and return the compiled kernels."""
        return [
            replace(
                step.launch,
                arguments={
                    name: self._in_buffers(value, device, buffers)
                    for name, value in step.launch.arguments.items()
                },
            ).run()
            for step in self._steps
        ]

    def _in_buffers(
        self, value: Any, device: torch.device, buffers: Sequence[Tensor | None]
    ) -> Any:
        if isinstance(value, tuple):
            return tuple(self._in_buffers(part, device, buffers) for part in value)
        if not isinstance(value, Tensor):
            return value
        if not value.numel():
            return torch.empty(value.shape, dtype=value.dtype, device=device)
        number, offset = self._place(value)
        buffer = buffers[number]
        assert buffer is not None
        offset += int(buffer.storage_offset()) * buffer.itemsize
        x = torch.empty(0, dtype=value.dtype, device=buffer.device)
        first = offset // value.itemsize
        return x.set_(buffer.untyped_storage(), first, value.shape, value.stride())

    def _place(self, x: Tensor) -> tuple[int, int]:
        number, offset = self._places[x.untyped_storage()._cdata]
        return number, offset + int(x.storage_offset()) * x.itemsize

    def _arrange(self, launches: Sequence[Launch]) -> int:
        """Find places for all other tensors in one buffer, and return its size."""
        spans: dict[int, list[int]] = {}  # first and last launch, bytes
        for number, launch in enumerate(launches):
            for x in _tensors(tuple(launch.arguments.values())):
                storage = x.untyped_storage()
                if storage._cdata not in self._places:
                    span = spans.setdefault(storage._cdata, [number, number, storage.nbytes()])
                    span[1] = number
        total = 0
        placed: list[tuple[int, int, int]] = []  # last launch, begin, end
        for key, (first, last, size) in spans.items():
            offset = 0
            for until, begin, end in sorted(placed, key=lambda part: part[1]):
                if until < first:
                    continue
                if offset + size <= begin:
                    break
                offset = max(offset, end)
            end = offset + -(-size // _ALIGNMENT) * _ALIGNMENT
            placed.append((last, offset, end))
            self._places[key] = self._scratch, offset
            total = max(total, end)
        return total

    def _step(self, launch: Launch) -> _Step:
        arguments = {**launch.arguments, **launch.constants}
        step = _Step(launch, [arguments[name] for name in launch.kernel.arg_names], [], [])
        for i, value in enumerate(step.values):
            if isinstance(value, Tensor):
                step.addresses.append((i, *self._place(value)))
            elif isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
                parts = [self._place(x) if isinstance(x, Tensor) else (-1, x) for x in value]
                step.tuples.append((i, parts))
        return step


def _repeat(steps: Any, addresses: list[int]) -> None:
    """Launch compiled kernels of the current device; addresses: of the buffers."""
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    addresses = [*addresses, 0]
    for step, (run, function, metadata) in steps:
        values = step.values.copy()
        for i, number, offset in step.addresses:
            values[i] = addresses[number] + offset
        for i, parts in step.tuples:
            values[i] = tuple([addresses[number] + offset for number, offset in parts])
        programs = step.launch.programs
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values)


def hooked() -> bool:
    """Whether launches need Triton's own launcher: it calls functions before or after launches, or this release
    may take other arguments."""
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not _KNOWN or any(getattr(hook, "calls", hook) for hook in hooks)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _bytes_of(x: Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int(last + 1) * x.itemsize
