"""Values of coalitions: each distinct one evaluated once, in batches, over ranks."""

from __future__ import annotations

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

DEFAULT_BATCH = 4096  # for a game without a limit of its own
# v(none) and v(all) of one model differ between machines by rounding; those of another model by more.
_SAME_GAME = 1e-3


class Game(Protocol):
    """A set function v over players 0 .. n - 1, as in shapiq.

    Optional members: `batch_size`, the most coalitions per call; `fingerprint() -> str`, hexadecimal, to which
    checkpoints are bound; `describe() -> dict`, in JSON's types, for the result.
    """

    @property
    def players(self) -> int: ...

    def __call__(self, coalitions: Bools) -> Floats:
        """v (m,) of coalitions (m, n) bool."""
        ...


class Evaluator:
    """Evaluates packed coalitions of a game.

    The order of the distinct coalitions depends on the request alone, and in each round every rank takes the next
    batch, so the values have the same bits for any number of ranks. Only the batch size may change a model's last
    bits; ranks use the smallest of theirs, and results report it.

    Args:
        game: see Game.
        batch_size: coalitions of one batch, or fewer where the game has a smaller limit; None for the game's own.
        ranks: the processes that share the work.

    Attributes:
        evaluations: distinct coalitions of each call, summed over calls, on all ranks together.
    """

    def __init__(
        self, game: Game, batch_size: int | None = None, ranks: Ranks | None = None
    ) -> None:
        self.game = game
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
        """Take the values of a checkpoint for the next coalitions, and add later ones to it.

        Args:
            same_batches: keep batches from being larger than they were, for the same bits.

        Raises:
            ValueError: the checkpoint is of another request or game, or damaged.
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
                    f"{known[: len(ends)].tolist()}, and are {ends.tolist()}"
                )
            self._known = known
            if same_batches:
                self.batch_size = min(self.batch_size, batch_size)
        self._checkpoint = checkpoint

    def __call__(self, packed: Packed) -> Floats:
        """Values (m,) of packed coalitions (m, bytes), in their order."""
        if not len(packed):
            return np.zeros(0)
        rows, place = distinct(packed)
        self.evaluations += len(rows)
        values = np.zeros(len(rows))
        done = min(len(self._known), len(rows))
        values[:done], self._known = self._known[:done], self._known[done:]
        while done < len(rows):
            stop = min(done + self.batch_size * self.ranks.size, len(rows))
            values[done:stop] = self._round(rows[done:stop])
            if self._checkpoint is not None:
                self._checkpoint.add(values[done:stop], self.batch_size)
            done = stop
        return values[place]

    def _round(self, rows: Packed) -> Floats:
        """Values of at most a batch for each rank."""
        values = np.zeros(len(rows))
        mine = slice(self.ranks.rank * self.batch_size, (self.ranks.rank + 1) * self.batch_size)
        if len(rows[mine]):
            values[mine] = self._evaluate(rows[mine])
        # Adding 0 makes -0 into 0, as the sum over several ranks does.
        values = self.ranks.total(values + 0.0)
        self._require_finite(values, rows)
        return values

    def _evaluate(self, rows: Packed) -> Floats:
        values = np.asarray(self.game(unpack(rows, self.game.players)), dtype=np.float64)
        if values.shape != (len(rows),):
            raise ValueError(
                f"game: expected values ({len(rows)},) of as many coalitions, got {values.shape}"
            )
        return values

    def _require_finite(self, values: Floats, rows: Packed) -> None:
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            size = int(sizes(rows[wrong[:1]])[0])
            raise ValueError(
                f"game: expected finite values, got {values[wrong[0]]} for a coalition of {size} of "
                f"{self.game.players} tokens, one of {len(wrong)} such; a layer may give NaN "
                "where no token is left, and then fill='zero' or 'mean' keeps them"
            )
