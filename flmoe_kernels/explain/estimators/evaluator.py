"""Evaluation of distinct coalitions, in batches that ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.coalitions import (
    Bools,
    Floats,
    Packed,
    distinct,
    empty_and_full,
    sizes,
    unpack,
)

from .checkpoint import Checkpoint
from .ranks import Ranks

DEFAULT_BATCH = 4096  # for a game without `batch_size`
# Between machines, v(none) and v(all) of a model differ by rounding only; a larger difference: another model.
_SAME_GAME = 1e-3


class Game(Protocol):
    """A set function v over players 0 .. n - 1, as in shapiq.

    Optional members: `batch_size`, the largest number of coalitions per call; `fingerprint() -> str`, hexadecimal,
    identifies the game in checkpoints; `describe() -> dict`, JSON serializable, for the result.
    """

    @property
    def players(self) -> int: ...

    def __call__(self, coalitions: Bools) -> Floats:
        """Return v (m,) of coalitions (m, n) bool."""
        ...


class Evaluator:
    """Evaluates packed coalitions of a game.

    The order of the distinct coalitions depends only on the request, and in each round every rank takes the next
    batch, so values are bitwise equal for any number of ranks. Only the batch size may change a model's last
    bits; all ranks use the smallest of their batch sizes, and results report it.

    `batch_size` is an upper limit, None that of the game. `evaluations` counts the distinct coalitions per call,
    summed over calls and ranks. `advance` is called with the number of coalitions whose values are known.
    """

    def __init__(
        self, game: Game, batch_size: int | None = None, ranks: Ranks | None = None
    ) -> None:
        self.game = game
        self.advance: Callable[[int], object] = int
        self.ranks = Ranks() if ranks is None else ranks
        own: Any = getattr(game, "batch_size", None)
        if own is not None:
            check.require_count("game.batch_size", own, 1)
        limits = [int(limit) for limit in (own, batch_size) if limit is not None]
        self.batch_size = self.ranks.least(min(limits, default=DEFAULT_BATCH))
        self.evaluations = 0
        self._known = np.zeros(0)
        self._checkpoint: Checkpoint | None = None

    def resume(self, checkpoint: Checkpoint, same_batches: bool) -> None:
        """Use the values of a checkpoint for the next coalitions, and add later values to it.

        same_batches: use batches no larger than those of the checkpoint, for bitwise equal values.
        Raises ValueError: the checkpoint belongs to another request or game, or is damaged.
        """
        saved = checkpoint.read()
        if saved is not None:
            known, batch_size = saved
            ends = self(empty_and_full(self.game.players))[: len(known)]
            self.evaluations = 0
            scale = max(1.0, float(np.abs(ends).max(initial=0.0)))
            if not np.allclose(known[: len(ends)], ends, rtol=0.0, atol=_SAME_GAME * scale):
                raise ValueError(
                    f"{checkpoint.path}: belongs to another model or sample: v(none) and v(all) were "
                    f"{known[: len(ends)].tolist()}, now they are {ends.tolist()}"
                )
            self._known = known
            if same_batches:
                self.batch_size = min(self.batch_size, batch_size)
        self._checkpoint = checkpoint

    def agree(self, numbers: Floats) -> Floats:
        """Return the same numbers (m,) on every rank and in later runs, which continue from the checkpoint."""
        if len(self._known):
            numbers, self._known = self._known[: len(numbers)], self._known[len(numbers) :]
            return numbers
        numbers = self.ranks.agreed(numbers)
        if self._checkpoint is not None:
            self._checkpoint.add(numbers, self.batch_size)
        return numbers

    def __call__(self, packed: Packed) -> Floats:
        """Return the values (m,) of packed coalitions (m, bytes), in the same order."""
        if not len(packed):
            return np.zeros(0)
        rows, place = distinct(packed)
        self.evaluations += len(rows)
        values = np.zeros(len(rows))
        done = min(len(self._known), len(rows))
        values[:done], self._known = self._known[:done], self._known[done:]
        self.advance(done + len(packed) - len(rows))
        while done < len(rows):
            stop = min(done + self.batch_size * self.ranks.size, len(rows))
            values[done:stop] = self._round(rows[done:stop])
            if self._checkpoint is not None:
                self._checkpoint.add(values[done:stop], self.batch_size)
            self.advance(stop - done)
            done = stop
        return values[place]

    def _round(self, rows: Packed) -> Floats:
        """Evaluate at most one batch per rank."""
        values = np.zeros(len(rows))
        mine = slice(self.ranks.rank * self.batch_size, (self.ranks.rank + 1) * self.batch_size)
        count = len(rows[mine])
        if count:
            found = np.asarray(self.game(unpack(rows[mine], self.game.players)), dtype=np.float64)
            if found.shape != (count,):
                raise ValueError(
                    f"game: expected values ({count},) for the coalitions, got {found.shape}"
                )
            values[mine] = found
        # Adding 0 turns -0 into 0, as the sum over several ranks does.
        values = self.ranks.total(values + 0.0)
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            size = int(sizes(rows[wrong[:1]])[0])
            raise ValueError(
                f"game: expected finite values, got {values[wrong[0]]} for a coalition of {size} of "
                f"{self.game.players} tokens, in {len(wrong)} coalitions; a layer may give NaN if no "
                "token is left, then use fill='zero' or 'mean', which keep all tokens"
            )
        return values
