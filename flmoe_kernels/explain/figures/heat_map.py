"""Pairs of two modalities as a heat map, and the patches' weights over their image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flmoe_kernels.core.figures import make_figure

from .canvas import (
    ABSENT,
    DIVERGING,
    Floats,
    hatch_negative,
    label_of,
    limit_of,
    require_array,
    require_tokens,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ints = NDArray[np.int64]

_MOST_NUMBERS = 12  # rows or columns with a number in every cell; beyond, they would overlap
_MOST_LABELS = 32
_FRAMED = 5  # patches of largest |weight|, which a frame tells without colour
_OPAQUE = 0.75
_IMAGE_WIDTH = 4.2


def token_patch_map(
    values: Any,
    tokens: Sequence[str] | None = None,
    image: Any = None,
    grid: tuple[int, int] | None = None,
    *,
    patches: Sequence[str] | None = None,
    weights: Any = None,
    weights_label: str = "sum over tokens",
    title: str = "",
    unit: str = "SII (logit)",
    row_name: str = "token",
    column_name: str = "patch",
) -> Figure:
    """A heat map token x patch, and the image with its patches' weights over it where it is given.

    Colours are centred at 0, with the same limit on both sides; cells below 0 are hatched, and small maps have
    their numbers. Rows and columns without one value are left out; what is no candidate (NaN) stays grey.

    Args:
        values: (La, Lb), tokens in rows, patches in columns; NaN where there is no value.
        tokens, patches: La and Lb strings; without them positions.
        image: (H, W) or (H, W, 3), floats from 0 to 1 or uint8; shown in grey, so that colour is the weights'.
        grid: rows and columns of patches in the image, row by row; by default a square.
        weights: (Lb,), shown over the image; by default the values' sum over tokens. NaN shows nothing.
        weights_label: what the weights are.
        title: above all; unit: of the values; row_name, column_name: of the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: naming the argument, what was expected and what came.
    """
    array = require_array("values", values, "La, Lb")
    require_tokens("tokens", tokens, array.shape[0])
    require_tokens("patches", patches, array.shape[1])
    rows, columns = (np.flatnonzero(np.isfinite(array).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError(f"values: expected a finite one at least, got none in {array.shape}")
    shown = array[np.ix_(rows, columns)]
    picture, cells, over = None, (0, 0), np.zeros(0)
    if image is not None:
        picture = grey(image)
        cells = _require_grid(grid, array.shape[1])
        over = _weights(weights, array)
    height = min(9.0, max(3.4, 0.32 * len(rows) + 1.9))
    width = min(9.0, max(4.6, 0.5 * len(columns) + 2.6))
    figure = make_figure(width + (0.0 if picture is None else _IMAGE_WIDTH), height)
    ratios = (width,) if picture is None else (width, _IMAGE_WIDTH)
    panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    _map(panels[0], shown, unit)
    _ticks(panels[0], (rows, columns), (tokens, patches))
    panels[0].set_ylabel(row_name)
    panels[0].set_xlabel(column_name)
    if picture is not None:
        _overlay(panels[1], picture, over.reshape(cells), weights_label)
    if title:
        figure.suptitle(title)
    return figure


def grey(image: Any) -> Floats:
    """Luminance (H, W) from 0 to 1 of an image (H, W) or (H, W, 3), floats from 0 to 1 or uint8."""
    found = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if found.ndim not in (2, 3) or (found.ndim == 3 and found.shape[2] != 3) or not found.size:
        raise ValueError(f"image: expected (H, W) or (H, W, 3), got {found.shape}")
    if found.dtype != np.uint8 and found.dtype.kind != "f":
        raise ValueError(f"image: expected uint8 or floats from 0 to 1, got {found.dtype}")
    scaled = found.astype(np.float64) / (255.0 if found.dtype == np.uint8 else 1.0)
    if not np.isfinite(scaled).all() or scaled.min() < 0 or scaled.max() > 1:
        raise ValueError("image: expected floats from 0 to 1, got others")
    # ITU-R BT.601
    return scaled if scaled.ndim == 2 else scaled @ np.array([0.299, 0.587, 0.114])


def _require_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        grid = (side, side)
        if side * side != patches:
            raise ValueError(f"grid: expected rows and columns, as {patches} patches are no square")
    if len(grid) != 2 or grid[0] * grid[1] != patches or min(grid) < 1:
        raise ValueError(f"grid: expected rows x columns of {patches} patches, got {grid}")
    return grid


def _weights(weights: Any, values: Floats) -> Floats:
    """(Lb,); NaN where nothing is known."""
    if weights is None:
        known = np.isfinite(values)
        total = np.where(known, values, 0.0).sum(axis=0)
        return np.where(known.any(axis=0), total, np.nan)
    found = require_array("weights", weights, "Lb")
    if len(found) != values.shape[1]:
        raise ValueError(f"weights: expected ({values.shape[1]},), got {found.shape}")
    return found


def _map(axes: Axes, values: Floats, unit: str) -> None:
    limit = limit_of(values)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto"
    )
    axes.set_facecolor(ABSENT)
    if max(values.shape) <= _MOST_NUMBERS:
        _numbers(axes, values)
    hatch_negative(axes, values, limit)
    bar = axes.figure.colorbar(image, ax=axes, ticks=[-limit, 0.0, limit], shrink=0.9)
    bar.ax.set_yticklabels([f"{-limit:.2g}", "0", f"{limit:.2g}"])
    bar.set_label(f"{unit}; hatched: below 0")


def _numbers(axes: Axes, values: Floats) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
        axes.text(
            column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, bbox=box, zorder=3
        )


def _ticks(
    axes: Axes, places: tuple[Ints, Ints], names: tuple[Sequence[str] | None, Sequence[str] | None]
) -> None:
    """Labels of as many rows and columns as have room."""
    for which, kept, tokens in zip(("y", "x"), places, names, strict=True):
        step = max(1, math.ceil(len(kept) / _MOST_LABELS))
        at = range(0, len(kept), step)
        labels = [label_of(tokens, int(kept[k])) for k in at]
        if which == "y":
            axes.set_yticks(at, labels)
        else:
            long = tokens is not None or len(labels) > 16
            axes.set_xticks(at, labels, rotation=90 if long else 0)


def _overlay(axes: Axes, picture: Floats, weights: Floats, label: str) -> None:
    """The image in pale grey, and over each patch its weight: the larger, the less of the image shines through."""
    height, width = picture.shape
    rows, columns = weights.shape
    box = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(picture, cmap="gray", vmin=-0.4, vmax=1.0, extent=box, interpolation="nearest")
    limit = limit_of(weights)
    alpha = np.nan_to_num(_OPAQUE * np.abs(weights) / limit)
    shown = axes.imshow(
        np.ma.masked_invalid(weights),
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        alpha=alpha,
        extent=box,
        interpolation="nearest",
    )
    hatch_negative(axes, np.where(np.abs(weights) > 0.05 * limit, weights, np.nan), limit)
    framed = _frames(axes, weights)
    axes.set_aspect((height / rows) / (width / columns))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(label, fontsize="medium")
    signed = bool((weights < 0).any())
    count = f"{framed} " if framed > 1 else ""
    told = [f"framed: the {count}largest"] if framed else []
    axes.set_xlabel("; ".join([*told, *(["hatched: below 0"] if signed else [])]), fontsize="small")
    # Where nothing is below 0 the scale does not show what would be.
    ticks = [-limit, 0.0, limit] if signed else [0.0, limit]
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.6, ticks=ticks, location="right")
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    bar.ax.set_ylim(ticks[0], ticks[-1])


def _frames(axes: Axes, weights: Floats) -> int:
    """How many patches were framed: none whose weight is 0."""
    from matplotlib.patches import Rectangle

    sizes = np.nan_to_num(np.abs(weights)).ravel()
    places = [k for k in np.argsort(-sizes, kind="stable")[:_FRAMED] if sizes[k] > 0]
    for place in places:
        row, column = divmod(int(place), weights.shape[1])
        corner = (column - 0.47, row - 0.47)
        # White below black shows on any ground.
        for colour, line in (("white", 2.6), ("black", 1.2)):
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, ec=colour, lw=line, zorder=4))
    return len(places)
