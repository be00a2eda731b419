"""Candidate pairs: all, across modalities, among the top tokens, or listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.coalitions import Ints, all_pairs
from flmoe_kernels.explain.reliability import RULE, near_ties

ALL = "all"
ACROSS = "across"
SCREENED = "screened"

# M x (L_m,), None for a missing modality.
Scores = Sequence[Tensor | None]


@dataclass(frozen=True)
class Candidates:
    """Pairs (p, 2) of players, i < j, a description of their selection for the result, and notes on it."""

    pairs: Ints
    chosen: str
    notes: tuple[str, ...] = ()
    screen: bool = False  # whether a part of the budget selects among the pairs, see `screening`


def candidate_pairs(
    tokens: Ints, pairs: Any = ALL, scores: Scores | None = None, top: int | None = None
) -> Candidates:
    """Return the candidate pairs of one sample.

    Args:
        tokens: (n, 2), modality and position of each player.
        pairs: "all"; "across", of tokens of two modalities; "screened", at most 50 that a sparse fit to a part of
            the budget selects among all, see `screening`; or a list of ((m, i), (n, j)), token i of modality m
            with token j of modality n, both valid.
        scores: with `top`, an attribution of each token, M x (L_m,); scores of padded tokens are ignored.
        top: number of tokens of largest |score| that are kept in each modality; ties go to the lowest position.
            The S of an index are still drawn among all players, so pruning does not change the index of a pair
            that is kept.

    Raises:
        TypeError, ValueError: an invalid argument; the message says what was expected and what was passed.
    """
    if (scores is None) != (top is None):
        raise ValueError("top: expected both scores and top, or neither")
    if not isinstance(pairs, str):
        if top is not None:
            raise ValueError(f"top: expected None with a list of pairs, got {top}")
        listed = require_pairs(listed_pairs("pairs", pairs, tokens), len(tokens))
        return Candidates(listed, f"{len(listed)} listed pairs")
    check.require_choice("pairs", pairs, (ALL, ACROSS, SCREENED))
    players, of = np.arange(len(tokens)), ""
    notes: tuple[str, ...] = ()
    if scores is not None and top is not None:
        check.require_count("top", top, 1)
        players, notes = _top_players(tokens, scores, top)
        of = f" of the {min(top, len(tokens))} tokens of largest |score| in each modality"
    chosen = all_pairs(players)
    if pairs == ACROSS:
        modality = tokens[:, 0]
        chosen = chosen[modality[chosen[:, 0]] != modality[chosen[:, 1]]]
    what = "pairs across modalities" if pairs == ACROSS else "all pairs"
    return Candidates(chosen, what + of, notes, pairs == SCREENED)


def _top_players(tokens: Ints, scores: Scores, top: int) -> tuple[Ints, tuple[str, ...]]:
    """Return the players of largest |score| of each modality, and notes on choices among near-ties."""
    modalities = int(tokens[:, 0].max(initial=-1)) + 1
    if not isinstance(scores, list | tuple) or len(scores) < modalities:
        raise ValueError(f"scores: expected a Tensor for each of {modalities} modalities")
    kept, notes = [], []
    for m in range(modalities):
        mine = np.flatnonzero(tokens[:, 0] == m)
        if not len(mine):
            continue
        score = scores[m]
        check.require_tensor(f"scores[{m}]", score)
        assert score is not None
        if score.dim() != 1 or len(score) <= tokens[mine, 1].max():
            raise ValueError(
                f"scores[{m}]: expected (tokens,) of the modality, got {tuple(score.shape)}"
            )
        size = score.detach().to(torch.float64).abs().cpu().numpy()[tokens[mine, 1]]
        if not np.isfinite(size).all():
            raise ValueError(f"scores[{m}]: expected finite scores of valid tokens, got NaN or inf")
        order = np.argsort(-size, kind="stable")
        kept.append(mine[np.sort(order[:top])])
        tied = near_ties(size[order], top)
        if tied:
            notes.append(
                f"the choice of the top {top} tokens of modality {m} is not distinguishable: {tied} "
                f"left out, whose |score| differs from the last one kept by at most {RULE}"
            )
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64), tuple(notes)


def listed_pairs(name: str, pairs: Any, tokens: Ints) -> Ints:
    """Return the pairs (p, 2) of a list of ((m, i), (n, j)), as row numbers of tokens (n, 2)."""
    array = _integers(name, pairs)
    if not array.size:
        return np.zeros((0, 2), dtype=np.int64)
    if array.ndim != 3 or array.shape[1:] != (2, 2) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected a list of ((m, i), (n, j)), got {array.dtype} {array.shape}"
        )
    player = {(m, i): k for k, (m, i) in enumerate(tokens.tolist())}
    rows = []
    for pair in array.tolist():
        first, second = map(tuple, pair)
        for token in (first, second):
            if token not in player:
                raise ValueError(f"{name}: expected valid tokens, got (modality, token) {token}")
        if first == second:
            raise ValueError(f"{name}: expected pairs of two tokens, got {first} twice")
        rows.append((player[first], player[second]))
    return np.array(rows, dtype=np.int64)


def _integers(name: str, pairs: Any) -> Any:
    """Convert to an array. Raises ValueError: rows of different lengths, or a tensor not on the CPU."""
    try:
        return np.asarray(pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of integers, got {pairs!r}") from error


def require_pairs(pairs: Any, players: int) -> Ints:
    """Return pairs (p, 2) of players, sorted so that i < j.

    Raises ValueError: wrong shape, unknown player, a pair of a player with itself, or a duplicate pair.
    """
    array = _integers("pairs", pairs)
    if not array.size:
        return np.zeros((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"pairs: expected integers (pairs, 2), got {array.dtype} {array.shape}")
    array = np.sort(array.astype(np.int64), axis=1)
    if array.min() < 0 or array.max() >= players:
        raise ValueError(
            f"pairs: expected players from 0 to {players - 1}, got {array.min()} to {array.max()}"
        )
    if (array[:, 0] == array[:, 1]).any():
        raise ValueError("pairs: expected two different players, got a player with itself")
    if len(np.unique(array, axis=0)) < len(array):
        raise ValueError("pairs: expected distinct pairs, got a duplicate")
    return array
