"""Trials of candidate configurations: comparison of results, timing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Configuration = TypeVar("Configuration")

# Candidates sum in different orders, so results differ by a few roundings of their dtype, or of operands to TF32,
# which online maxima may shift. The limit is relative to the largest element; for the RMS it is a quarter.
_ROUNDINGS, _TF32_ROUNDING = 4, 2.0**-11
# Number of runs (the median is used), and size and number of the writes before each run. The writes flush L2 and
# must take longer than the host needs to queue the launch: twice 2^28 bytes take 67 us at 8 TB/s, which is assumed
# to be enough.
_RUNS, _FLUSHED_BYTES, _FLUSHES = 10, 2**28, 2


@dataclass(frozen=True)
class Trial(Generic[Configuration]):
    """One candidate configuration of a kernel on the inputs of a call.

    `run` fills `buffers`. `results` computes the tensors to compare from them, with shapes that do not depend on
    the configuration; by default these are the buffers.
    """

    tiles: Configuration
    device: torch.device
    run: Callable[[], None]
    buffers: Sequence[Tensor]
    results: Callable[[], Sequence[Tensor]] | None = None

    def run_afresh(self) -> Sequence[Tensor]:
        """Run with buffers set to NaN, so that values of another trial are not mistaken for results."""
        for buffer in self.buffers:
            buffer.fill_(float("nan"))
        self.run()
        return self.buffers if self.results is None else self.results()


# Returns the seconds of one run of a trial.
Timer = Callable[[Trial[Any]], float]


def agree(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results equal those of the launch table up to rounding from a different order of sums.

    NaN and infinities must be equal and in the same positions.
    """
    return len(results) == len(expected) and all(map(_near, results, expected))


def _near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not y.numel():
        return True
    allowed = max(_ROUNDINGS * torch.finfo(y.dtype).eps, _TF32_ROUNDING)
    # Differences of nearly equal numbers are exact in float32; float64 results keep their precision.
    x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
    finite = y.isfinite()
    same = torch.where(finite, x.isfinite(), (x == y) | (x.isnan() & y.isnan()))
    y = y.where(finite, 0.0)
    # Relative to the largest element, so that squares do not overflow.
    size = y.abs().max().clamp_min(torch.finfo(y.dtype).tiny)
    error, y = (x.where(finite, 0.0) - y) / size, y / size
    near = error.abs().max() <= allowed
    near &= error.square().mean() <= (allowed / 4) ** 2 * y.square().mean()
    return bool(same.all() & near)


def device_seconds(trial: Trial[Any]) -> float:
    """Median seconds of a run with a cold L2; synchronizes with the current stream of the trial's device."""
    with torch.cuda.device(trial.device):
        flushed = _flush_buffer(trial.device)
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(_RUNS)
        ]
        for start, end in events:
            for _ in range(_FLUSHES):
                flushed.zero_()
            start.record()
            trial.run()
            end.record()
        # Do not synchronize the whole device: other streams may wait for other processes.
        events[-1][1].synchronize()
        milliseconds = sorted(start.elapsed_time(end) for start, end in events)
    return milliseconds[_RUNS // 2] / 1e3


@functools.lru_cache(maxsize=1)
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)


def release() -> None:
    """Free the buffer that `device_seconds` holds on the device."""
    _flush_buffer.cache_clear()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph, where synchronizing is not allowed."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())
