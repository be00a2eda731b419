"""Stages of a call from torch.profiler's events; they sum to the whole.

A stage is an operator of this package, forward or backward, including everything that runs inside it. The rest is
torch's: its largest operators by name, "other (torch)" for its other operators, and "Python and autograd" for time
outside operators. The whole is the call's duration. On a CPU it is split by the events' own times. On a GPU it is
split into the kernels' times, by the operator that launched them, and the time in which the device was idle.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from flmoe_kernels.core.files import write_whole

from .shapes import is_cuda

CALL = "flmoe_kernels.profile: call"
WAIT = "flmoe_kernels.profile: wait for the device"

WARMUP = 2
FORWARD, BACKWARD, EITHER = "forward", "backward", ""
OTHER = "other (torch)"
PYTHON = "Python and autograd"
COMPILED = "compiled by torch"
IDLE = "device idle"

OURS, TORCH = "flmoe::", "aten::"
NAMED_SHARE = 0.05  # a torch operator with a larger share of the whole has its own row
_BACKWARD_ROOT = "autograd::engine::evaluate_function"
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph", "CompiledFunction", "triton_")

# Calls that launch a kernel or wait for one, in CUDA's runtime and, for Triton, its driver interface.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_COPY = "Memcpy DtoH"
# Reads a tensor's value into Python; on a GPU the host would wait here.
_SCALAR = "aten::_local_scalar_dense"
# A message of the profiler's library that is neither a warning nor an error: "USDT:2026-01-31 10:20:30 ...".
_MESSAGE = re.compile(rb"(VERBOSE|INFO|STAGE|USDT):\d{4}-\d\d-\d\d ")


@dataclass(frozen=True)
class Stage:
    """A row: seconds per call, share of the whole, and how often the stage was entered."""

    name: str
    phase: str
    seconds: float
    share: float
    calls: float


@dataclass(frozen=True)
class Breakdown:
    """Breakdown of a call, as the mean of the profiled calls.

    Attributes:
        whole: seconds; the sum of the stages.
        stages: the largest first.
        operators: calls of this package's operators; torch_operators: of torch's operators outside of them.
        launches: kernels launched on a GPU; None on a CPU.
        waits: calls in which the host waits for the GPU; None on a CPU.
        reads: copies from the GPU to the host, for which the host usually waits, too; on a CPU the number of
            values read into Python, which would be such copies on a GPU.
    """

    whole: float
    stages: tuple[Stage, ...]
    operators: float
    torch_operators: float
    launches: float | None
    waits: float | None
    reads: float


def traced(
    call: Callable[[], Any],
    device: str,
    *,
    calls: int = 3,
    warmup: int = WARMUP,
    trace: Path | None = None,
) -> Breakdown:
    """Run a call a few times under the profiler.

    Args:
        call: the call; its inputs already exist.
        device: "cpu", "cuda" or "cuda:N".
        calls: number of calls; the result is their mean.
        warmup: number of calls before them.
        trace: file for the Chrome trace, written atomically.
    """
    activities = [ProfilerActivity.CPU]
    if is_cuda(device):
        activities.append(ProfilerActivity.CUDA)
    for _ in range(warmup):
        call()
    _wait(device)
    with _profiler(activities) as profiler:
        for _ in range(calls):
            with record_function(CALL):
                call()
            with record_function(WAIT):
                _wait(device)
    if trace is not None:
        # The profiler chooses the format by the suffix, so the file has a fixed name before it is copied.
        with tempfile.TemporaryDirectory(prefix="flmoe_kernels-") as folder:
            part = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(part))
            with part.open("rb") as content:
                write_whole(trace, partial(shutil.copyfileobj, content))
    return breakdown(profiler.events(), device)


@contextmanager
def _profiler(activities: list[ProfilerActivity]) -> Iterator[profile]:
    """torch.profiler, without the lines that its library prints when it starts and stops."""
    profiler = profile(activities=activities, record_shapes=True)
    with _without_messages():
        profiler.start()
    try:
        yield profiler
    finally:
        with _without_messages():
            profiler.stop()


@contextmanager
def _without_messages() -> Iterator[None]:
    """Drop the library's messages on stderr, except warnings and errors; its log level is fixed at import."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            printed.seek(0)
            for line in printed:
                if not _MESSAGE.match(line):
                    os.write(2, line)


