"""Helpers of the figures: validation, labels, and values around 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flmoe_kernels.core.figures import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

# Red for, blue against; in black and white both are dark, so that everything below 0 is also hatched or dashed.
DIVERGING = "RdBu_r"
FOR, AGAINST, UNSURE = "#b2182b", "#2166ac", "0.55"
HATCH = "/////"
# Of the limit: below, nothing to look at; above, the blues are darker than a middle grey.
_SMALL, _DARK = 0.05, 0.6
ABSENT = "0.85"
_LONGEST_LABEL = 18


def require_array(name: str, value: Any, axes: str) -> Floats:
    """float64 of an array or Tensor with as many axes as `axes` names.

    Raises:
        ValueError: another number of axes, or not numbers.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    found = np.asarray(value)
    expected = f"({axes})"
    if found.ndim != len(axes.split(", ")) or found.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected numbers {expected}, got {found.dtype} {found.shape}")
    return found.astype(np.float64)


def limit_of(values: Floats) -> float:
    """The largest |value| that is finite, for limits on both sides of 0; 1 where all are 0 or none is there."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(sizes.max()) if sizes.size and sizes.max() > 0 else 1.0


def label_of(tokens: Sequence[str] | None, place: int) -> str:
    """A token's position and, if known, its string, shortened."""
    if tokens is None:
        return str(place)
    text = str(tokens[place])
    if len(text) > _LONGEST_LABEL:
        text = text[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{plain(text)} ({place})"


def require_tokens(name: str, tokens: Sequence[str] | None, length: int) -> None:
    if tokens is not None and len(tokens) != length:
        raise ValueError(
            f"{name}: expected {length} strings, one for each token, got {len(tokens)}"
        )


def hatch_negative(axes: Axes, values: Floats, limit: float) -> None:
    """Hatch the cells below 0 of an image with unit cells, coloured from -limit to limit; NaN is no cell.

    Pale where the value is small, so that many small values do not drown a few large ones; white on dark colours,
    which are the largest values and would swallow dark lines.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) - 0.5
    size = np.where(values < 0, -values / limit, np.nan)
    for ink, least, most in (
        ("0.8", 0.0, _SMALL),
        ("0.35", _SMALL, _DARK),
        ("white", _DARK, np.inf),
    ):
        chosen = (size > least) & (size <= most)
        cells = [Path(corners + place, closed=True) for place in np.argwhere(chosen)[:, ::-1]]
        if cells:
            # One outline for all cells: a large map has many thousands.
            outline = Path.make_compound_path(*cells)
            axes.add_patch(PathPatch(outline, fill=False, ec=ink, hatch=HATCH, lw=0.0, zorder=2))
