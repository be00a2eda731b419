"""Import of optional packages, and progress bars by tqdm."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def optional_package(name: str, argument: str = "") -> Any:
    """Import a package that is not a dependency.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{argument}needs a package: pip install {name}") from error


@contextmanager
def progress_bar(shown: bool, total: int, label: str) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar on standard error by a count.

    Raises:
        ModuleNotFoundError: the bar is shown and tqdm is not installed.
    """
    if not shown:
        yield lambda count: None
        return
    tqdm = optional_package("tqdm", "progress: ")
    with tqdm.tqdm(total=total, desc=label) as bar:
        yield bar.update
