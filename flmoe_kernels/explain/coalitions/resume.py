"""Long runs that go on where they were interrupted: one file per sample, bound to what was asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..archive import Arrays, decode, encode, write_whole
from .ranks import Ranks

SAVE_EVERY_S = 30.0
_KIND = "flmoe_kernels.explain checkpoint"


class Checkpoint:
    """The state of one sample's run in a folder. Of several ranks, the first reads and writes.

    Args:
        folder: made if missing.
        sample: position in the batch, which the file's name tells.
        fingerprint: of the request; a file of another one is refused, not overwritten.
    """

    def __init__(self, folder: str | Path, sample: int, fingerprint: str, ranks: Ranks) -> None:
        self.path = Path(folder) / f"sample_{sample:05d}.npz"
        self._fingerprint = fingerprint
        self._ranks = ranks
        self._saved = time.monotonic()
        if ranks.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> tuple[dict[str, Any], Arrays] | None:
        """What was saved last; None where nothing was.

        Raises:
            ValueError: the file is of another request, or damaged.
        """
        mine = None
        if self._ranks.first and self.path.exists():
            mine = self.path.read_bytes()
        content = self._ranks.from_first(mine)
        if content is None:
            return None
        header, arrays = decode(content, _KIND, str(self.path))
        if header.get("fingerprint") != self._fingerprint:
            raise ValueError(
                f"{self.path}: belongs to another run: the model, the sample or what was asked "
                "about them differs; give another folder, or remove it"
            )
        return header, arrays

    def save(self, header: Mapping[str, Any], arrays: Arrays, *, last: bool = False) -> None:
        """Write, but not more often than every SAVE_EVERY_S seconds unless it is the last time."""
        now = time.monotonic()
        if not self._ranks.first or (not last and now - self._saved < SAVE_EVERY_S):
            return
        whole = {**header, "fingerprint": self._fingerprint}
        write_whole(self.path, encode(_KIND, whole, arrays))
        self._saved = now
