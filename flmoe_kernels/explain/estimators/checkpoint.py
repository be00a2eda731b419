"""Checkpoints of long runs: one file of evaluated values per sample."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from flmoe_kernels.core.files import write_whole
from flmoe_kernels.explain.archive import decode, encode
from flmoe_kernels.explain.games.coalitions import Floats

from .ranks import Ranks

# Values are saved after every batch, unless saving would take more than this share of the run.
SAVING_SHARE = 0.05
_KIND = "flmoe_kernels.explain checkpoint"


class Checkpoint:
    """The values that one sample's run has evaluated, 8 bytes per value, in the order of evaluation.

    A run evaluates the same coalitions in the same order every time, so the values restore it, together with the
    numbers that its allocation depends on (see `Evaluator.agree`). With several ranks, only the first reads and
    writes. The file of another request, with another fingerprint, is rejected, not overwritten.
    """

    def __init__(self, folder: str | Path, sample: int, fingerprint: str, ranks: Ranks) -> None:
        self.path = Path(folder) / f"sample_{sample:05d}.npz"
        self._fingerprint = fingerprint
        self._ranks = ranks
        self._values: list[Floats] = []
        self._batch_size = 0
        self._saved, self._took = -math.inf, 0.0

    def read(self) -> tuple[Floats, int] | None:
        """Return the saved values and the batch size of their evaluation; None if there is no file.

        Raises:
            ValueError: the file belongs to another request, or is damaged.
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
                f"{self.path}: belongs to another run: the model, the sample or the request differs; "
                "use another folder, or remove the file"
            )
        values, batch_size = arrays.get("values", np.zeros(0)), header.get("batch_size")
        if values.ndim != 1 or values.dtype != np.float64 or not isinstance(batch_size, int):
            raise ValueError(f"{self.path}: damaged: expected values (m,) float64 and a batch size")
        self._values, self._batch_size = [values], batch_size
        return values, batch_size

    def add(self, values: Floats, batch_size: int) -> None:
        """Keep the values of a batch; save if this takes a small share of the time since the last save."""
        if self._ranks.first:
            self._values.append(values.copy())
            self._batch_size = batch_size
            if (time.monotonic() - self._saved) * SAVING_SHARE >= self._took:
                self.save()

    def save(self) -> None:
        """Write all values atomically: if the process is stopped, the file is either the old or the new one."""
        if not self._ranks.first:
            return
        start = time.monotonic()
        self._values = [np.concatenate(self._values)]
        header = {"fingerprint": self._fingerprint, "batch_size": self._batch_size}
        content = encode(_KIND, header, {"values": self._values[0]})
        write_whole(self.path, content, make_folder=True)
        self._saved = time.monotonic()
        self._took = self._saved - start
