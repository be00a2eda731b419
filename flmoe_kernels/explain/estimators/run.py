"""Choice and execution of an estimator for a game's candidate pairs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.coalitions import Floats, Ints, empty_and_full

from .candidates import Candidates
from .checkpoint import Checkpoint
from .enumeration import MAX_PLAYERS, Enumeration
from .evaluator import Evaluator, Game
from .indices import KIND_INDICES, LINEAR, RG, SII, TERMS, Estimate
from .kinds import pair_kinds
from .ranks import Ranks
from .regression import Regression
from .results import PairValues, too_small
from .sampling import REGRESSION, TOGGLING, PairSampling, Sampling, Toggles
from .screening import MOST_PAIRS, Screening

METHODS = ("auto", "exact", "sampling")

Estimator = PairSampling | Regression | Enumeration


@dataclass(frozen=True)
class Run:
    """Execution settings for the evaluation of coalitions; they change at most the last bits of values.

    Attributes:
        max_batch: coalitions evaluated at once, unless the game has a smaller limit (1 if gates may drop tokens);
            None: as the available memory allows, at most 256. Set it for bitwise equal results on different
            machines.
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
    solved: Callable[[Ints], Floats] | None = None,
) -> dict[str, PairValues]:
    """Compute indices of a game's candidate pairs from shared evaluations. Arguments as in `interactions`.

    solved: the SII of pairs (p, 2), if it is known and not among the indices.
    """
    parts = plan(game.players, candidates, indices, method, sampling, sample, solved is not None)
    played, outcome = play(game, parts, run, sample, advance)
    first = parts[0]
    screened = 0
    if isinstance(first, Screening):
        chosen = f"{len(first.chosen)} pairs screened from {candidates.chosen}"
        candidates = Candidates(first.chosen, chosen, candidates.notes + first.said)
        parts, [screened, *played] = parts[1:], played
    ranks = Ranks.of(run.distributed)
    estimates = {
        name: agreed(values, ranks) for part in parts for name, values in part.estimates().items()
    }
    if solved is not None:
        estimates[SII] = Estimate.exact(solved(candidates.pairs))
    ends = outcome["baseline"], outcome["value"]
    kinds: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    if {SII, *KIND_INDICES} <= {*estimates}:
        kinds, mixed = pair_kinds(estimates, ends)
    found = {}
    for part, evaluations in zip(parts, played, strict=True):
        notes = part.notes()
        for name in part.indices:
            if name not in indices:
                continue
            own = estimates[name]
            single = np.zeros(1) if own.player_values is None else np.abs(own.player_values)
            largest = max(*map(abs, ends), float(single.max(initial=0.0)))
            found[name] = pair_values(
                game,
                candidates,
                sample,
                index=name,
                values=own.values,
                standard_errors=own.errors,
                player_values=own.player_values,
                player_errors=own.player_errors,
                method=part.method,
                design=part.design,
                stopped_by=str(part.stopped_by),
                draws=part.draws,
                evaluations=screened + evaluations,
                sampling=None if isinstance(part, Enumeration) else asdict(sampling),
                kinds=kinds,
                notes=candidates.notes
                + notes[name]
                + too_small(own.values, own.errors, largest)
                + mixed,
                **outcome,
            )
    return found


def agreed(own: Estimate, ranks: Ranks) -> Estimate:
    """The estimate of the first rank."""
    shared: list[Any] = [x if x is None else ranks.agreed(x) for x in own]
    return Estimate(*shared)


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


def plan(
    players: int,
    candidates: Candidates,
    indices: Sequence[str],
    method: str,
    sampling: Sampling,
    sample: int,
    solved: bool = False,
) -> list[Estimator]:
    """Choose the estimators; a screening is followed by others, for the pairs that it chooses."""
    pairs = candidates.pairs
    reachable = method == "exact" or (method == "auto" and enumerable(players, sampling))
    if not candidates.screen or reachable or len(pairs) <= MOST_PAIRS:
        return choose(players, pairs, indices, method, sampling, sample, solved)
    first = Screening(players, pairs, indices, sampling, sample, solved=solved)
    following(first, pairs[:1])  # raises errors before the evaluations
    return [first]


def following(first: Screening, chosen: Ints) -> list[Estimator]:
    """The estimators of the pairs that a screening chose."""
    own = first.players, chosen, first.requested
    return choose(*own, "sampling", first.left(), first.sample, first.solved)


def enumerable(players: int, sampling: Sampling) -> bool:
    """Whether "auto" enumerates all coalitions."""
    return players <= MAX_PLAYERS and 2**players <= sampling.budget