def _wait(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def breakdown(events: Sequence[Any], device: str) -> Breakdown:
    """Compute the breakdown from events of torch.profiler. A range named CALL surrounds each call; on a GPU, a
    range named WAIT follows, in which the host waits for the device.

    Raises:
        ValueError: no range is named CALL.
    """
    calls = [event for event in events if event.name == CALL and _on_cpu(event)]
    if not calls:
        raise ValueError(f"events: expected a range named {CALL!r}, got none")
    gather = _Gather(on_gpu=is_cuda(device))
    waits = [event for event in events if event.name == WAIT and _on_cpu(event)]
    spans = [_span(event) for event in calls]
    if gather.on_gpu:
        # The backward runs in another thread, so its events have no parent among the calls.
        for event in events:
            if _on_cpu(event) and event.cpu_parent is None and _within(event, spans):
                gather.walk(event)
        wholes = [end - start for start, end in _joined(spans, [_span(event) for event in waits])]
    else:
        for event in calls:
            gather.walk(event)
        wholes = [end - start for start, end in spans]
    return gather.result(sum(wholes), len(calls), _counted(events, spans))


class _Gather:
    """Times by (stage, phase), collected from the tree of events."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.micros: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.entered: Counter[tuple[str, str]] = Counter()
        self.operators = 0
        self.torch_operators = 0

    def walk(self, root: Any) -> None:
        # Not recursive, because a trace may be deeper than Python's stack.
        todo = [(root, "", FORWARD)]
        while todo:
            event, stage, phase = todo.pop()
            if event.name.startswith(_BACKWARD_ROOT):
                phase = BACKWARD
            stage, entered = self._stage_of(event, stage)
            if entered:
                self.entered[stage, phase] += 1
            self.micros[stage, phase] += self._own_micros(event)
            todo.extend((child, stage, phase) for child in event.cpu_children)

    def _stage_of(self, event: Any, above: str) -> tuple[str, bool]:
        """Return the stage of an event, and whether the stage begins with it."""
        if above.startswith((OURS, TORCH)):
            return above, False
        if event.name.startswith(OURS):
            self.operators += 1
            return label_of(event), True
        if event.name.startswith(TORCH):
            self.torch_operators += 1
            return event.name, True
        if event.name.startswith(_COMPILED):
            return COMPILED, above != COMPILED
        return above or PYTHON, False

    def _own_micros(self, event: Any) -> float:
        if not self.on_gpu:
            return float(event.self_cpu_time_total)
        # Ranges of this package also appear on the device's time line, under the same name.
        return float(sum(k.duration for k in event.kernels if k.name != event.name))

    def result(self, whole: float, calls: int, counted: Counter[str]) -> Breakdown:
        """Convert the microseconds of all calls into the mean seconds of a call."""
        micros = dict(self.micros)
        if self.on_gpu:
            # While host and device work at the same time, only the device's time counts.
            micros[IDLE, EITHER] = max(0.0, whole - sum(micros.values()))
        rows: defaultdict[tuple[str, str], float] = defaultdict(float)
        entered: Counter[tuple[str, str]] = Counter()
        for (stage, phase), spent in micros.items():
            small = stage.startswith(TORCH) and spent < NAMED_SHARE * whole
            key = (OTHER if small else stage, phase)
            rows[key] += spent
            entered[key] += self.entered[stage, phase]
        whole = max(whole, sum(rows.values()))
        stages = [
            Stage(name, phase, spent * 1e-6 / calls, spent / whole, entered[name, phase] / calls)
            for (name, phase), spent in rows.items()
            if spent
        ]
        return Breakdown(
            whole=whole * 1e-6 / calls,
            stages=tuple(sorted(stages, key=lambda row: -row.seconds)),
            operators=self.operators / calls,
            torch_operators=self.torch_operators / calls,
            launches=counted["launch"] / calls if self.on_gpu else None,
            waits=counted["wait"] / calls if self.on_gpu else None,
            reads=counted["copy" if self.on_gpu else "scalar"] / calls,
        )


def label_of(event: Any) -> str:
    """Name of an operator; linear maps of the layer also have their widths, which distinguish them."""
    name = str(event.name)
    shapes = event.input_shapes or []
    place = {"flmoe::expert_linear": 1, "flmoe::expert_linear_backward": 2}.get(name)
    if place is None or len(shapes) <= place or len(shapes[place]) != 3:
        return name
    _, out, into = shapes[place]
    return f"{name} {into} to {out}"


def _counted(events: Iterable[Any], spans: Sequence[tuple[float, float]]) -> Counter[str]:
    """Count launches, waits, copies and scalar reads within the calls, on the time lines of host and device."""
    counted: Counter[str] = Counter()
    for event in events:
        kind = _kind(event)
        if kind and (kind == "copy" or _within(event, spans)):
            counted[kind] += 1
    return counted


def _kind(event: Any) -> str:
    name = event.name
    if not _on_cpu(event):
        # The device's time line lags behind the host's: a copy may end after the call that started it.
        return "copy" if name.startswith(_COPY) else ""
    if name.startswith(_LAUNCHES):
        return "launch"
    if name in _WAITS:
        return "wait"
    return "scalar" if name == _SCALAR else ""


def _on_cpu(event: Any) -> bool:
    return str(event.device_type).rpartition(".")[2] == "CPU"


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _within(event: Any, spans: Sequence[tuple[float, float]]) -> bool:
    return any(start <= event.time_range.start < end for start, end in spans)


def _joined(
    calls: Sequence[tuple[float, float]], waits: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """Join each call with the wait that follows it, if there are waits."""
    calls = sorted(calls)
    for (start, end), (_, waited) in zip(calls, sorted(waits) or calls, strict=True):
        yield start, max(end, waited)
