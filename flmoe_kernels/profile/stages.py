"""Stages of a call from torch.profiler's events; they sum to the whole.

A stage is an operator of this package, forward or backward, including everything that runs inside it. The rest is
torch's: its largest operators by name, "other (torch)" for its other operators, and "Python and autograd" for time
outside operators. The whole is the call's duration. On a CPU it is split by the events' own times. On a GPU it is
split into the kernels' times, by the operator that launched them, and the time in which the device was idle.
The work of a stage is counted in another call, see `work`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from flmoe_kernels.core.files import write_whole

from .shapes import is_cuda
from .work import MARK, OURS, Cost, Counting

CALL = "flmoe_kernels.profile: call"

WARMUP = 2
OTHER = "other (torch)"
PYTHON = "Python and autograd"
COMPILED = "compiled by torch"
IDLE = "device idle"

TORCH = "aten::"
_ENCODERS = "flmoe::encoder_layers"
NAMED_SHARE = 0.05  # a torch operator with at least this share of the whole has its own row
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph", "CompiledFunction", "triton_")

# Calls that launch a kernel or wait for one, in CUDA's runtime and, for Triton, its driver interface.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Stage:
    """A row, per call: seconds, share of the whole, how often the stage was entered, work (see `work.Cost`)."""

    name: str
    seconds: float
    share: float
    calls: float
    flop: int = 0
    bytes: int = 0
    exponentials: int = 0


@dataclass(frozen=True)
class Breakdown:
    """Breakdown of a call, as the mean of the profiled calls.

    Attributes:
        whole: seconds; the sum of the stages.
        stages: the largest first.
        launches: kernels launched on a GPU; None on a CPU.
        waits: calls in which the host waits for the GPU; None on a CPU.
    """

    whole: float
    stages: tuple[Stage, ...]
    launches: float | None
    waits: float | None


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
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it prints lines of its own
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(calls):
            with record_function(CALL):
                call()
                _wait(device)
    if trace is not None:
        # The profiler chooses the format by the suffix, so the file has a fixed name before it is copied.
        with tempfile.TemporaryDirectory(prefix="flmoe_kernels-") as folder:
            part = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(part))
            with part.open("rb") as content:
                write_whole(trace, partial(shutil.copyfileobj, content))
    count = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    with count as counted, Counting(), record_function(CALL):
        call()
    return breakdown(profiler.events(), device, counted.events())


def _wait(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def breakdown(events: Sequence[Any], device: str, counted: Sequence[Any] = ()) -> Breakdown:
    """Compute the breakdown from events of torch.profiler. A range named CALL surrounds each call; on a GPU it
    includes a device synchronization at its end.

    Args:
        counted: events of one more call, with the marks of `work.Counting`.

    Raises:
        ValueError: no range is named CALL.
    """
    on_gpu = is_cuda(device)
    calls, within = _calls(events)
    whole = float(sum(call.time_range.elapsed_us() for call in calls))
    micros: defaultdict[str, float] = defaultdict(float)
    entered: Counter[str] = Counter()
    for event, stage, enters in _staged(calls, within, on_gpu):
        entered[stage] += enters
        if on_gpu:
            # Ranges of this package also appear on the device's time line, under the same name.
            micros[stage] += sum(k.duration for k in event.kernels if k.name != event.name)
        else:
            micros[stage] += event.self_cpu_time_total
    if on_gpu:
        # While host and device work at the same time, only the device's time counts.
        micros[IDLE] = max(0.0, whole - sum(micros.values()))
    work: defaultdict[str, Cost] = defaultdict(Cost)
    if counted:
        for event, stage, _ in _staged(*_calls(counted), on_gpu):
            if event.name.startswith(MARK):
                work[stage] += Cost(*map(int, event.name.removeprefix(MARK).split()))
    count, whole = len(calls), max(whole, sum(micros.values()))
    rows: defaultdict[str, list[str]] = defaultdict(list)
    for stage, spent in micros.items():
        small = stage.startswith(TORCH) and spent < NAMED_SHARE * whole
        rows[OTHER if small else stage].append(stage)
    stages = []
    for name, held in rows.items():
        spent = sum(micros[stage] for stage in held)
        times = sum(entered[stage] for stage in held) / count
        done = sum((work[stage] for stage in held), Cost())
        if spent:
            numbers = (spent * 1e-6 / count, spent / whole, times)
            stages.append(Stage(name, *numbers, **vars(done)))
    launches = sum(event.name.startswith(_LAUNCHES) for event in within)
    waits = (
        sum(event.name in _WAITS for event in within) - count
    )  # without those at the calls' ends
    return Breakdown(
        whole=whole * 1e-6 / count,
        stages=tuple(sorted(stages, key=lambda row: -row.seconds)),
        launches=launches / count if on_gpu else None,
        waits=waits / count if on_gpu else None,
    )


def _calls(events: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The ranges named CALL, and all events of the host that begin within one."""
    events = [event for event in events if str(event.device_type).endswith("CPU")]
    calls = [event for event in events if event.name == CALL]
    if not calls:
        raise ValueError(f"events: expected a range named {CALL!r}, got none")
    spans = [(event.time_range.start, event.time_range.end) for event in calls]
    within = [
        event
        for event in events
        if any(start <= event.time_range.start < end for start, end in spans)
    ]
    return calls, within


def _staged(
    calls: Sequence[Any], within: Sequence[Any], on_gpu: bool
) -> Iterator[tuple[Any, str, bool]]:
    """Every event of the calls with its stage, and whether it enters the stage."""
    # On a GPU the backward runs in another thread, so its events have no parent among the calls.
    roots = [event for event in within if event.cpu_parent is None] if on_gpu else calls
    # Not recursive, because a trace may be deeper than Python's stack.
    todo = [(root, PYTHON) for root in roots]
    while todo:
        event, stage = todo.pop()
        own = _stage_of(event) if _divisible(stage, event) else ""
        enters = bool(own) and own != stage
        stage = own if enters else stage
        yield event, stage, enters
        todo.extend((child, stage) for child in event.cpu_children)


def _divisible(stage: str, event: Any) -> bool:
    """Whether an event within a stage may begin another one: only steps within an operator of whole encoders."""
    if stage.startswith(_ENCODERS):
        return str(event.name).startswith(OURS)
    return not stage.startswith((OURS, TORCH))


def _stage_of(event: Any) -> str:
    """The stage that begins with an event, or ""."""
    name = str(event.name)
    if name.startswith(_COMPILED):
        return COMPILED
    if not name.startswith(OURS):
        return name if name.startswith(TORCH) else ""
    # Linear layers are distinguished by their widths.
    place = {"flmoe::expert_linear": 1, "flmoe::expert_linear_backward": 2}.get(name)
    shapes = event.input_shapes or []
    if place is None or len(shapes) <= place or len(shapes[place]) != 3:
        return name
    _, out, into = shapes[place]
    return f"{name} {into} to {out}"
