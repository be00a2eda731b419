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

ALL = "all"
ACROSS = "across"

# M x (L_m,), None for a missing modality.
Scores = Sequence[Tensor | None]


@dataclass(frozen=True)
class Candidates:
    """pairs (p, 2) of players, i < j, and how they were chosen in words that the result repeats."""

    pairs: Ints
    chosen: str


def candidate_pairs(
    tokens: Ints,
    pairs: Any = ALL,
    scores: Scores | None = None,
    top: int | None = None,
) -> Candidates:
    """The candidates of one sample.

    Args:
        tokens: (n, 2), modality and position of each player.
        pairs: "all"; "across", of tokens of two modalities; or a list of ((m, i), (n, j)), token i of modality m
            with token j of modality n, both valid.
        scores: with `top`, an attribution of each token, M x (L_m,); padded tokens' do not matter.
        top: keep in each modality the tokens of the largest |score| only, so many of them; ties by the lowest
            position. The S of an index are still drawn among all players: a pair that is kept has the same
            index as without pruning.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if (scores is None) != (top is None):
        raise ValueError("top: expected both scores and top, or neither")
    if not isinstance(pairs, str):
        if top is not None:
            raise ValueError(f"top: expected None with a list of pairs, got {top}")
        listed = require_pairs(listed_pairs("pairs", pairs, tokens), len(tokens))
        return Candidates(listed, f"{len(listed)} listed pairs")
    check.require_choice("pairs", pairs, (ALL, ACROSS))
    players, of = np.arange(len(tokens)), ""
    if scores is not None and top is not None:
        check.require_count("top", top, 1)
        players = _top_players(tokens, scores, top)
        of = f" of the {top} tokens of largest |score| in each modality"
    found = all_pairs(players)
    if pairs == ACROSS:
        modality = tokens[:, 0]
        found = found[modality[found[:, 0]] != modality[found[:, 1]]]
    return Candidates(found, ("all pairs" if pairs == ALL else "pairs across modalities") + of)


def _top_players(tokens: Ints, scores: Scores, top: int) -> Ints:
    modalities = int(tokens[:, 0].max(initial=-1)) + 1
    if not isinstance(scores, list | tuple) or len(scores) < modalities:
        raise ValueError(f"scores: expected a Tensor for each of {modalities} modalities")
    kept = []
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
            raise ValueError(f"scores[{m}]: expected finite scores of valid tokens, got others")
        kept.append(mine[np.sort(np.argsort(-size, kind="stable")[:top])])
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


def listed_pairs(name: str, pairs: Any, tokens: Ints) -> Ints:
    """The pairs (p, 2) of a list of ((m, i), (n, j)), as rows of tokens (n, 2)."""
    found = _integers(name, pairs)
    if not found.size:
        return np.zeros((0, 2), dtype=np.int64)
    if found.ndim != 3 or found.shape[1:] != (2, 2) or found.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected a list of ((m, i), (n, j)), got {found.dtype} {found.shape}"
        )
    player = {(m, i): k for k, (m, i) in enumerate(tokens.tolist())}
    rows = []
    for pair in found.tolist():
        first, second = map(tuple, pair)
        for token in (first, second):
            if token not in player:
                raise ValueError(f"{name}: expected valid tokens, got (modality, token) {token}")
        if first == second:
            raise ValueError(f"{name}: expected pairs of two tokens, got {first} twice")
        rows.append((player[first], player[second]))
    return np.array(rows, dtype=np.int64)


def _integers(name: str, pairs: Any) -> Any:
    """An array. Raises ValueError: rows of several lengths, or a tensor that is not on the host."""
    try:
        return np.asarray(pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of integers, got {pairs!r}") from error


def require_pairs(pairs: Any, players: int) -> Ints:
    """Pairs (p, 2) of players, each i < j.

    Raises:
        ValueError: another shape, a player that is none, a pair of one player or given twice.
    """
    found = _integers("pairs", pairs)
    if not found.size:
        return np.zeros((0, 2), dtype=np.int64)
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise ValueError(f"pairs: expected integers (pairs, 2), got {found.dtype} {found.shape}")
    found = np.sort(found.astype(np.int64), axis=1)
    if found.min() < 0 or found.max() >= players:
        raise ValueError(
            f"pairs: expected players from 0 to {players - 1}, got {found.min()} to {found.max()}"
        )
    if (found[:, 0] == found[:, 1]).any():
        raise ValueError("pairs: expected two players each, got a pair of one with itself")
    if len(np.unique(found, axis=0)) < len(found):
        raise ValueError("pairs: expected each pair once, got one twice")
    return found
