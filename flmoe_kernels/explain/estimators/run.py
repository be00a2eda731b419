"""From a game and candidate pairs to results: choose a method, evaluate until it ends, save on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.archive import Arrays
from flmoe_kernels.explain.extras import progress_bar
from flmoe_kernels.explain.games.coalitions import Floats, Ints, empty_and_full

from .candidates import Candidates
from .checkpoint import Checkpoint
from .enumeration import MAX_PLAYERS, Enumeration
from .evaluator import Evaluator, Game
from .ranks import Ranks
from .results import PairValues
from .sampling import PairSampling, Sampling

METHODS = ("auto", "exact", "sampling")
# v(none) and v(all) of one model differ between machines by rounding; those of another model by more.
_SAME_GAME = 1e-3

Estimator = PairSampling | Enumeration


@dataclass(frozen=True)
class Run:
    """Where and how coalitions are evaluated; the result does not depend on it but for a model's last bits.

    Attributes:
        max_batch: coalitions that a model sees at once, of which a game that says that it takes fewer gets fewer;
            None for what the memory at hand allows, at most 256. Give it where the same bits are wanted on other
            machines.
        checkpoint: a folder, in which each sample's progress is kept: the same call goes on from there. It is
            bound to the model, the sample and what is asked; of a model that is no Module only the name and the
            values of no and of all tokens can be compared.
        distributed: share the evaluations among the ranks of the default process group. Every rank makes the
            same call, with the model on its own device, and gets the same result.
        progress: a bar per sample on standard error, which needs tqdm.
    """

    max_batch: int | None = None
    checkpoint: str | Path | None = None
    distributed: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.max_batch is not None:
            check.require_count("max_batch", self.max_batch, 1)
            # A plain number, not numpy's, so that results and checkpoints can be written.
            object.__setattr__(self, "max_batch", int(self.max_batch))


def estimate(
    game: Game,
    candidates: Candidates,
    indices: Sequence[str],
    method: str,
    sampling: Sampling,
    run: Run,
    sample: int = 0,
    label: str = "",
) -> dict[str, PairValues]:
    """Indices of a game's candidate pairs, all from the same evaluations. Arguments as in `interactions`."""
    estimator = choose(game.players, candidates.pairs, indices, method, sampling, sample)
    found = play(game, estimator, run, sample, label)
    sampled = isinstance(estimator, PairSampling)
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
            **found,
        )
        for name, (values, errors) in estimator.estimates().items()
    }


def pair_values(game: Game, candidates: Candidates, sample: int, **found: Any) -> PairValues:
    """A result of a game's candidate pairs; the tokens of a game without modalities are of one."""
    count = game.players
    one = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
    known: Any = game
    return PairValues(
        pairs=candidates.pairs,
        tokens=getattr(known, "tokens", one),
        lengths=tuple(getattr(known, "lengths", (count,))),
        candidates=candidates.chosen,
        game=getattr(known, "describe", dict)(),
        sample=sample,
        **found,
    )


def choose(
    players: int,
    pairs: Ints,
    indices: Sequence[str],
    method: str,
    sampling: Sampling,
    sample: int,
) -> Estimator:
    """ "auto" enumerates where the budget reaches all coalitions of at most MAX_PLAYERS players."""
    check.require_choice("method", method, METHODS)
    reachable = players <= MAX_PLAYERS and 2**players <= sampling.budget
    if method == "exact" or (method == "auto" and reachable):
        return Enumeration(players, pairs, indices)
    return PairSampling(players, pairs, indices, sampling, sample)


