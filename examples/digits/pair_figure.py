"""The explanation of one sample of each task as a picture that reads in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flmoe_kernels.core.files import write_whole

from .data import GRID, NUM_TOKENS
from .token_pairs import PairResult, SampleExplanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCH = "////"


def write_pair_figure(results: Sequence[PairResult], target: Path) -> None:
    figure = draw_pair_figure(results)
    write_whole(target, lambda path: figure.savefig(path, dpi=120))


def draw_pair_figure(results: Sequence[PairResult]) -> Figure:
    """A row for each task: both images with the patches' values, and the pairs of patches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False, width_ratios=(1, 1, 1.3))
    for row, result in zip(panels, results, strict=True):
        for m, name in enumerate("AB"):
            _patches(row[m], result, m, name)
        _pairs(row[2], result.sample)
    figure.suptitle(
        "Exact explanations of the true class's logit. On the images: Shapley values of patches, in percent of\n"
        "the sum of |values|. Right: interaction indices of pairs of patches. Hatched: padding, which has none."
    )
    return figure


def _patches(axes: Axes, result: PairResult, m: int, name: str) -> None:
    """The image, and on every patch its value in percent of the sum of |values|."""
    sample = result.sample
    axes.imshow(sample.images[m], cmap="Greys", vmin=0.0, vmax=1.6)
    whole = sum(abs(value) for values in sample.patches for value in values) or 1.0
    side = len(sample.images[m]) / GRID
    for place, (value, valid) in enumerate(zip(sample.patches[m], sample.valid[m], strict=True)):
        left, top = (side * cell - 0.5 for cell in (place % GRID, place // GRID))
        if not valid:
            _hatch(axes, left, top, side, side)
        percent = round(100 * value / whole)
        axes.text(
            left + side / 2,
            top + side / 2,
            f"{percent:d}" if valid else "-",
            ha="center",
            va="center",
            weight="bold" if abs(percent) >= 5 else "normal",
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1.0},
        )
    axes.set_xticks([])
    axes.set_yticks([])
    title = f"{name} shows {sample.digits[m]}"
    if m == 0:
        axes.set_ylabel(result.task.name)
        title = f"label {sample.label}, answer {sample.guess}; {title}"
    axes.set_title(title)


def _pairs(axes: Axes, sample: SampleExplanation) -> None:
    """Greys around 0: darker is for the class, lighter against it."""
    size = max(abs(value) for row in sample.pairs for value in row) or 1.0
    image = axes.imshow(sample.pairs, cmap="Greys", vmin=-size, vmax=size)
    rows, columns = sample.valid
    for i in range(NUM_TOKENS):
        if not rows[i]:
            _hatch(axes, -0.5, i - 0.5, NUM_TOKENS, 1)
        if not columns[i]:
            _hatch(axes, i - 0.5, -0.5, 1, NUM_TOKENS)
    axes.set_xticks(range(0, NUM_TOKENS, 5))
    axes.set_yticks(range(0, NUM_TOKENS, 5))
    axes.set_xlabel("patch of B")
    axes.set_ylabel("patch of A")
    axes.set_title("pairs of patches, all experts")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, ticks=[-size, 0.0, size])
    bar.ax.set_yticklabels([f"{-size:.2g} against", "0", f"{size:.2g} for the class"])


def _hatch(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((left, top), width, height, fc="white", ec="grey", hatch=HATCH, lw=0.0)
    )
