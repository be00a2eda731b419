"""Figure of the experts' weights, by sample and averaged over samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.core.figures import make_figure
from flmoe_kernels.explain.games.coalitions import Floats
from flmoe_kernels.explain.reliability import LEAST_COUNT, TIE_ERRORS, error_of_mean
from flmoe_kernels.ops.pair_moe.results import NEAR_TIE

from .canvas import WHITE_BOX, require_array, require_sized, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = f"not distinguishable (fewer than {LEAST_COUNT} samples)"
_MOST_NUMBERS = 24  # samples with a number in every cell
_MOST_LABELS = 32
_LEVEL_LETTERS = 24  # total length of names that fit horizontally


def expert_weights(weights: Any, names: Sequence[str], *, title: str = "") -> Figure:
    """Plot the experts' weights of every sample in grey, and their mean over samples as bars, both from 0.

    The title of the bars names the expert of largest mean, or the experts that are tied, see `leading`. For 2 to
    15 samples it states that the means are not distinguishable.

    Args:
        weights: (S, E), finite.
        names: E experts.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: an invalid argument; the message says what was expected and what was passed.
    """
    array = require_array("weights", weights, "S, E", ", such as Attribution.weights")
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"weights: expected finite weights (S, E), got {array.shape}, not finite")
    require_sized("names", names, array.shape[1], ", one for each expert")
    heights = (min(9.0, max(2.2, 0.3 * len(array) + 1.4)), 3.4)
    # One above the other, so that the figure is readable on a narrow screen.
    figure = make_figure(max(4.6, 0.6 * len(names) + 1.4), sum(heights))
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    experts = [short(str(name)) for name in names]
    _by_sample(upper, array, experts)
    _overall(lower, array, experts)
    if title:
        figure.suptitle(title)
    return figure


def leading(weights: Floats) -> list[int]:
    """Return the expert of largest mean weight (S, E) and the experts tied with it, largest first.

    Tied: within two standard errors, over samples, of the mean difference, or within 5% of the largest mean. A
    single sample has exact weights; means of fewer than LEAST_COUNT samples have unknown errors: all are tied.
    """
    mean = weights.mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    gaps, count = weights[:, order[:1]] - weights, len(weights)
    squares = np.square(gaps - gaps.mean(axis=0)).sum(axis=0)
    error = error_of_mean(squares, count) if count >= LEAST_COUNT else 0.0 if count == 1 else np.inf
    close = mean[order[0]] - mean <= np.maximum(TIE_ERRORS * error, NEAR_TIE * mean[order[0]])
    return [int(k) for k in order if close[k]]


def _by_sample(axes: Axes, weights: Floats, names: list[str]) -> None:
    top = max(1.0, float(weights.max()))
    image = axes.imshow(weights, cmap="Greys", vmin=0.0, vmax=top, aspect="auto")
    if len(weights) <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(weights):
            ink = "white" if value > 0.5 * top else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_yticks(range(0, len(weights), max(1, -(-len(weights) // _MOST_LABELS))))
    _name_columns(axes, names)
    axes.set_ylabel("sample")
    axes.set_title("weight of each expert, by sample", fontsize="medium")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)


def _overall(axes: Axes, weights: Floats, names: list[str]) -> None:
    mean = weights.mean(axis=0)
    spread = weights.std(axis=0, ddof=1) if len(weights) > 1 else None
    bars = axes.bar(
        range(len(names)), mean, yerr=spread, color="0.75", edgecolor="black", capsize=4, hatch="//"
    )
    numbers = [f"{value:.2f}" for value in mean]
    axes.bar_label(bars, numbers, label_type="center", fontsize=9, bbox=WHITE_BOX)
    _name_columns(axes, names)
    axes.set_ylim(0.0, 1.08 * max(1.0, float((mean + (0.0 if spread is None else spread)).max())))
    axes.set_ylabel("weight")
    what = "one sample" if spread is None else f"mean of {len(weights)} samples, ± std over samples"
    best, *others = (names[k] for k in leading(weights))
    which = f"largest: {best}"
    if others and 1 < len(weights) < LEAST_COUNT:
        which = FEW
    elif others:
        tied = [best, *others]
        which = f"tied for the largest: {', '.join(tied) if len(tied) < 4 else len(tied)}"
    axes.set_title(f"{what}\n{which}", fontsize="medium")


def _name_columns(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    if sum(map(len, names)) > _LEVEL_LETTERS:
        axes.tick_params(axis="x", rotation=90)