def play(game: Game, estimator: Estimator, run: Run, sample: int, label: str) -> dict[str, Any]:
    """Evaluate what the estimator asks for until it ends, from the last checkpoint on.

    Returns value, baseline, evaluations and batch_size of PairValues.
    """
    ranks = Ranks.of(run.distributed)
    evaluator = Evaluator(game, run.max_batch, ranks)
    checkpoint = None
    if run.checkpoint is not None or ranks.size > 1:
        digest = fingerprint(game, estimator)
        ranks.require_same("model, inputs and arguments", digest)
        if run.checkpoint is not None:
            checkpoint = Checkpoint(run.checkpoint, sample, digest, ranks)
    ends, resumed = None, None
    enumerated = isinstance(estimator, Enumeration)
    if checkpoint is not None or not enumerated:
        ends = evaluator(empty_and_full(game.players))
    if enumerated:
        # Both are among all coalitions; here they only identify the model.
        evaluator.evaluations = 0
    if checkpoint is not None and ends is not None:
        ends, resumed = _resume(checkpoint, estimator, evaluator, run, ends)
    done, total = estimator.progress
    shown = run.progress and ranks.first
    with progress_bar(shown, total, label or estimator.method, done) as advance:
        while estimator.stopped_by is None:
            done = estimator.progress[0]
            now = _state(estimator, evaluator, ends)
            coalitions = estimator.plan()
            save, known = None, None
            if checkpoint is not None:
                step = hashlib.sha256(coalitions.data).hexdigest()
                known = None if resumed is None else resumed.of(step, checkpoint)
                save = _saver(checkpoint, now, step)
            estimator.absorb(evaluator(coalitions, known, save))
            resumed = None
            advance(estimator.progress[0] - done)
    if checkpoint is not None:
        header, arrays = _state(estimator, evaluator, ends)
        checkpoint.save({**header, "coalitions": ""}, {**arrays, "step": np.zeros(0)})
    if isinstance(estimator, Enumeration):
        ends = estimator.ends
    assert ends is not None
    return {
        "value": float(ends[1]),
        "baseline": float(ends[0]),
        "evaluations": evaluator.evaluations,
        "batch_size": evaluator.batch_size,
    }


def fingerprint(game: Game, estimator: Estimator) -> str:
    """Of the game and all that its estimate depends on but the batch size."""
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


class _Step(NamedTuple):
    """What is known of a step that was under way: the first values of its distinct coalitions."""

    coalitions: str  # digest of what the step asked for
    values: Floats

    def of(self, coalitions: str, checkpoint: Checkpoint) -> Floats | None:
        """The values for a step of these coalitions; None where none is known.

        Raises:
            ValueError: the values are of others.
        """
        if not len(self.values):
            return None
        if coalitions != self.coalitions:
            raise ValueError(
                f"{checkpoint.path}: belongs to another version of this package, which asked for other "
                "coalitions; give another folder, or remove it"
            )
        return self.values


def _resume(
    checkpoint: Checkpoint, estimator: Estimator, evaluator: Evaluator, run: Run, ends: Floats
) -> tuple[Floats, _Step | None]:
    """Restore what was saved, if anything.

    Returns v(none) and v(all) as they were then, and the step that was under way.
    """
    saved = checkpoint.read()
    if saved is None:
        return ends, None
    header, arrays = saved
    try:
        before, values = arrays.pop("ends"), arrays.pop("step")
        step = _Step(str(header["coalitions"]), values)
        evaluations, batch_size = int(header["evaluations"]), int(header["batch_size"])
        if before.shape != (2,) or values.ndim != 1 or values.dtype != np.float64:
            raise ValueError("expected v(none) and v(all), and the values of a step (m,) float64")
        estimator.restore(arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}: damaged: {error}") from error
    size = max(1.0, float(np.abs(ends).max()))
    if not np.allclose(before, ends, rtol=0.0, atol=_SAME_GAME * size):
        raise ValueError(
            f"{checkpoint.path}: belongs to another model or sample: v(none) and v(all) were "
            f"{before.tolist()}, and are {ends.tolist()}"
        )
    evaluator.evaluations = evaluations
    if run.max_batch is None:
        # Not more than before, for the same bits, nor than there is memory for now.
        evaluator.batch_size = min(evaluator.batch_size, batch_size)
    return before, step


def _state(
    estimator: Estimator, evaluator: Evaluator, ends: Floats | None
) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of the estimate as it is now, between two steps."""
    header = {"evaluations": evaluator.evaluations, "batch_size": evaluator.batch_size}
    state = estimator.state()
    return header, state if ends is None else {**state, "ends": ends}


def _saver(
    checkpoint: Checkpoint, before: tuple[dict[str, Any], Arrays], coalitions: str
) -> Callable[[Floats], None]:
    """A function that saves the estimate as it was before a step, with what is known of the step."""
    header, arrays = before

    def save(known: Floats) -> None:
        if checkpoint.due():
            checkpoint.save({**header, "coalitions": coalitions}, {**arrays, "step": known})

    return save
