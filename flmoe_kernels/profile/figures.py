"""Figure of the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^v<>pPX*h"
STYLES = ("solid", "dashed", "dashdot", "dotted")
_MARGIN = 4.0  # factor by which the axes extend beyond the points


@dataclass(frozen=True)
class Point:
    """A measurement: FLOP and bytes of a call, its median seconds and their interval."""

    label: str
    flop: float
    bytes: float
    seconds: float
    low: float
    high: float
    ours: bool

    @property
    def intensity(self) -> float:
        """FLOP per byte of inputs and results."""
        return self.flop / self.bytes

    @property
    def rate(self) -> float:
        return self.flop / self.seconds


@dataclass(frozen=True)
class Roof:
    """Ceilings of a machine: FLOP/s by dtype, and bytes/s of a copy."""

    flops: Mapping[str, float]
    copy: float


def roofline_figure(points: Sequence[Point], roof: Roof, *, title: str = "") -> Figure:
    """Plot FLOP/s over FLOP per byte, both logarithmic; the distance below the line is the possible speed-up.

    Markers of this package are filled, those of peers are open. Every contestant has its own marker, and every
    dtype's ceiling its own line style. Bars are the interval of the median, mostly smaller than the marker.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from flmoe_kernels.core.figures import make_figure, plain

    figure = make_figure(8.5, 5.5)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    knees = [top / roof.copy for top in roof.flops.values()]
    places = [point.intensity for point in points] + knees
    x = np.geomspace(min(places) / _MARGIN, max(places) * _MARGIN, 200)
    for number, (dtype, top) in enumerate(roof.flops.items()):
        axes.plot(
            x,
            np.minimum(top, x * roof.copy),
            color="black",
            ls=STYLES[number % len(STYLES)],
            label=f"{dtype}: matmul {rate_text(top)}FLOP/s, copy {rate_text(roof.copy)}B/s",
        )
    for number, point in enumerate(points):
        _draw(axes, point, MARKERS[number % len(MARKERS)], plain(point.label))
    axes.set_xlabel("FLOP per byte of inputs and outputs")
    axes.set_ylabel("FLOP/s")
    axes.grid(True, which="major", color="0.85", lw=0.6)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0.0, -0.12), frameon=False)
    if title:
        axes.set_title(plain(title), fontsize="medium")
    return figure


def _draw(axes: Axes, point: Point, marker: str, label: str) -> None:
    rates = [point.flop / point.high, point.rate, point.flop / point.low]
    axes.errorbar(
        [point.intensity],
        [point.rate],
        yerr=[[rates[1] - rates[0]], [rates[2] - rates[1]]],
        color="black",
        marker=marker,
        markersize=8,
        mfc="black" if point.ours else "white",
        ls="none",
        capsize=3,
        label=f"{label}: {rate_text(point.rate)}FLOP/s",
        zorder=3,
    )


def rate_text(rate: float) -> str:
    """Format a rate with three digits and the prefix of a unit: 1.23e12 is "1.23 T"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g} {prefix}"
    return f"{rate:.3g} "
