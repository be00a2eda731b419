"""The installed release of Triton, without importing it, which takes seconds."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

# The oldest release that the kernels run with; docs/compatibility.md lists what was run.
OLDEST = "3.6"


@functools.cache
def installed() -> str:
    """The version of the package triton; "" if it is not installed.

    Read from the package's file, because distributions of it have several names.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return ""
    text = Path(spec.origin).read_text()
    found = re.search(r"^__version__ = ['\"](.+?)['\"]", text, re.MULTILINE)
    return found[1] if found else "of unknown version"


def unsuitable_reason() -> str:
    """The reason why the installed Triton cannot run the kernels, or ""."""
    version = installed()
    if not version:
        return "the package triton is not installed"
    # An unknown version has no numbers, and is tried.
    if () < _numbers(version) < _numbers(OLDEST):
        return f"it needs Triton >= {OLDEST}, found {version}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 6) for 3.6.1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
