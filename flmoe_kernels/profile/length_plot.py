"""Time and memory over sequence length, as a picture that reads in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .roofline_plot import MARKERS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIB = 2**20


@dataclass(frozen=True)
class LengthPoint:
    """One contestant at one length: the median of its seconds with the interval, and the peak of its bytes.

    why_not: why it has not been measured there; seconds and peak_bytes are None then.
    """

    length: int
    contestant: str
    ours: bool
    seconds: float | None
    low: float | None
    high: float | None
    peak_bytes: int | None
    why_not: str = ""


def length_figure(points: Sequence[LengthPoint], *, title: str = "") -> Figure:
    """Two panels on logarithmic axes, one line for each contestant: solid and filled for this package's.

    A line ends where its contestant could not go on; the legend says so.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing was measured.
    """
    from flmoe_kernels.core.figures import make_figure, plain

    if not any(point.seconds for point in points):
        raise ValueError("points: expected one that was measured at least, got none")
    figure = make_figure(10.5, 5.0)
    time, memory = figure.subplots(1, 2)
    names = list(dict.fromkeys(point.contestant for point in points))
    lengths = sorted({point.length for point in points})
    for number, name in enumerate(names):
        own = sorted(
            (point for point in points if point.contestant == name), key=lambda p: p.length
        )
        style = {
            "color": "black" if own[0].ours else "0.35",
            "marker": MARKERS[number % len(MARKERS)],
            "mfc": "black" if own[0].ours else "white",
            "ls": "solid" if own[0].ours else STYLES[1 + number % (len(STYLES) - 1)],
            "label": _legend(plain(name), own),
        }
        _times(time, own, style)
        held = [(point.length, point.peak_bytes / _MIB) for point in own if point.peak_bytes]
        if held:
            memory.plot(*zip(*held, strict=True), **style)
    for axes, what, unit in ((time, "time of a call", "s"), (memory, "peak memory", "MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel(f"{what} ({unit})")
        axes.grid(True, color="0.85", lw=0.6)
    time.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0.0, -0.15), frameon=False)
    if title:
        figure.suptitle(plain(title))
    return figure


def _times(axes: Axes, own: Sequence[LengthPoint], style: dict[str, Any]) -> None:
    known = [
        (point.length, point.seconds, point.low or 0.0, point.high or 0.0)
        for point in own
        if point.seconds is not None
    ]
    if not known:
        return
    lengths, seconds, low, high = (np.array(values) for values in zip(*known, strict=True))
    axes.errorbar(lengths, seconds, yerr=[seconds - low, high - seconds], capsize=3, **style)


def _legend(name: str, own: Sequence[LengthPoint]) -> str:
    left = [point for point in own if point.why_not]
    if not left:
        return name
    return f"{name} (not at {', '.join(str(point.length) for point in left)}: {left[0].why_not})"
