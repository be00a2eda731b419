"""The files that `profile` writes: each appears whole or not at all, and is asked about before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flmoe_kernels.core.files import is_writable, write_whole

from .request import BadRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Files:
    """Where to write what; None for nothing."""

    trace: Path | None = None
    csv: Path | None = None
    json: Path | None = None
    plot: Path | None = None

    def require_writable(self) -> None:
        """
        Raises:
            BadRequest: a folder that is not there or not writable, or a picture in an unknown format.
        """
        for name in ("trace", "csv", "json", "plot"):
            path = getattr(self, name)
            if path is not None and not is_writable(path):
                raise BadRequest(f"{name}: {path} cannot be written: no such folder, or not yours")
        if self.plot is not None:
            _require_format(self.plot)

    def write_text(self, which: str, make: Callable[[], str]) -> None:
        path = getattr(self, which)
        if path is not None:
            text = make()
            write_whole(path, text)

    def write_plot(self, make: Callable[[], Figure]) -> None:
        if self.plot is not None:
            figure = make()
            write_whole(self.plot, lambda part: figure.savefig(part, dpi=120))


def _require_format(path: Path) -> None:
    """
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from flmoe_kernels.core.figures import make_figure

    known = make_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise BadRequest(f"plot: expected a name that ends in .png, .pdf or .svg, got {path}")
