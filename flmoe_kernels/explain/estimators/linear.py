"""Indices that are linear in v, as one table of coefficients for each size.

Every index here is a sum over coalitions T whose coefficient depends only on the size of T and on how many of the
players K (a pair, or one player) are in T:

    index(K) = sum over T of coefficient[|T|, |T & K|] v(T),
    coefficient[s, k] = (-1)^(|K| - k) q(s - k) / C(n - |K|, s - k),

where q(t) is the weight of the sets S = T - K of size t. The indices differ only in q:

| index | of a pair | of a player |
|---|---|---|
| SII | 1 / (n - 1) | Shapley value: 1 / n |
| k-SII, order 2 | SII | Shapley value minus half the SII of all pairs of the player |
| STII, order 2 | 2 (n - 1 - t) / (n (n - 1)) | v(i) - v(none) |
| BII | C(n - 2, t) / 2^(n - 2) | Banzhaf value: C(n - 1, t) / 2^(n - 1) |

Sources: SII, Grabisch and Roubens (1999); k-SII, Bordt and von Luxburg (2023); STII, Sundararajan, Dhamdhere and
Agarwal (2020). The names are those of shapiq.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from flmoe_kernels.explain.games.coalitions import Bools, Floats

from .indices import BII, KSII, SII, STII


@functools.cache
def _log_factorials(count: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, count)))])


def log_binomial(n: Any, k: Any) -> Floats:
    """Return log C(n, k) of integers, -inf outside 0 <= k <= n."""
    top, low = np.broadcast_arrays(np.asarray(n, dtype=np.int64), np.asarray(k, dtype=np.int64))
    inside = (low >= 0) & (low <= top)
    low = np.where(inside, low, 0)
    log = _log_factorials(2 ** int(top.max(initial=1)).bit_length())
    return np.where(inside, log[top] - log[low] - log[top - low], -np.inf)


def share(players: int, inside: int) -> Floats:
    """Return (n + 1, |K| + 1): the share of the sets of size s that contain a given part of K with k players."""
    s, k = np.arange(players + 1.0)[:, None], np.arange(inside + 1.0)
    n = float(players)
    if inside == 1:
        return np.where(k == 1, s, n - s) / n
    parts = [(n - s) * (n - s - 1), s * (n - s), s * (s - 1)]
    return np.concatenate(parts, axis=1) / (n * max(n - 1.0, 1.0))


def table(index: str, players: int, inside: int) -> Floats:
    """Return (n + 1, |K| + 1): C(n, s) * coefficient[s, k], for pairs (inside=2) or single players (inside=1)."""
    if inside == 1 and index == KSII:
        return _remainder(players)
    q = _weights(index, inside)(players, np.arange(players + 1 - inside, dtype=np.float64))
    # C(n, s) / C(n - |K|, s - k) is one over the share.
    with np.errstate(divide="ignore"):
        scale = 1.0 / share(players, inside)
    result = np.zeros((players + 1, inside + 1))
    for k in range(inside + 1):
        sizes = slice(k, players + 1 - inside + k)
        result[sizes, k] = (-1.0) ** (inside - k) * q * scale[sizes, k]
    return result


def _remainder(players: int) -> Floats:
    """The k-SII of a player: its Shapley value minus half the sum of the SII of its pairs."""
    pair, result = table(SII, players, 2), table(SII, players, 1)
    s = np.arange(players + 1.0)
    for k in (0, 1):
        others = np.maximum(s - k, 0.0)  # in T, besides the player
        absent = np.maximum(players - 1 - others, 0.0)
        result[:, k] -= 0.5 * (others * pair[:, k + 1] + absent * pair[:, k])
    return result


def _weights(index: str, inside: int) -> Callable[[int, Floats], Floats]:
    """q(n, t) of the module docstring."""
    if index == BII:
        return lambda n, t: np.exp(log_binomial(n - inside, t) - (n - inside) * np.log(2.0))
    if index == STII:
        if inside == 1:
            return lambda n, t: (t == 0) * 1.0
        return lambda n, t: 2.0 * (n - 1.0 - t) / (n * (n - 1.0))
    return lambda n, t: np.full(len(t), 1.0 / (n + 1.0 - inside))


def sums(inside: Bools, terms: Floats) -> Floats:
    """Sum terms (m, k + 1) over coalitions (m, c): entry k of T's row if k of the pair or player are in T.

    Two columns of terms give the sums of each player (c,), three those of each pair (c, c).
    """
    x = inside.astype(np.float64)
    slope = x.T @ (terms[:, 1] - terms[:, 0])
    if terms.shape[1] == 2:
        return terms[:, 0].sum() + slope
    curve = terms[:, 2] - 2.0 * terms[:, 1] + terms[:, 0]
    return terms[:, 0].sum() + slope[:, None] + slope + x.T @ (x * curve[:, None])
