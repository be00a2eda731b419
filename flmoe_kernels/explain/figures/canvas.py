"""Helpers for figures: validation, labels and signed values."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flmoe_kernels.core.figures import plain
from flmoe_kernels.explain.games.coalitions import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Red: for, blue: against. Both are dark in black and white, so values below 0 are also hatched or dashed.
DIVERGING = "RdBu_r"
FOR, AGAINST, UNSURE = "#b2182b", "#2166ac", "0.55"
HATCH, DOTS = "/////", ".."
# Shares of the limit: values below _SMALL are negligible; blues above _DARK are darker than a middle grey.
_SMALL, _DARK = 0.05, 0.6
ABSENT = "0.85"
# Behind text on colours or lines.
WHITE_BOX: Any = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0}
_LONGEST_LABEL = 18


def require_result(name: str, value: Any, kind: type) -> None:
    """Check for a result of the given class. Raises TypeError: another type."""
    if isinstance(value, kind):
        return
    inside = value.values() if isinstance(value, dict) else value
    many = isinstance(value, list | tuple | dict) and any(isinstance(x, kind) for x in inside)
    hint = " (pass one of its elements)" if many else ""
    raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}{hint}")


def require_sized(name: str, value: Any, count: int, what: str) -> None:
    """Check for a sequence of `count` items; `what` describes them in the error."""
    if not isinstance(value, Sized):
        raise TypeError(f"{name}: expected a sequence, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{name}: expected {count}{what}, got {len(value)}")


def require_array(name: str, value: Any, axes: str, source: str = "") -> Floats:
    """Convert an array or Tensor to float64; `axes` names its dimensions, `source` says what gives one.

    Raises TypeError: not an array; ValueError: another number of dimensions, or not numbers.
    """
    expected = f"({axes}){source}"
    given = value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name}: expected numbers {expected}, got {error}") from error
    if array.dtype == object:
        raise TypeError(f"{name}: expected numbers {expected}, got {type(given).__name__}")
    if array.ndim != len(axes.split(", ")) or array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected numbers {expected}, got {array.dtype} {array.shape}")
    return array.astype(np.float64)


def require_errors(errors: Any, values: Floats) -> Floats:
    """Convert standard errors to float64, NaN where unknown; 0 for exact values (None) and without value.

    Raises ValueError: another shape, or an error below 0.
    """
    if errors is None:
        return np.zeros_like(values)
    array = require_array("errors", errors, "La, Lb")
    if array.shape != values.shape:
        raise ValueError(f"errors: expected the shape {values.shape} of values, got {array.shape}")
    if (array < 0).any():
        raise ValueError(f"errors: expected numbers from 0, got {array[array < 0].min():g}")
    return np.where(np.isfinite(values), array, 0.0)


def limit_of(values: Floats) -> float:
    """The largest finite |value|, as a limit on both sides of 0; 1 if all values are 0 or none is finite."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(sizes.max()) if sizes.size and sizes.max() > 0 else 1.0


def label_of(tokens: Sequence[str] | None, place: int) -> str:
    """A token's position and, if known, its string, shortened."""
    if tokens is None:
        return str(place)
    return f"{short(str(tokens[place]))} ({place})"


def short(text: str) -> str:
    """A string as a label: literal, and shortened."""
    if len(text) > _LONGEST_LABEL:
        text = text[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return plain(text)


def require_tokens(name: str, tokens: Sequence[str] | None, length: int) -> None:
    if tokens is not None:
        require_sized(name, tokens, length, " strings, one for each token")


def hatch_negative(axes: Axes, values: Floats, limit: float) -> None:
    """Hatch the cells below 0 of an image with unit cells, coloured from -limit to limit; NaN is skipped.

    Lines are pale for small values, so that many small values do not hide a few large ones, and white for the
    largest values, because dark lines are invisible on dark colours.
    """
    size = np.where(values < 0, -values / limit, np.nan)
    for ink, least, most in (
        ("0.8", 0.0, _SMALL),
        ("0.35", _SMALL, _DARK),
        ("white", _DARK, np.inf),
    ):
        fill_cells(axes, (size > least) & (size <= most), HATCH, ink)


def fill_cells(axes: Axes, chosen: NDArray[np.bool_], hatch: str, ink: str) -> None:
    """Hatch the chosen cells of an image with unit cells."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) - 0.5
    cells = [Path(corners + place, closed=True) for place in np.argwhere(chosen)[:, ::-1]]
    if cells:
        # One compound path, because a large map has many thousands of cells.
        outline = Path.make_compound_path(*cells)
        axes.add_patch(PathPatch(outline, fill=False, ec=ink, hatch=hatch, lw=0.0, zorder=2))
