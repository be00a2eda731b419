"""Roofline of profiled calls: a page without network, or a picture. Needs matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flmoe_kernels.core.files import write_whole

from .output import STAGE_HEADS, rate_text, stage_rows
from .profiles import Profile
from .stages import TORCH
from .work import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".svg", ".png")
_STYLE = """body { font: 15px sans-serif; max-width: 70em; margin: 2em auto }
svg { max-width: 100%; height: auto } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left }"""


def write_roofline(path: Path, heading: Sequence[str], profiles: Sequence[Profile]) -> None:
    """Write a page with figure and table of each profile; for *.svg and *.png the figure of the first."""
    facts = [profile.as_dict() for profile in profiles]
    if path.suffix in PICTURES:
        write_whole(path, _picture(facts[0], path.suffix[1:]))
        return
    parts = [f"<p>{html.escape(line)}</p>" for line in heading]
    for each in facts:
        svg = _picture(each, "svg").decode()
        parts += [f"<h2>{html.escape(_title(each))}</h2>", svg[svg.index("<svg") :], _table(each)]
    head = f"<!doctype html><meta charset='utf-8'><title>Roofline</title><style>{_STYLE}</style>"
    write_whole(path, "\n".join([head, "<h1>Roofline</h1>", *parts, ""]))


def figure_of(facts: Mapping[str, Any]) -> Figure:
    """Draw the operators of a profile, given by `Profile.as_dict`, under the attainable rates.

    A point is an operator of this package, or one of torch with a row of its own. The farther it is
    below the line, the smaller its share of the attainable rate. Operators without
    matrix products are open, at the left edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    points = [
        x
        for x in facts["breakdown"]["stages"]
        if x["bytes"] and x["name"].startswith((OURS, TORCH))
    ]
    top, slope = facts["matmul"], facts["copy"]
    intensities = [x["flop"] / x["bytes"] for x in points if x["flop"]] + [top / slope]
    left, right = min(intensities) / 4, max(intensities) * 4
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog([left, top / slope, right], [left * slope, top, top], color="black")
    for number, x in enumerate(points, start=1):
        place, rate = x["flop"] / x["bytes"], x["flop"] / x["seconds"]
        if not x["flop"]:
            place, rate = left, left * x["bytes"] / x["seconds"]
        label = f"{number}  {x['name'].removeprefix(OURS)}, {x['share']:.1%} of the time"
        fill = "full" if x["flop"] else "none"
        [point] = axes.plot(
            [place], [rate], "o", color="C0", fillstyle=fill, alpha=0.6, label=label
        )
        point.set(markersize=4 + 20 * x["share"] ** 0.5, clip_on=False, gid=f"point-{number}")
        axes.annotate(str(number), (place, rate), (7, -3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("FLOP per byte of inputs and results (open: no matrix products)")
    axes.set_ylabel(f"roof: matrix product, {rate_text(top)}FLOP/s; copy, {rate_text(slope)}B/s")
    axes.yaxis.set_major_formatter(EngFormatter("FLOP/s"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(_title(facts), fontsize=10)
    axes.grid(alpha=0.3)
    beside: dict[str, Any] = {
        "loc": "upper left",
        "bbox_to_anchor": (1.0, 1.0),
        "fontsize": 9,
        "frameon": False,
    }
    axes.legend(markerscale=0, handlelength=0, **beside)
    return figure


def _title(facts: Mapping[str, Any]) -> str:
    return f"{facts['what']}, {facts['contestant']} on {facts['device']}"


def _picture(facts: Mapping[str, Any], kind: str) -> bytes:
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "roofline"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure_of(facts).savefig(content, format=kind, metadata=metadata, dpi=150)
    return content.getvalue()


def _table(facts: Mapping[str, Any]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells) + "</tr>"

    rows = [row("th", STAGE_HEADS), *(row("td", cells) for cells in stage_rows(facts))]
    return "<table>" + "\n".join(rows) + "</table>"
