"""Time and memory over sequence length: ours and the peers at a shape that is stretched."""

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

# A call that is expected to take longer, or a larger share of the free memory, is not begun.
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
    """Contestants of a case at several lengths, the shortest first.

    A contestant that fails, cannot run, or by extrapolation would need too much time or memory at a length is
    left out from that length on, with the reason.

    Args:
        names: of contestants of the case.
        seconds: of timing for each.
        lengths: from 1.
        peak: measures bytes, before the time: on a CPU in a process of its own, which may run out of memory.

    Raises:
        ValueError: no lengths, or one below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths: expected numbers from 1, got {list(lengths)}")
    found: list[LengthPoint] = []
    for length in sorted(set(lengths)):
        here = dataclasses.replace(case, shape=at_length(case.shape, length))
        known = {x.name: x for x in contestants(here)}
        peaks: dict[str, int | None] = {}
        for name in names:
            own = [point for point in found if point.contestant == name]
            why_not = known[name].why_not or _too_much(own, length, here.device)
            if not why_not:
                tell(f"memory of {name} at {length}")
                try:
                    found_peak = peak(here, known[name])
                    prepare(here, known[name]).call()
                except Exception as error:  # whatever a peer's compiler raises
                    why_not = words_of(error)
                else:
                    peaks[name] = found_peak
            if why_not:
                ours = known[name].kind == OURS
                found.append(LengthPoint(length, name, ours, None, None, None, None, why_not))
        tell(f"timing {', '.join(peaks)} at {length}")
        found += _timed(here, length, [known[name] for name in peaks], peaks, seconds)
    return found


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
    found = []
    for contestant in running:
        spread = blocks.of(contestant.name)
        found.append(
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
    return found


def _too_much(own: Sequence[LengthPoint], length: int, device: str) -> str:
    """Why a contestant goes no further, from what it took at shorter lengths, or ""."""
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
    """By the growth between the last two lengths, from linear to quadratic; quadratic after the first."""
    if not known:
        return 0.0
    last, value = known[-1]
    power = 2.0
    if len(known) > 1:
        before, smaller = known[-2]
        power = min(2.0, max(1.0, math.log(value / smaller) / math.log(last / before)))
    return value * (length / last) ** power


def free_bytes(device: str) -> float:
    """What a call can still have; without end where the system does not tell."""
    if is_cuda(device):
        return float(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return math.inf
