"""Long runs that go on where they were interrupted: one file per sample, bound to what was asked."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import write_whole
from flmoe_kernels.explain.archive import Arrays, decode, encode

from .ranks import Ranks

# A batch of evaluations is saved at once, unless saving would take more than this share of the run.
SAVING_SHARE = 0.05
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
        self._saved, self._took = -math.inf, 0.0
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

    def due(self) -> bool:
        """Whether as much time has passed since the last save as makes another one cheap. On the first rank."""
        waited = time.monotonic() - self._saved
        return self._ranks.first and waited * SAVING_SHARE >= self._took

    def save(self, header: Mapping[str, Any], arrays: Arrays) -> None:
        """Write; the file is the old one or the new one, whenever the process ends."""
        if not self._ranks.first:
            return
        start = time.monotonic()
        whole = {**header, "fingerprint": self._fingerprint}
        write_whole(self.path, encode(_KIND, whole, arrays))
        self._saved = time.monotonic()
        self._took = self._saved - start
