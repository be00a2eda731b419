"""A comparison as a picture: how much faster or slower each case became, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .compare import Change, Comparison, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def comparison_figure(comparison: Comparison) -> Figure:
    """One line for each case and peer: speed after over before on a logarithmic axis, bars for the interval.

    Regressions are red squares with a bar that ends left of the dashed limit; it reads in black and white too.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from flmoe_kernels.core.figures import make_figure, plain

    changes = comparison.changes
    figure = make_figure(9.0, 1.6 + 0.32 * len(changes))
    axes = figure.subplots()
    axes.set_xscale("log")
    for place, change in enumerate(changes):
        axes.errorbar(
            [change.speed],
            [place],
            xerr=[[change.speed - change.low], [change.high - change.speed]],
            marker="s" if change.regression else "o",
            mfc="#b2182b" if change.regression else "white",
            color="#b2182b" if change.regression else "black",
            capsize=3,
        )
    axes.axvline(1.0, color="0.6", lw=0.8)
    axes.axvline(comparison.fail_below, color="#b2182b", lw=0.8, ls="dashed")
    axes.set_yticks(range(len(changes)), [plain(_label(change)) for change in changes])
    axes.invert_yaxis()
    low, high = (end(comparison) for end in (_lowest, _highest))
    axes.set_xlim(low / 1.1, high * 1.1)
    axes.set_xticks(*_ticks(low, high))
    axes.minorticks_off()
    axes.set_xlabel(f"speed after / before, by {comparison.by}, with 95% intervals")
    before, after = describe(comparison.before), describe(comparison.after)
    axes.set_title(f"{plain(f'before: {before}')}\n{plain(f'after: {after}')}", fontsize="small")
    return figure


def save_figure(comparison: Comparison, path: Path) -> None:
    """Write the picture in the format that the file's name ends in.

    Raises:
        ValueError: no format of FORMATS.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"plot: expected a name in {', '.join(FORMATS)}, got {path.name!r}")
    figure = comparison_figure(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _label(change: Change) -> str:
    return f"{change.case} vs {change.peer}" if change.peer else change.case


def _lowest(comparison: Comparison) -> float:
    return min(0.9, comparison.fail_below, *(change.low for change in comparison.changes))


def _highest(comparison: Comparison) -> float:
    return max(1.1, *(change.high for change in comparison.changes))


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round factors within the axis, and as text."""
    steps = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
    found = [step for step in steps if low / 1.1 <= step <= high * 1.1]
    wide = high / low > 4
    return found, [
        f"{step:g}x" if not wide or step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) else ""
        for step in found
    ]
