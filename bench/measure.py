"""Timing contestants side by side, and the memory of one, in processes of its own."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import flmoe_kernels
from flmoe_kernels.backend import instruction_set


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 20th and 80th percentile of `rounds` calls."""

    p50: float
    p20: float
    p80: float
    rounds: int


def timing_of(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], len(seconds))
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[3], len(seconds))


def seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    calls: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time the calls in turn, `rounds` times, so that a noisy moment of the machine hits all of them."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    return {name: timing_of(values) for name, values in seconds.items()}


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _grow(make: Callable[..., Callable[[], None]], args: tuple, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    call = make(*args)
    before = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    call()
    pipe.send((_status_kib("VmHWM") - before) * 1024)


def peak_growth(make: Callable[..., Callable[[], None]], *args: Any) -> int:
    """Bytes by which the resident set of a fresh process grows at most while it makes two calls.

    `make(*args)` builds the call in that process; its parameters and inputs do not count. Linux only.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(target=_grow, args=(make, args, threads, send))
    process.start()
    send.close()
    try:
        return int(receive.recv())
    finally:
        process.join()


def environment() -> dict[str, Any]:
    """What a result depends on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "flmoe_kernels": flmoe_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def as_dict(timing: Timing) -> dict[str, float]:
    return asdict(timing)


def gate_ratio(
    benchmark: Any,
    fast: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    floor: float,
    rounds: int,
    what: str,
    peer_name: str,
    flop: int | None = None,
) -> None:
    """Fail when fast is not `floor` times as fast as peer: the median of ratios of calls that take turns.

    A gate on seconds would fail with the machine's mood; a ratio to a peer that runs in turn in the same
    process does not. Each round times the peer first (pytest-benchmark's untimed set-up) and then `fast`.

    Args:
        what: operator, pass and shape, for the message.
        flop: of one call, for the recorded rate.
    """
    peer_seconds: list[float] = []

    def time_peer() -> None:
        peer_seconds.append(seconds_of(peer))

    benchmark.pedantic(fast, setup=time_peer, rounds=rounds, iterations=1, warmup_rounds=1)
    fast_seconds = benchmark.stats.stats.data
    ratios = [p / f for p, f in zip(peer_seconds[-rounds:], fast_seconds, strict=True)]
    ratio, spread = statistics.median(ratios), [min(ratios), max(ratios)]
    benchmark.extra_info.update(environment(), peer=peer_name, ratio=ratio, ratio_spread=spread)
    if flop is not None:
        benchmark.extra_info["gflops"] = flop / statistics.median(fast_seconds) / 1e9
    assert ratio >= floor, (
        f"{what}: expected at least {floor}x the {peer_name}, measured {ratio:.2f}x "
        f"({spread[0]:.2f} to {spread[1]:.2f} in {rounds} rounds)"
    )
