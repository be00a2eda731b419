"""Optional packages: how they are imported, and progress bars by tqdm."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def optional_package(name: str, argument: str = "") -> Any:
    """The module of a package that is not a dependency.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{argument}needs a package: pip install {name}") from error


@contextmanager
def progress_bar(shown: bool, total: int, label: str) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, as a function that advances it by a count.

    Raises:
        ModuleNotFoundError: shown, and tqdm is not installed.
    """
    if not shown:
        yield lambda count: None
        return
    tqdm = optional_package("tqdm", "progress: ")
    with tqdm.tqdm(total=total, desc=label) as bar:
        yield bar.update
