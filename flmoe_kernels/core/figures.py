"""Helpers for matplotlib figures, which import matplotlib lazily."""

from __future__ import annotations

import importlib
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def make_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    The class is used directly, because pyplot keeps every figure alive and tries to open a display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        module: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; run: pip install 'flmoe-kernels[demo]'",
            name=error.name,
        ) from error
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def png_bytes(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG file. Equal figures give equal bytes with one version of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str) -> str:
    """Escape text so that matplotlib draws it literally; dollar signs would start a formula."""
    return printable(text).replace("$", r"\$")


def printable(text: str) -> str:
    """Text on one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
