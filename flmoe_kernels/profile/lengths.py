"""Time and memory of contestants over sequence length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .cases import Case
from .figures import LengthPoint
from .memory import peak_bytes
from .profiles import Tell, time_subjects
from .registry import OURS, Contestant, contestants, prepare, words_of
from .request import subjects_of
from .shapes import at_length, is_cuda

# A call that is expected to take longer, or a larger share of the free memory, is not started.
MOST_SECONDS = 30.0
MOST_MEMORY = 0.6
_MEMINFO = Path("/proc/meminfo")

Peak = Callable[[Case, Contestant], "int | None"]


def scan(
    case: Case,
    names: Sequence[str],
    lengths: Sequence[int],
    seconds: float,
    *,
    peak: Peak = peak_bytes,
    tell: Tell = lambda message: None,
) -> list[LengthPoint]:
    """Measure contestants of a case at several lengths, the shortest first.

    A contestant is left out from the first length on at which it fails, cannot run, or by extrapolation would need
    too much time or memory; the point has the reason.

    Args:
        names: of contestants of the case.
        seconds: time limit for each contestant and length.
        lengths: at least 1.
        peak: measures bytes, before the timing; on a CPU in a separate process, which may run out of memory.

    Raises:
        ValueError: no lengths, or a length below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths: expected positive numbers, got {list(lengths)}")
    points: list[LengthPoint] = []
    for length in sorted(set(lengths)):
        here = dataclasses.replace(case, shape=at_length(case.shape, length))
        known = {x.name: x for x in contestants(here)}
        peaks: dict[str, int | None] = {}
        for name in names:
            own = [point for point in points if point.contestant == name]
            why_not = known[name].why_not or _too_much(own, length, here.device)
            if not why_not:
                tell(f"memory of {name} at {length}")
                try:
                    held = peak(here, known[name])
                    prepare(here, known[name]).call()
                except Exception as error:  # a peer's compiler may raise any exception
                    why_not = words_of(error)
                else:
                    peaks[name] = held
            if why_not:
                ours = known[name].kind == OURS
                points.append(LengthPoint(length, name, ours, None, None, None, None, why_not))
        tell(f"timing {', '.join(peaks)} at {length}")
        points += _timed(here, length, [known[name] for name in peaks], peaks, seconds)
    return points


def _timed(
    case: Case,
    length: int,
    running: Sequence[Contestant],
    peaks: dict[str, int | None],
    seconds: float,
) -> list[LengthPoint]:
    if not running:
        return []
    subjects = subjects_of(case, running)
    blocks = time_subjects(subjects, seconds)
    points = []
    for contestant in running:
        spread = blocks.of(contestant.name)
        points.append(
            LengthPoint(
                length=length,
                contestant=contestant.name,
                ours=contestant.kind == OURS,
                seconds=spread.median,
                low=spread.low,
                high=spread.high,
                peak_bytes=peaks[contestant.name],
            )
        )
    return points


def _too_much(own: Sequence[LengthPoint], length: int, device: str) -> str:
    """Return the reason to leave out a contestant, by extrapolation from shorter lengths, or ""."""
    if own and own[-1].why_not:
        return own[-1].why_not
    seconds = _expected([(x.length, x.seconds) for x in own if x.seconds], length)
    if seconds > MOST_SECONDS:
        return f"a call would take about {seconds:.0f} s"
    held = _expected([(x.length, float(x.peak_bytes)) for x in own if x.peak_bytes], length)
    if held > MOST_MEMORY * free_bytes(device):
        return f"a call would take about {held / 2**30:.1f} GiB"
    return ""


def _expected(known: Sequence[tuple[int, float]], length: int) -> float:
    """Extrapolate by the growth between the last two lengths, linear to quadratic; quadratic from one length."""
    if not known:
        return 0.0
    last, value = known[-1]
    power = 2.0
    if len(known) > 1:
        before, smaller = known[-2]
        power = min(2.0, max(1.0, math.log(value / smaller) / math.log(last / before)))
    return value * (length / last) ** power


def free_bytes(device: str) -> float:
    """Return the free memory in bytes; infinity if the system does not report it."""
    if is_cuda(device):
        return float(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return math.inf
