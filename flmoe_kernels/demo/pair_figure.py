"""One sample of each task taken apart, as a picture that reads in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .data import GRID
from .files import write_whole
from .token_pairs import PairResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_pair_figure(results: Sequence[PairResult], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.1 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False, width_ratios=(1, 1, 1.25))
    for row, result in zip(panels, results, strict=True):
        for m, name in enumerate("AB"):
            _patches(row[m], result, m, name)
        _pairs(row[2], result)
    figure.suptitle(
        "Exact, for the logit of the true class: Shapley values of patches in percent of all their sizes\n"
        "(slanted: against the class), and interaction indices of pairs of patches"
    )
    write_whole(target, lambda path: figure.savefig(path, dpi=120))


def _patches(axes: Axes, result: PairResult, m: int, name: str) -> None:
    """The image, and on every patch its value in percent of all values' sizes."""
    picture = result.picture
    axes.imshow(picture.images[m], cmap="Greys", vmin=0.0, vmax=1.6)
    whole = sum(abs(value) for values in picture.patches for value in values) or 1.0
    side = len(picture.images[m]) / GRID
    for place, value in enumerate(picture.patches[m]):
        x, y = (side * (cell + 0.5) - 0.5 for cell in (place % GRID, place // GRID))
        percent = round(100 * value / whole)
        style = "normal" if percent >= 0 else "italic"
        weight = "bold" if abs(percent) >= 5 else "normal"
        box = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1.0}
        axes.text(
            x, y, str(percent), ha="center", va="center", style=style, weight=weight, bbox=box
        )
    axes.set_xticks([])
    axes.set_yticks([])
    title = f"{name} shows {picture.digits[m]}"
    if m == 0:
        axes.set_ylabel(result.task.name)
        title = f"label {picture.label}, answer {picture.guess}; {title}"
    axes.set_title(title)


def _pairs(axes: Axes, result: PairResult) -> None:
    phi = torch.tensor(result.picture.pairs)
    size = float(phi.abs().max()) or 1.0
    image = axes.imshow(phi.tolist(), cmap="Greys", vmin=0.0, vmax=size)
    rows, columns = (phi < -0.1 * size).nonzero().unbind(1)
    axes.scatter(columns.tolist(), rows.tolist(), marker="_", color="black", linewidths=1.5)
    axes.set_xlabel("patch of B")
    axes.set_ylabel("patch of A")
    axes.set_title(f"pairs; dash: below {-0.1 * size:.2g}")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
