"""Stages of a call from torch.profiler's events; they sum to the whole.

A stage is one of this package's operators, forward or backward, with all that runs inside it. What is no part of
any is torch's: its largest operators by name, "other (torch)" for the rest of them, and "Python and autograd" for
what is no operator. On a CPU the whole is the call's own duration, split by the events' own times. On a GPU it is
the same duration, split into the kernels' times, each given to the operator that launched it, and the time in
which the device had nothing to do.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
NAMED_SHARE = 0.05  # a torch operator of a larger share of the whole has a row of its own
_BACKWARD_ROOT = "autograd::engine::evaluate_function"
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph", "CompiledFunction", "triton_")

# What starts a kernel, and what waits for one; of CUDA's runtime and, for Triton, its driver interface.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_COPY = "Memcpy DtoH"
# A tensor's value taken to Python: on a GPU the host would wait here.
_SCALAR = "aten::_local_scalar_dense"


@dataclass(frozen=True)
class Stage:
    """One row: seconds of a call that it took, its share of the whole, how many times it was entered."""

    name: str
    phase: str
    seconds: float
    share: float
    calls: float


@dataclass(frozen=True)
class Breakdown:
    """One call, as the mean of the profiled ones.

    Attributes:
        whole: seconds; what the stages sum to.
        stages: the largest first.
        operators: calls of this package's operators; torch_operators: of torch's, outside of those.
        launches: kernels started on a GPU; None on a CPU.
        waits: calls in which the host waits for the GPU; None on a CPU.
        reads: copies from the GPU to the host, for which it mostly waits as well; on a CPU how often a value
            was taken to Python, which would be such a copy on a GPU.
    """

    whole: float
    stages: tuple[Stage, ...]
    operators: float
    torch_operators: float
    launches: float | None
    waits: float | None
    reads: float


def traced(
    call: Callable[[], Any], device: str, *, calls: int = 3, trace: Path | None = None
) -> Breakdown:
    """Run a call a few times under the profiler.

    Args:
        call: to run; inputs are made before.
        device: "cpu", "cuda" or "cuda:N".
        calls: how many times; the result is the mean.
        trace: where to write the Chrome trace; it appears whole or not at all.
    """
    activities = [ProfilerActivity.CPU]
    if is_cuda(device):
        activities.append(ProfilerActivity.CUDA)
    for _ in range(WARMUP):
        call()
    _wait(device)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(calls):
            with record_function(CALL):
                call()
            with record_function(WAIT):
                _wait(device)
    if trace is not None:
        # The profiler chooses the format by the name's end, whatever the target is called.
        with tempfile.TemporaryDirectory(prefix="flmoe_kernels-") as folder:
            part = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(part))
            write_whole(trace, lambda path: shutil.copyfile(part, path))
    return breakdown(profiler.events(), device)


def _wait(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def breakdown(events: Sequence[Any], device: str) -> Breakdown:
    """From the events of torch.profiler with one range named CALL around each call, and, on a GPU, one named
    WAIT after it, in which the host waits for the device.

    Raises:
        ValueError: no range named CALL among the events.
    """
    calls = [event for event in events if event.name == CALL and _on_cpu(event)]
    if not calls:
        raise ValueError(f"events: expected a range named {CALL!r}, got none")
    gather = _Gather(on_gpu=is_cuda(device))
    waits = [event for event in events if event.name == WAIT and _on_cpu(event)]
    spans = [_span(event) for event in calls]
    if gather.on_gpu:
        # The backward runs in a thread of its own, so that its events have no parent among the calls.
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
    """Times by (stage, phase) while the tree of events is walked."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.micros: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.entered: Counter[tuple[str, str]] = Counter()
        self.operators = 0
        self.torch_operators = 0

    def walk(self, root: Any) -> None:
        # Not by recursion: a trace may be deeper than Python's stack.
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
        """The stage that an event belongs to, and whether the stage begins with it."""
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
        # A range of ours is shown on the device's time line as well, under its own name.
        return float(sum(k.duration for k in event.kernels if k.name != event.name))

    def result(self, whole: float, calls: int, counted: Counter[str]) -> Breakdown:
        """Microseconds of all calls become seconds of one."""
        micros = dict(self.micros)
        if self.on_gpu:
            # Where the host prepares while the device works, only the device's time counts.
            micros[IDLE, EITHER] = max(0.0, whole - sum(micros.values()))
        rows: defaultdict[tuple[str, str], float] = defaultdict(float)
        entered: Counter[tuple[str, str]] = Counter()
        for (stage, phase), spent in micros.items():
            small = stage.startswith(TORCH) and spent < NAMED_SHARE * whole
            key = (OTHER if small else stage, phase)
            rows[key] += spent
            entered[key] += self.entered[stage, phase]
        for phase in {phase for _, phase in rows if phase}:
            rows.setdefault((OTHER, phase), 0.0)
        whole = max(whole, sum(rows.values()))
        stages = [
            Stage(name, phase, spent * 1e-6 / calls, spent / whole, entered[name, phase] / calls)
            for (name, phase), spent in rows.items()
            if spent or name == OTHER
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
    """An operator's name; for the layer's linear maps with their widths, which tell what each is for."""
    name = str(event.name)
    shapes = event.input_shapes or []
    place = {"flmoe::expert_linear": 1, "flmoe::expert_linear_backward": 2}.get(name)
    if place is None or len(shapes) <= place or len(shapes[place]) != 3:
        return name
    _, out, into = shapes[place]
    return f"{name} {into} to {out}"


def _counted(events: Iterable[Any], spans: Sequence[tuple[float, float]]) -> Counter[str]:
    """Launches, waits, reads and scalars within the calls, on the host's and the device's time line."""
    counted: Counter[str] = Counter()
    for event in events:
        kind = _kind(event)
        if kind and (kind == "copy" or _within(event, spans)):
            counted[kind] += 1
    return counted


def _kind(event: Any) -> str:
    name = event.name
    if not _on_cpu(event):
        # The device's time line lags behind the host's: a copy may end after the call that asked for it.
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
    """Each call with the wait that follows it, if there are waits."""
    calls = sorted(calls)
    for (start, end), (_, waited) in zip(calls, sorted(waits) or calls, strict=True):
        yield start, max(end, waited)
