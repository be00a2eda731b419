"""Choice and execution of an estimator for a game's candidate pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.coalitions import Ints, empty_and_full

from .candidates import Candidates
from .checkpoint import Checkpoint
from .enumeration import MAX_PLAYERS, Enumeration
from .evaluator import Evaluator, Game
from .ranks import Ranks
from .results import PairValues
from .sampling import PairSampling, Sampling

METHODS = ("auto", "exact", "sampling")

Estimator = PairSampling | Enumeration


@dataclass(frozen=True)
class Run:
    """Execution settings for the evaluation of coalitions; they change at most the last bits of values.

    Attributes:
        max_batch: coalitions evaluated at once, unless the game has a smaller limit; None: as the available
            memory allows, at most 256. Set it for bitwise equal results on different machines.
        checkpoint: a folder for each sample's values, 8 bytes per coalition; the same call continues from it. A
            checkpoint is valid for one model, sample and request; for a model that is not a Module, only the
            name, v(none) and v(all) are compared.
        distributed: share the evaluations among the ranks of the default process group. Every rank makes the
            same call, with the model on its own device, and gets the same result.
        progress: show a bar on standard error, with the number of evaluations and the time remaining; None: if
            it is a terminal.
    """

    max_batch: int | None = None
    checkpoint: str | Path | None = None
    distributed: bool = False
    progress: bool | None = None

    @property
    def shown(self) -> bool | None:
        """`progress` of this process: only the first rank shows a bar."""
        return self.progress if Ranks.of(self.distributed).first else False

    def __post_init__(self) -> None:
        if self.max_batch is not None:
            check.require_count("max_batch", self.max_batch, 1)
            # A plain int, not a numpy integer, so that results and checkpoints can be written.
            object.__setattr__(self, "max_batch", int(self.max_batch))


def estimate(
    game: Game,
    candidates: Candidates,
    indices: Sequence[str],
    method: str,
    sampling: Sampling,
    run: Run,
    sample: int = 0,
    advance: Callable[[int], object] = int,
) -> dict[str, PairValues]:
    """Compute indices of a game's candidate pairs from shared evaluations. Arguments as in `interactions`."""
    estimator = choose(game.players, candidates.pairs, indices, method, sampling, sample)
    outcome = play(game, estimator, run, sample, advance)
    sampled, notes = isinstance(estimator, PairSampling), estimator.notes()
    return {
        name: pair_values(
            game,
            candidates,
            sample,
            index=name,
            values=values.copy(),
            standard_errors=errors.copy(),
            method=estimator.method,
            stopped_by=str(estimator.stopped_by),
            draws=estimator.draws,
            sampling=asdict(sampling) if sampled else None,
            notes=candidates.notes + notes[name],
            **outcome,
        )
        for name, (values, errors) in estimator.estimates().items()
    }


def pair_values(game: Game, candidates: Candidates, sample: int, **fields: Any) -> PairValues:
    """Build the result for a game's candidate pairs; a game without modalities counts as one modality."""
    count = game.players
    default = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
    known: Any = game
    fields.setdefault("notes", candidates.notes)
    return PairValues(
        pairs=candidates.pairs,
        tokens=getattr(known, "tokens", default),
        lengths=tuple(getattr(known, "lengths", (count,))),
        candidates=candidates.chosen,
        game=getattr(known, "describe", dict)(),
        sample=sample,
        **fields,
    )


def choose(
    players: int, pairs: Ints, indices: Sequence[str], method: str, sampling: Sampling, sample: int
) -> Estimator:
    """Choose the estimator: "auto" enumerates at most MAX_PLAYERS players if the budget covers it."""
    check.require_choice("method", method, METHODS)
    reachable = players <= MAX_PLAYERS and 2**players <= sampling.budget
    if method == "exact" or (method == "auto" and reachable):
        return Enumeration(players, pairs, indices)
    return PairSampling(players, pairs, indices, sampling, sample)


def play(
    game: Game, estimator: Estimator, run: Run, sample: int, advance: Callable[[int], object]
) -> dict[str, Any]:
    """Run the estimator; return value, baseline, evaluations and batch_size of PairValues."""
    ranks = Ranks.of(run.distributed)
    evaluator = Evaluator(game, run.max_batch, ranks)
    checkpoint = None
    if run.checkpoint is not None or ranks.size > 1:
        digest = fingerprint(game, estimator)
        ranks.require_same("model, inputs and arguments", digest)
        if run.checkpoint is not None:
            checkpoint = Checkpoint(run.checkpoint, sample, digest, ranks)
            evaluator.resume(checkpoint, same_batches=run.max_batch is None)
    # Enumeration evaluates both ends among all coalitions; in a checkpoint they identify the model.
    enumerated = isinstance(estimator, Enumeration)
    ends = np.zeros(2)
    if checkpoint is not None or not enumerated:
        ends = evaluator(empty_and_full(game.players))
    if enumerated:
        evaluator.evaluations = 0
    evaluator.advance = advance
    while estimator.stopped_by is None:
        estimator.absorb(evaluator(estimator.plan()))
    if checkpoint is not None:
        checkpoint.save()
    if isinstance(estimator, Enumeration):
        ends = estimator.ends
    return {
        "value": float(ends[1]),
        "baseline": float(ends[0]),
        "evaluations": evaluator.evaluations,
        "batch_size": evaluator.batch_size,
    }


def fingerprint(game: Game, estimator: Estimator) -> str:
    """Return a digest of the game and all settings of the estimate, except the batch size."""
    own: Any = getattr(game, "fingerprint", None)
    kind = type(game)
    request = {
        "game": f"{kind.__module__}.{kind.__qualname__}" if own is None else own(),
        "players": game.players,
        "method": estimator.method,
        "indices": list(estimator.indices),
        "pairs": hashlib.sha256(estimator.pairs.astype("<i8").tobytes()).hexdigest(),
        **estimator.request(),
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
