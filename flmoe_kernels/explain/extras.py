"""Import of optional packages, and progress bars."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def optional_package(name: str, package: str = "") -> Any:
    """Import a module of a package that is not a dependency; the package has the module's name unless given."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"needs a package: pip install {package or name}") from error


@contextmanager
def progress_bar(shown: bool | None, total: int, label: str) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar on standard error by a count of evaluations, at most `total`.

    shown: None if standard error is a terminal.
    """
    if shown is None:
        shown = sys.stderr is not None and sys.stderr.isatty()
    if not shown or not total:
        yield lambda count: None
        return
    # Imported here, because most calls show no bar.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} / {task.total:,.0f} evaluations"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
