"""The results as one picture that reads in black and white."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flmoe_kernels.core.files import write_whole

from .data import EXPERTS
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

# Grey and hatch tell the two layers apart without colour.
REFERENCE_BAR: dict[str, Any] = {"color": "0.85", "edgecolor": "black", "hatch": "///"}
FAST_BAR: dict[str, Any] = {"color": "0.35", "edgecolor": "black"}
BAR = 0.38


def write_figure(results: Results, target: Path) -> None:
    # Figure itself, not pyplot: no window system is looked for and no global state changes.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _reliance(panels[0][0], results)
    _accuracy(panels[0][1], results)
    _times(panels[1][0], results)
    _memory(panels[1][1], results)
    write_whole(target, lambda path: figure.savefig(path, dpi=120))


def _reliance(axes: Axes, results: Results) -> None:
    shares = [result.reliance.share for result in results.tasks]
    axes.imshow(shares, cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(EXPERTS)), EXPERTS)
    axes.set_yticks(range(len(results.tasks)), [result.task.name for result in results.tasks])
    for row, result in enumerate(results.tasks):
        for column, share in enumerate(result.reliance.share):
            star = "*" if EXPERTS[column] == result.reliance.most["share"] else ""
            ink = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.0%}{star}", ha="center", va="center", color=ink)
        expected = EXPERTS.index(result.task.expert)
        axes.add_patch(_frame(expected, row))
    axes.set_xlabel("expert")
    axes.set_ylabel("task")
    axes.set_title("Share of each expert in the answer\nframe: by construction, *: largest")


def _frame(column: int, row: int) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, lw=3, ec="black")


def _accuracy(axes: Axes, results: Results) -> None:
    places = range(len(results.tasks))
    before = [result.before for result in results.tasks]
    after = [result.after for result in results.tasks]
    _pair(axes, before, after, "{:.1%}")
    for place, result in zip(places, results.tasks, strict=True):
        label = "chance" if place == 0 else ""
        axes.hlines(result.task.chance, place - 0.45, place + 0.45, "black", "dotted", label=label)
    axes.set_xticks(places, [result.task.name for result in results.tasks])
    axes.set_ylim(0.0, 1.25)
    axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_ylabel("test accuracy")
    axes.set_title("Accuracy before and after the swap")
    axes.legend(loc="upper right", ncols=3)


def _times(axes: Axes, results: Results) -> None:
    reference = [times.reference * 1e3 for times in results.times.values()]
    fast = [times.fast * 1e3 for times in results.times.values()]
    _pair(axes, reference, fast, "{:.1f}")
    ratios = [f"{name}\n{times.speed_up:.1f}x" for name, times in results.times.items()]
    axes.set_xticks(range(len(ratios)), ratios)
    axes.set_ylim(0.0, max(*reference, *fast) * 1.25)
    axes.set_ylabel("milliseconds")
    axes.set_title(f"Time, batch {results.settings.batch_size} (median)")
    axes.legend(loc="upper right")


def _memory(axes: Axes, results: Results) -> None:
    reference, fast = (results.memory[name].bytes / 2**20 for name in ("reference", "fast"))
    _pair(axes, [reference], [fast], "{:.1f}")
    axes.set_xticks([0], ["training step"])
    axes.set_xlim(-1.0, 1.0)
    axes.set_ylim(0.0, max(reference, fast, 1.0) * 1.25)
    axes.set_ylabel("MiB")
    axes.set_title("Peak memory of one step")
    axes.legend(loc="upper right")


def _pair(axes: Axes, reference: list[float], fast: list[float], form: str) -> None:
    """Bars of both layers side by side, their values above them."""
    for values, shift, name, style in (
        (reference, -BAR / 2, "reference", REFERENCE_BAR),
        (fast, BAR / 2, "fast", FAST_BAR),
    ):
        places = [place + shift for place in range(len(values))]
        bars = axes.bar(places, values, BAR, label=name, **style)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=8)
