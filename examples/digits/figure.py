"""Figure of one explained pair per task, readable in black and white."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .data import GRID, NUM_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_pairs(results: Mapping[str, Any]) -> Figure:
    """Figure with a row per task: both images with the values of their patches, and the pairs of patches."""
    from matplotlib.figure import Figure

    layers = results["token_pair_layer"]
    figure = Figure(figsize=(10.5, 3.2 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), 3, squeeze=False, width_ratios=(1, 1, 1.3))
    for row, (name, layer) in zip(panels, layers.items(), strict=True):
        sample = layer["first_sample"]
        for m in range(2):
            _patches(row[m], sample, m)
        a, b = sample["digits"]
        row[0].set_ylabel(name)
        row[0].set_title(f"label {sample['label']}, prediction {sample['guess']}; A shows {a}")
        row[1].set_title(f"B shows {b}")
        _pairs(row[2], sample)
    figure.suptitle(
        "Exact explanations of the true class's logit. On the images: Shapley values of patches, in percent of\n"
        "the sum of |values|. Right: interaction indices of pairs of patches. Hatched: padding, without values."
    )
    return figure


def _patches(axes: Axes, sample: Mapping[str, Any], m: int) -> None:
    """Draw an image, and on every patch its value in percent of the sum of |values|."""
    image = sample["images"][m]
    axes.imshow(image, cmap="Greys", vmin=0.0, vmax=1.6)
    whole = sum(abs(value) for values in sample["patches"] for value in values) or 1.0
    side = len(image) / GRID
    for place, value in enumerate(sample["patches"][m]):
        valid = sample["valid"][m][place]
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
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1.0},
        )
    axes.set_xticks([])
    axes.set_yticks([])


def _pairs(axes: Axes, sample: Mapping[str, Any]) -> None:
    """Draw the pairs in greys around 0: darker values support the class, lighter values oppose it."""
    size = max(abs(value) for row in sample["pairs"] for value in row) or 1.0
    image = axes.imshow(sample["pairs"], cmap="Greys", vmin=-size, vmax=size)
    rows, columns = sample["valid"]
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
    _rectangle(axes, left, top, width, height, fc="white", ec="grey", hatch="////", lw=0.0)


def _rectangle(
    axes: Axes, left: float, top: float, width: float, height: float, **style: Any
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, height, **style))