def choose(
    players: int,
    pairs: Ints,
    indices: Sequence[str],
    method: str,
    sampling: Sampling,
    sample: int,
    solved: bool = False,
) -> list[Estimator]:
    """Choose the estimators, whose budgets sum to that of `sampling`.

    "auto" enumerates at most MAX_PLAYERS players if the budget covers it. Without a `Sampling.design`, SII and RG
    of few pairs of more players are estimated by "toggling", whose draws are then cheap, and otherwise linear
    indices by "regression" and RG by "toggling", each with half of the budget if both are needed.

    Raises ValueError: an index that the design does not estimate, or a budget that is too small.
    """
    check.require_choice("method", method, METHODS)
    linear = [name for name in indices if name in LINEAR]
    terms = [name for name in indices if name in TERMS]
    kinds = KIND_INDICES[1:] if RG in indices and (solved or SII in indices) else ()
    if method == "exact" or (method == "auto" and enumerable(players, sampling)):
        return [Enumeration(players, pairs, (*indices, *kinds))]
    design = sampling.design
    able = {TOGGLING: terms, REGRESSION: linear}.get(str(design), indices)
    if len(able) < len(indices):
        other = ", ".join(name for name in indices if name not in able)
        raise ValueError(f"design: expected None or another design for {other}, got {design!r}")
    half = sampling
    if RG in indices and linear:
        half = replace(sampling, budget=max(1, sampling.budget // 2))
    if design is None and len(terms) == len(indices):
        cheap = players > MAX_PLAYERS and len(Toggles.of(players, pairs)) <= _cost(players)
        least = PairSampling.least(players, pairs, sampling.antithetic)
        few = RG in indices and least > half.budget
        # A few rows of pairs can be estimated by a budget that has no room for two units of every size.
        short = Regression.least(players, sampling.antithetic) > half.budget
        design = TOGGLING if cheap or few or (short and least <= sampling.budget) else None
    if design == TOGGLING:
        return [PairSampling(players, pairs, (*indices, *kinds), sampling, sample)]
    parts: list[Estimator] = []
    if linear:
        parts.append(Regression(players, pairs, linear, half, sample))
    if RG in indices:
        parts.append(PairSampling(players, pairs, (RG, *kinds), half, sample))
    return parts


def _cost(players: int) -> float:
    """Evaluations per draw of a pair at which both designs have the same error.

    Assumes that a pair's terms vary as much as the regression's residuals r. The variance of a regression estimate
    is then about (2 log n)^2 var(r) / budget.
    """
    return (2.0 * math.log(max(players, 2))) ** 2


def play(
    game: Game,
    parts: list[Estimator],
    run: Run,
    sample: int,
    advance: Callable[[int], object],
) -> tuple[list[int], dict[str, Any]]:
    """Run the estimators, and add those that follow a screening.

    Returns the evaluations of each, and value, baseline and batch_size of PairValues.
    """
    ranks = Ranks.of(run.distributed)
    evaluator = Evaluator(game, run.max_batch, ranks)
    checkpoint = None
    if run.checkpoint is not None or ranks.size > 1:
        digest = fingerprint(game, parts)
        ranks.require_same("model, inputs and arguments", digest)
        if run.checkpoint is not None:
            checkpoint = Checkpoint(run.checkpoint, sample, digest, ranks)
            evaluator.resume(checkpoint, same_batches=run.max_batch is None)
    # Enumeration evaluates both ends among all coalitions; in a checkpoint they identify the model.
    enumerated = isinstance(parts[0], Enumeration)
    ends = np.zeros(2)
    if checkpoint is not None or not enumerated:
        ends = evaluator(empty_and_full(game.players))
    if enumerated:
        evaluator.evaluations = 0
    evaluator.advance = advance
    counts: list[int] = []
    for part in parts:
        if isinstance(part, Regression):
            part.ends = ends
        if isinstance(part, Regression | PairSampling):
            part.agree = evaluator.agree
        while part.stopped_by is None:
            part.absorb(evaluator(part.plan()))
        counts.append(evaluator.evaluations - sum(counts))
        if isinstance(part, Screening):
            parts.extend(following(part, part.chosen))
        if isinstance(part, Enumeration):
            ends = part.ends
    if checkpoint is not None:
        checkpoint.save()
    return counts, {
        "value": float(ends[1]),
        "baseline": float(ends[0]),
        "batch_size": evaluator.batch_size,
    }


def fingerprint(game: Game, parts: Sequence[Estimator]) -> str:
    """Return a digest of the game and all settings of the estimate, except the batch size."""
    own: Any = getattr(game, "fingerprint", None)
    kind = type(game)
    request = {
        "game": f"{kind.__module__}.{kind.__qualname__}" if own is None else own(),
        "players": game.players,
        "parts": [
            {
                "method": part.method,
                "design": part.design,
                "indices": list(part.indices),
                "pairs": hashlib.sha256(part.pairs.astype("<i8").tobytes()).hexdigest(),
                **part.request(),
            }
            for part in parts
        ],
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
