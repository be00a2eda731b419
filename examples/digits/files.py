"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside the target, then put it in the target's place.

    Whatever ends `write` early, Ctrl-C included, leaves the target as it was and no temporary file.
    """
    # The suffix stays last: savefig takes the format from it.
    temporary = target.with_name(f".{os.getpid()}.tmp.{target.name}")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
