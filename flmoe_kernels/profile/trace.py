"""Calls under torch.profiler: where their time went, and a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from flmoe_kernels.core.files import write_whole

from .shapes import is_cuda
from .stages import CALL, WAIT, Breakdown, breakdown

WARMUP = 2


class BadTrace(RuntimeError):
    """torch.profiler wrote a file that is not the trace of the calls."""


def traced(
    call: Callable[[], Any], device: str, *, calls: int = 3, trace: Path | None = None
) -> Breakdown:
    """Run a call a few times under the profiler.

    Args:
        call: to run; inputs are made before.
        device: "cpu", "cuda" or "cuda:N".
        calls: how many times; what is returned is the mean.
        trace: where to write the Chrome trace; it appears whole and checked, or not at all.

    Raises:
        BadTrace: the written file is not JSON, or holds none of the calls.
        OSError: it cannot be written.
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
        _write(profiler, trace, calls)
    return breakdown(profiler.events(), device)


def _wait(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def _write(profiler: Any, target: Path, calls: int) -> None:
    # The profiler chooses the format by the name's end, whatever the target is called.
    with tempfile.TemporaryDirectory(prefix="flmoe_kernels-") as folder:
        part = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(part))
        check_trace(part, calls)
        write_whole(target, lambda path: shutil.copyfile(part, path))


def check_trace(path: Path, calls: int) -> int:
    """How many events a Chrome trace holds; every one of the calls is among them.

    Raises:
        BadTrace: no JSON (NaN and Infinity, which Chrome refuses, included), no events, or not all calls.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        held = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise BadTrace(f"{path}: the trace is not valid JSON: {error}") from error
    events = held.get("traceEvents") if isinstance(held, dict) else held
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise BadTrace(f"{path}: the trace has no list of events")
    ranges = [e for e in events if e.get("name") == CALL and e.get("cat") == "user_annotation"]
    if len(ranges) != calls or not all(e.get("ph") == "X" and e.get("dur", 0) > 0 for e in ranges):
        raise BadTrace(f"{path}: expected {calls} calls in the trace, got {len(ranges)}")
    return len(events)
