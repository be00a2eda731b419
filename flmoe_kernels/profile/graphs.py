"""Calls as CUDA graphs, and the time that the host takes for a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from flmoe_gate.timing import Call, clock_for, measure_blocks

from .registry import words_of
from .shapes import is_cuda

# Calls before a capture, which compile and choose algorithms.
_WARM_UPS = 3
_HOST_CALLS = 10
# A call is host-bound if it takes so many times as long as its replay.
HOST_BOUND = 1.25


def graphed(call: Call, device: str) -> Call:
    """A call that replays `call` as a CUDA graph; on a CPU, `call` itself."""
    if not is_cuda(device):
        return call
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

    def replay(_keeps_inputs: Call = call) -> None:
        graph.replay()

    return replay


def host_seconds(call: Call, device: str) -> float:
    """Median time until a call returns, without waiting for the GPU."""
    seconds = []
    for _ in range(_HOST_CALLS):
        if is_cuda(device):
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def replay_facts(
    make: Callable[[], Call], called_seconds: float, device: str, seconds: float
) -> dict[str, Any]:
    """Facts about a call that takes `called_seconds`, for a result file.

    Args:
        make: makes inputs and the call.
        seconds: time limit for the replays.

    Returns:
        host_seconds; replay_seconds, or the reason why the call cannot be captured; host_bound.
    """
    facts: dict[str, Any] = {"host_seconds": host_seconds(make(), device)}
    try:
        blocks = measure_blocks(
            lambda: {"replay": graphed(make(), device)},
            clock_for(device),
            rounds=6,
            precision=0.05,
            seconds=seconds,
        )
    except Exception as error:  # whatever the capture of a peer raises
        return facts | {"not_captured": words_of(error)}
    replayed = blocks.of("replay").median
    bound = is_cuda(device) and called_seconds > HOST_BOUND * replayed
    return facts | {"replay_seconds": replayed, "host_bound": bound}
