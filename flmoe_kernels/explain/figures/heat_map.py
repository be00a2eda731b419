"""Heat map of token pairs, and patch weights over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.core.figures import make_figure
from flmoe_kernels.explain.games.coalitions import Floats, Ints
from flmoe_kernels.explain.reliability import alike

from .canvas import (
    ABSENT,
    DIVERGING,
    DOTS,
    WHITE_BOX,
    fill_cells,
    hatch_negative,
    label_of,
    limit_of,
    require_array,
    require_errors,
    require_tokens,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NUMBERS = 12  # rows or columns; in larger maps the numbers of cells would overlap
_MOST_LABELS = 32
_OPAQUE = 0.75
_IMAGE_HEIGHT = 3.8
_ALIKE = "one colour: not distinguishable at 2 s.e."


def token_patch_map(
    values: Any,
    tokens: Sequence[str] | None = None,
    image: Any = None,
    grid: tuple[int, int] | None = None,
    *,
    errors: Any = None,
    patches: Sequence[str] | None = None,
    weights: Any = None,
    weights_label: str = "sum over tokens",
    title: str = "",
    unit: str = "SII (logit)",
    row_name: str = "token",
    column_name: str = "patch",
) -> Figure:
    """Plot a heat map token x patch and, if there is an image, the image with the weights of its patches.

    Colours start at 0, with the same limit on both sides; cells below 0 are hatched, and small maps show numbers.
    Values within two standard errors of each other, directly or through other values, have one colour: their mean,
    or 0 and dots if they are tied across 0, that is, not clearly on one side. Rows and columns without any value
    are left out; other pairs that are not candidates (NaN) are grey.

    Args:
        values: (La, Lb), tokens in rows, patches in columns; NaN for pairs without value.
        errors: (La, Lb), standard errors of the values; NaN: unknown, drawn at 0 and dotted; None: exact.
        tokens, patches: La and Lb strings; None shows positions.
        image: (H, W) or (H, W, 3), floats from 0 to 1 or uint8; shown in grey, so that only weights have colour.
        grid: rows and columns of patches in the image, row by row; by default a square.
        weights: (Lb,), shown over the image; by default the values' sum over tokens. NaN shows nothing.
            Given weights count as exact.
        weights_label: title of the image.
        title: of the figure; unit: of the values; row_name, column_name: labels of the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: an invalid argument; the message says what was expected and what was passed.
    """
    array = require_array("values", values, "La, Lb", ", such as PairValues.between(0, 1)")
    uncertain = require_errors(errors, array)
    require_tokens("tokens", tokens, array.shape[0])
    require_tokens("patches", patches, array.shape[1])
    rows, columns = (np.flatnonzero(np.isfinite(array).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError(f"values: expected at least one finite value, got none in {array.shape}")
    kept = np.ix_(rows, columns)
    line = 0.42 if uncertain.any() else 0.32  # inches; standard errors are a second line
    height = min(9.0, max(3.4, line * len(rows) + 1.9))
    width = min(9.0, max(4.6, 0.5 * len(columns) + 2.6))
    heights: tuple[float, ...] = (height,)
    if image is not None:
        picture, cells = grey(image), _require_grid(grid, array.shape[1])
        over, over_errors = _weights(weights, array, uncertain)
        heights = (height, _IMAGE_HEIGHT)
    # One above the other, so that the figure is readable on a narrow screen.
    figure = make_figure(width, sum(heights))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _map(panels[0], array[kept], uncertain[kept], unit)
    _ticks(panels[0], (rows, columns), (tokens, patches))
    panels[0].set_ylabel(row_name)
    panels[0].set_xlabel(column_name)
    if image is not None:
        _overlay(panels[1], picture, over.reshape(cells), over_errors.reshape(cells), weights_label)
    if title:
        figure.suptitle(title)
    return figure


def grey(image: Any) -> Floats:
    """Luminance (H, W) from 0 to 1 of an image (H, W) or (H, W, 3), floats from 0 to 1 or uint8."""
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.dtype == object:
        raise TypeError(f"image: expected (H, W) or (H, W, 3), got {type(image).__name__}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        raise ValueError(f"image: expected (H, W) or (H, W, 3), got {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"image: expected uint8 or floats from 0 to 1, got {array.dtype}")
    scaled = array.astype(np.float64) / (255.0 if array.dtype == np.uint8 else 1.0)
    if not np.isfinite(scaled).all() or scaled.min() < 0 or scaled.max() > 1:
        raise ValueError("image: expected floats from 0 to 1, got values outside")
    # ITU-R BT.601
    return scaled if scaled.ndim == 2 else scaled @ np.array([0.299, 0.587, 0.114])


def _require_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        grid = (side, side)
        if side * side != patches:
            raise ValueError(f"grid: expected (rows, columns), as {patches} is not a square number")
    if not isinstance(grid, Sized):
        raise TypeError(f"grid: expected a sequence, got {type(grid).__name__}")
    if len(grid) != 2 or grid[0] * grid[1] != patches or min(grid) < 1:
        raise ValueError(f"grid: expected rows x columns of {patches} patches, got {grid}")
    return grid


def _weights(weights: Any, values: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Weights (Lb,), NaN for patches without value, and their standard errors."""
    if weights is None:
        known = np.isfinite(values)
        total = np.where(known, values, 0.0).sum(axis=0)
        # The largest possible error of a sum, because errors of pairs are not independent.
        return np.where(known.any(axis=0), total, np.nan), errors.sum(axis=0)
    array = require_array("weights", weights, "Lb")
    if len(array) != values.shape[1]:
        raise ValueError(f"weights: expected ({values.shape[1]},), got {array.shape}")
    return array, np.zeros_like(array)


