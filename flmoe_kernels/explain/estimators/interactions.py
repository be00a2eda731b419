"""Public functions for interaction indices of token pairs of any model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.extras import progress_bar
from flmoe_kernels.explain.games.additive import TwoAdditiveGame
from flmoe_kernels.explain.games.coalitions import all_pairs
from flmoe_kernels.explain.games.masked import FILLS
from flmoe_kernels.explain.games.models import Inputs, changed_pairs_reason
from flmoe_kernels.explain.games.token_game import OUTPUTS, TokenGame
from flmoe_kernels.explain.games.tokens import players_of, require_inputs, valid_tokens
from flmoe_kernels.layers.pair_interaction_moe.module import PairInteractionMoE

from .candidates import ALL, SCREENED, Candidates, candidate_pairs, require_pairs
from .evaluator import Game
from .indices import RG, SII, require_indices
from .results import CLOSED_FORM, PairValues
from .run import METHODS, Run, estimate, pair_values, plan
from .sampling import Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

AUTO = "auto"


class ProbeOptions(TypedDict, total=False):
    """The options of `probe_pairs` except `indices`."""

    target: Any
    output: str
    expert: str | int | None
    fill: str
    baseline: Sequence[Tensor | None] | None
    pairs: Any
    scores: Sequence[Tensor | None] | None
    top: int | None
    method: str
    sampling: Sampling | None
    run: Run | None


def shapley_interactions(
    model: Any, inputs: Inputs, masks: Inputs | None = None, **options: Unpack[ProbeOptions]
) -> list[PairValues]:
    """Shapley interaction index of token pairs, for each sample; arguments and errors as in `probe_pairs`.

    For the logit of a PairInteractionMoE with fill="drop" it is exact and takes one pass, unless a forward hook or
    a changed method, norm or projection may change the logit. For other models it is exact for few tokens, else an
    unbiased estimate. See `indices` for the formula, `regression` for the estimate.
    """
    _require_options("shapley_interactions", options)
    results = probe_pairs(model, inputs, masks, indices=(SII,), **options)
    return [result[SII] for result in results]


def redundancy_gap(
    model: Any, inputs: Inputs, masks: Inputs | None = None, **options: Unpack[ProbeOptions]
) -> list[PairValues]:
    """Redundancy gap of token pairs, for each sample; arguments and errors as in `probe_pairs`.

    RG(i, j) = E_S[ min(v(S + i), v(S + j)) - v(S) ] with the S of the Shapley interaction index: the value that
    either token alone keeps. See `indices` for the interpretation. There is no closed form.
    """
    _require_options("redundancy_gap", options)
    results = probe_pairs(model, inputs, masks, indices=(RG,), **options)
    return [result[RG] for result in results]


def probe_pairs(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None = None,
    *,
    indices: Sequence[str] = (SII, RG),
    target: Any = None,
    output: str = "logit",
    expert: str | int | None = None,
    fill: str = "drop",
    baseline: Sequence[Tensor | None] | None = None,
    pairs: Any = ALL,
    scores: Sequence[Tensor | None] | None = None,
    top: int | None = None,
    method: str = AUTO,
    sampling: Sampling | None = None,
    run: Run | None = None,
) -> list[dict[str, PairValues]]:
    """Indices of token pairs, by name, for each sample; all estimated indices share the evaluations.

    Args:
        model, inputs, masks, output, expert, fill, baseline: the value function, see TokenGame.
        indices: "SII", "k-SII", "STII", "BII", see `linear`, and "RG".
        target: the class, an integer for all samples or (B,) integers, a tensor, numpy array or list; None for the
            predicted class of each sample.
        pairs, top: candidates, see `candidates.candidate_pairs`.
        scores: attributions M x (B, L_m), see `candidates.candidate_pairs`.
        method: "closed_form": SII of the logit of a PairInteractionMoE with fill="drop", exact from one pass; not
            for a layer with a forward hook or with a changed method, norm or projection.
            "exact": all coalitions of at most 16 tokens. "sampling": unbiased estimates, see `Sampling.design`.
            "auto": for each index the first of these that applies; "exact" only within the budget.
        sampling: budget, stopping rule, seed and design.
        run: batches, checkpoints, ranks, progress.

    Returns:
        For each sample a result by index; samples do not share coalitions, draws or evaluations.

    Raises:
        TypeError, ValueError: an invalid argument, or a model that gives NaN or inf; the message says what was
            expected and what was passed.

    Cost: for n tokens, of which c are in p candidate pairs, "exact" evaluates 2^n coalitions per sample.
    "regression" evaluates at most the budget and fits up to 2,100 terms: on a core 4 s for 62 tokens and 8,192
    evaluations, 17 s and 0.4 GB for 64 tokens and the default budget. Up to 20 tokens it also fits kernels.
    "toggling" evaluates 1 + c + p coalitions per draw, as many draws as the budget allows; standard errors need
    34 draws. An evaluation is a forward pass of one sample, in batches; of the terms of a PairInteractionMoE
    with a closed form.
    """
    names = require_indices(indices)
    check.require_choice("method", method, (CLOSED_FORM, *METHODS))
    sampling, run = _settings(sampling, run)
    batch = require_inputs(inputs, masks)
    check.require_choice("output", output, OUTPUTS)
    check.require_choice("fill", fill, FILLS)
    if fill != "mean" and baseline is not None:
        raise ValueError(f"baseline: expected None with fill={fill!r}")
    # `PairInteractionMoE.explain` gives the logit with absent tokens masked out.
    closed = isinstance(model, PairInteractionMoE) and output == "logit" and fill == "drop"
    changed = changed_pairs_reason(model) if closed else ""
    closed = closed and not changed
    solved = _solved(names, method, closed, changed)
    estimated = [name for name in names if name not in solved]
    targets, valid = _targets(target, batch), valid_tokens(inputs, masks)
    # For all samples, so that errors are raised before any evaluation.
    candidates = [
        candidate_pairs(players_of(valid, b), pairs, _of_sample(scores, b, batch), top)
        for b in range(batch)
    ]
    play: Any = TwoAdditiveGame
    if not closed:
        value: dict[str, Any] = {"output": output, "fill": fill, "baseline": baseline}
        play = functools.partial(TokenGame, **value, max_batch=run.max_batch)
    total = 0
    if estimated:
        plans = (
            plan(len(players_of(valid, b)), x, estimated, method, sampling, b, bool(solved))
            for b, x in enumerate(candidates)
        )
        total = sum(part.total for parts in plans for part in parts)
    results = []
    with progress_bar(run.shown, total, f"pairs of {batch} sample(s)") as advance:
        for sample, (own_target, chosen) in enumerate(zip(targets, candidates, strict=True)):
            game = play(model, inputs, masks, target=own_target, expert=expert, sample=sample)
            result = {}
            if estimated:
                exact = game.interactions if solved else None
                result = estimate(
                    *(game, chosen, estimated, method, sampling, run, sample, advance), exact
                )
            if solved:
                # The same pairs, of which a screening may have chosen few.
                for other in result.values():
                    chosen = replace(chosen, pairs=other.pairs, chosen=other.candidates)
                closed_form = _in_closed_form(game, chosen, sample)
                kinds = next((x.kinds for x in result.values()), ())
                result[SII] = replace(closed_form, kinds=kinds)
            results.append({name: result[name] for name in names})
    return results


def probe_game(
    game: Game,
    pairs: Any = None,
    *,
    indices: Sequence[str] = (SII, RG),
    method: str = AUTO,
    sampling: Sampling | None = None,
    run: Run | None = None,
) -> dict[str, PairValues]:
    """Indices of pairs of players in any game, see `evaluator.Game`.

    Args:
        pairs: (p, 2) players; None for all pairs; "screened", see `candidates.candidate_pairs`.
        indices, method, sampling, run: as in `probe_pairs`.
    """
    if pairs is None or isinstance(pairs, str):
        if pairs is not None:
            check.require_choice("pairs", pairs, (ALL, SCREENED))
        every = all_pairs(np.arange(game.players))
        chosen = Candidates(every, "all pairs", screen=pairs == SCREENED)
    else:
        listed = require_pairs(pairs, game.players)
        chosen = Candidates(listed, f"{len(listed)} listed pairs")
    names = require_indices(indices)
    sampling, run = _settings(sampling, run)
    parts = plan(game.players, chosen, names, method, sampling, 0)
    total = sum(part.total for part in parts)
    with progress_bar(run.shown, total, f"pairs of {game.players} players") as advance:
        return estimate(game, chosen, names, method, sampling, run, advance=advance)


def _require_options(function: str, options: Mapping[str, Any]) -> None:
    """Raises TypeError, as Python does: an unknown option; the message says where fields of settings belong."""
    for name in options.keys() - ProbeOptions.__annotations__.keys():
        places: list[tuple[str, Any]] = [("sampling", Sampling), ("run", Run)]
        hints = [
            f"; pass {option}={kind.__name__}({name}=...)"
            for option, kind in places
            if name in kind.__dataclass_fields__
        ]
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{''.join(hints)}")


def _settings(sampling: Sampling | None, run: Run | None) -> tuple[Sampling, Run]:
    """Return the settings or their defaults. Raises TypeError: another type."""
    settings = Sampling() if sampling is None else sampling, Run() if run is None else run
    for name, value, kind in zip(("sampling", "run"), settings, (Sampling, Run), strict=True):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    return settings


def _solved(indices: Sequence[str], method: str, closed: bool, changed: str) -> tuple[str, ...]:
    """The indices that need no evaluations."""
    if method == CLOSED_FORM and not (closed and tuple(indices) == (SII,)):
        raise ValueError(
            "method: expected 'auto', 'exact' or 'sampling', as only the SII of the logit of a "
            "PairInteractionMoE with fill='drop' has a closed form, got 'closed_form'"
            + (changed and f"; {changed}")
        )
    return (SII,) if closed and SII in indices and method in (AUTO, CLOSED_FORM) else ()


def _in_closed_form(game: TwoAdditiveGame, chosen: Candidates, sample: int) -> PairValues:
    return pair_values(
        game,
        chosen,
        sample,
        index=SII,
        values=game.interactions(chosen.pairs),
        standard_errors=np.zeros(len(chosen.pairs)),
        value=game.value,
        baseline=game.baseline,
        method=CLOSED_FORM,
        stopped_by="exact",
        draws=0,
        evaluations=1,
        batch_size=1,
    )


def _targets(target: Any, batch: int) -> list[int | None]:
    """The class of each of the B samples; None for the predicted class."""
    if target is None:
        return [None] * batch
    number = check.class_number("target", target)
    if number is None:
        # The games check the values, as they know the number of classes.
        each = check.require_array("target", target, torch.device("cpu")).cpu()
        zeros = each if each.is_floating_point() or each.dtype == torch.bool else 0 * each
        check.require_classes("target", zeros, batch, 1, torch.device("cpu"))
        return list(each.tolist())
    check.require_count("target", number, 0)
    return [number] * batch


def _of_sample(scores: Any, sample: int, batch: int) -> list[Tensor | None] | None:
    """Select the scores of one sample, M x (L_m,), from M x (B, L_m)."""
    if scores is None:
        return None
    if not isinstance(scores, list | tuple):
        raise TypeError(f"scores: expected a list of Tensors, got {type(scores).__name__}")
    for m, score in enumerate(scores):
        if score is not None:
            check.require_tensor(f"scores[{m}]", score)
            if score.dim() != 2 or len(score) != batch:
                raise ValueError(
                    f"scores[{m}]: expected ({batch}, tokens), got {tuple(score.shape)}"
                )
    return [None if score is None else score[sample] for score in scores]
