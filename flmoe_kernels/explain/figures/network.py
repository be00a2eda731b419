"""Figure of the strongest pairs as lines between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.figures import make_figure
from flmoe_kernels.explain.estimators.results import MAGNITUDE, PairValues, scored
from flmoe_kernels.explain.games.coalitions import Floats
from flmoe_kernels.explain.reliability import alike

from .canvas import (
    AGAINST,
    FOR,
    UNSURE,
    WHITE_BOX,
    label_of,
    require_result,
    require_sized,
    require_tokens,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDEST, _THINNEST = 5.0, 0.8
# Colour and line style by the sign of the drawn value, which is 0 for pairs that are tied across 0.
_STYLES: dict[int, tuple[str, Any]] = {
    1: (FOR, "solid"),
    -1: (AGAINST, (0, (3, 2))),
    0: (UNSURE, (0, (1, 1.5))),
}
_GAP = 1.5  # zorder
_LABEL: Any = {"textcoords": "offset points", "fontsize": 9, "zorder": 5, "bbox": WHITE_BOX}
Place = tuple[int, int]


def pair_network(
    found: PairValues,
    n: int = 10,
    *,
    tokens: Sequence[Sequence[str] | None] | None = None,
    names: Sequence[str] | None = None,
    by: str = MAGNITUDE,
    title: str | None = None,
) -> Figure:
    """Plot a column of tokens for each modality, joined by the n strongest pairs.

    The width of a line shows |value|. Lines are solid and red above 0, dashed and blue below 0. Values within two
    standard errors of each other, directly or through other values of `found`, look alike: as their mean, or grey
    and dotted if they are tied across 0, that is, not clearly on one side. The legend counts the other pairs that
    are tied with the last of the n: within two standard errors, or within 5% of the largest |value|. Only tokens
    of these pairs are shown, ordered by position. Pairs within a modality are arcs.

    Args:
        found: an index of one sample's pairs.
        n: number of pairs.
        tokens: for each modality its L_m strings, or None for positions.
        names: of the modalities.
        by: order of the pairs, see PairValues.ranked.
        title: by default it states the number of pairs and the order.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: an invalid argument; the message says what was expected and what was passed.
    """
    require_result("found", found, PairValues)
    check.require_count("n", n, 1)
    count = len(found.lengths)
    for name, given in (("tokens", tokens), ("names", names)):
        if given is not None:
            require_sized(name, given, count, ", one for each modality")
    strings: list[Sequence[str] | None] = [None] * count if tokens is None else list(tokens)
    titles = [f"modality {m}" for m in range(count)] if names is None else list(names)
    for m, (given, length) in enumerate(zip(strings, found.lengths, strict=True)):
        require_tokens(f"tokens[{m}]", given, length)
    order = found.ranked(by=by)
    # NaN comes last; a pair without value has no line.
    order = order[: np.isfinite(found.values).sum()]
    if not len(order):
        raise ValueError(f"found: expected a pair with a finite value, got {len(found)} pairs")
    n = min(n, len(order))
    best = found.top(n, by)
    drawn = alike(found.values, found.standard_errors)[order[:n]]
    places = _places(best, count)
    most = max([sum(1 for m, _ in places if m == k) for k in range(count)], default=0)
    figure = make_figure(2.2 * count + 0.4, max(3.2, 0.42 * most + 2.0))
    axes = figure.subplots()
    _columns(axes, places, strings, titles)
    # The strongest pair is drawn last, on top.
    for k in reversed(range(len(best))):
        _line(axes, best, drawn, k, places)
    _legend(axes, best, drawn, found.near_ties(n, by))
    what = f"|{found.index}|" if by == MAGNITUDE else f"{by} {found.index}"
    pairs = "pairs" if scored(found)[1] else "scored pairs"
    axes.set_title(f"The {len(best)} strongest {pairs} by {what}" if title is None else title)
    return figure


def _places(best: PairValues, count: int) -> dict[Place, tuple[float, float]]:
    """Position of each token: modalities from left to right, tokens spread over the whole height."""
    used = sorted({tuple(best.tokens[k].tolist()) for k in best.pairs.ravel()})
    places = {}
    for m in range(count):
        column = [token for token in used if token[0] == m]
        for k, token in enumerate(column):
            places[token] = (float(m), 1.0 - (k + 0.5) / len(column))
    return places


def _columns(
    axes: Axes,
    places: dict[Place, tuple[float, float]],
    tokens: Sequence[Sequence[str] | None],
    names: Sequence[str],
) -> None:
    count = len(names)
    for (m, position), (x, y) in places.items():
        # Labels of the outer columns are outside; labels of the inner columns are above the dots.
        side = {0: "right", count - 1: "left"}.get(m, "center")
        shift = {"right": (-8, 0), "left": (8, 0), "center": (0, 7)}[side]
        axes.plot([x], [y], "o", color="black", ms=5, zorder=4)
        if side == "center":
            # A gap in the lines that pass this token, which are below it; lines that end here are above.
            axes.plot([x], [y], "o", color="white", ms=14, zorder=_GAP)
        label, va = label_of(tokens[m], position), "bottom" if side == "center" else "center"
        axes.annotate(label, (x, y), xytext=shift, ha=side, va=va, **_LABEL)
    axes.set_xlim(-0.75, count - 0.25)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xticks(range(count), [short(str(name)) for name in names])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _line(
    axes: Axes, best: PairValues, drawn: Floats, k: int, places: dict[Place, tuple[float, float]]
) -> None:
    from matplotlib.patches import FancyArrowPatch

    largest = float(np.abs(drawn).max()) or 1.0
    first, second = (tuple(best.tokens[player].tolist()) for player in best.pairs[k])
    # Arcs bend inwards, because labels are outside of the outer columns. Lines that pass a column bend, because
    # many straight lines would run through its tokens.
    across = abs(first[0] - second[0])
    bend = (0.35 if first[0] else -0.35) if not across else -0.12 if across > 1 else 0.0
    colour, style = _STYLES[int(np.sign(drawn[k]))]
    line = FancyArrowPatch(
        places[first],
        places[second],
        arrowstyle="-",
        connectionstyle=f"arc3,rad={bend}",
        linewidth=_THINNEST + (_WIDEST - _THINNEST) * abs(drawn[k]) / largest,
        linestyle=style,
        color=colour,
        shrinkA=0,
        shrinkB=0,
        zorder=_GAP + 0.5 if across < 2 else _GAP - 0.5,
    )
    axes.add_patch(line)


def _legend(axes: Axes, best: PairValues, drawn: Floats, more: int) -> None:
    from matplotlib.lines import Line2D

    unit, largest = best.game.get("output", "v"), float(np.abs(drawn).max(initial=0.0))
    handles = []
    for sign, label in {1: "above 0", -1: "below 0", 0: "tied across 0"}.items():
        if (np.sign(drawn) == sign).any():
            colour, style = _STYLES[sign]
            handles.append(Line2D([], [], color=colour, lw=2.5, ls=style, label=label))
    notes = [f"widest line: |{best.index}| = {largest:.2g} ({unit})"] if largest else []
    notes += ["one look: not distinguishable at 2 s.e."] if best.standard_errors.any() else []
    notes += [f"{more} more pairs are tied with the last of these"] if more else []
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "frameon": False}
    axes.legend(handles=handles, title="\n".join(notes), ncols=max(1, len(handles)), **place)