def _map(axes: Axes, values: Floats, errors: Floats, unit: str) -> None:
    drawn = alike(values, errors)
    limit = limit_of(values)
    image = axes.imshow(
        np.ma.masked_invalid(drawn), cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto"
    )
    axes.set_facecolor(ABSENT)
    if max(values.shape) <= _MOST_NUMBERS:
        _numbers(axes, values, errors)
    hatch_negative(axes, drawn, limit)
    axes.set_title("\n".join(_notes(axes, values, errors, drawn)), fontsize="small")
    bar = _colour_bar(axes, image, limit, bool((values < 0).any()))
    bar.set_label(f"{unit} \N{PLUS-MINUS SIGN} standard error" if errors.any() else unit)


def _notes(axes: Axes, values: Floats, errors: Floats, drawn: Floats) -> list[str]:
    """Dot the cells that are drawn at 0 because they are tied across 0; describe dots, hatches and colours."""
    across = (drawn == 0) & ((errors != 0) | (values != 0))
    fill_cells(axes, across, DOTS, "0.6")
    signs = ["hatched: below 0"] if (drawn < 0).any() else []
    signs += ["dotted: tied across 0"] if across.any() else []
    return [line for line in ("; ".join(signs), _ALIKE if errors.any() else "") if line]


def _colour_bar(axes: Axes, image: Any, limit: float, signed: bool) -> Any:
    """Add a colour bar that starts at 0 if no value is below 0."""
    ticks = [-limit, 0.0, limit] if signed else [0.0, limit]
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    bar.ax.set_ylim(ticks[0], ticks[-1])
    return bar


def _numbers(axes: Axes, values: Floats, errors: Floats) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        text = f"{values[row, column]:.2g}"
        if np.isfinite(errors[row, column]) and errors[row, column]:
            text += f"\n\N{PLUS-MINUS SIGN}{errors[row, column]:.1g}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, bbox=WHITE_BOX, zorder=3)


def _ticks(
    axes: Axes, places: tuple[Ints, Ints], names: tuple[Sequence[str] | None, Sequence[str] | None]
) -> None:
    """Label rows and columns, at most _MOST_LABELS of them."""
    for which, kept, tokens in zip(("y", "x"), places, names, strict=True):
        step = max(1, math.ceil(len(kept) / _MOST_LABELS))
        at = range(0, len(kept), step)
        labels = [label_of(tokens, int(kept[k])) for k in at]
        if which == "y":
            axes.set_yticks(at, labels)
        else:
            long = tokens is not None or len(labels) > 16
            axes.set_xticks(at, labels, rotation=90 if long else 0)


def _overlay(axes: Axes, picture: Floats, weights: Floats, errors: Floats, label: str) -> None:
    """Draw the image in pale grey, and the patch weights over it; larger |weights| are more opaque."""
    height, width = picture.shape
    rows, columns = weights.shape
    box = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    place: Any = {"extent": box, "interpolation": "nearest"}
    axes.imshow(picture, cmap="gray", vmin=-0.4, vmax=1.0, **place)
    drawn, limit = alike(weights, errors), limit_of(weights)
    alpha = np.nan_to_num(_OPAQUE * np.abs(drawn) / limit)
    colours: Any = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit, "alpha": alpha}
    shown = axes.imshow(np.ma.masked_invalid(drawn), **colours, **place)
    hatch_negative(axes, np.where(np.abs(drawn) > 0.05 * limit, drawn, np.nan), limit)
    notes = _notes(axes, weights, errors, drawn)
    axes.set_aspect((height / rows) / (width / columns))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(label, fontsize="medium")
    axes.set_xlabel("\n".join(notes), fontsize="small")
    _colour_bar(axes, shown, limit, bool((weights < 0).any()))
