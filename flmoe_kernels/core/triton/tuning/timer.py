"""The clock of the tuner: events of the device, around runs that start with nothing of theirs in L2."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .trial import Trial

# Runs whose median counts; bytes that are written before each of them, more than any L2; and how often, so that
# the launch has been queued when they are done and no gap of the host is timed: twice 2^28 take 67 us at 8 TB/s,
# which is to be more than the host needs for a launch (assumed).
_RUNS, _FLUSHED, _TIMES = 10, 2**28, 2


def device_seconds(trial: Trial[Any]) -> float:
    """Median seconds of a trial on the current stream of its device; waits for that stream."""
    with torch.cuda.device(trial.device):
        flushed = _flushed(trial.device)
        pairs = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(_RUNS)
        ]
        for start, end in pairs:
            for _ in range(_TIMES):
                flushed.zero_()
            start.record()
            trial.run()
            end.record()
        # Not the whole device: other streams may wait for other processes.
        pairs[-1][1].synchronize()
        found = sorted(start.elapsed_time(end) for start, end in pairs)
    return found[_RUNS // 2] / 1e3


@functools.lru_cache(maxsize=1)
def _flushed(device: torch.device) -> Tensor:
    return torch.empty(_FLUSHED, dtype=torch.int8, device=device)


def release() -> None:
    """Give back what the clock holds on the device."""
    _flushed.cache_clear()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph, in which nothing may wait."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())
