"""Coalitions as packed bits, to save memory and to compare rows.

A coalition of n players is a row of (n + 7) // 8 bytes; player k is bit 7 - k % 8 of byte k // 8 (numpy's order).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Packed = NDArray[np.uint8]

_BITS_SET = np.array([byte.bit_count() for byte in range(256)], dtype=np.int64)


def pack(coalitions: Bools) -> Packed:
    """Pack (m, n) bool into (m, bytes)."""
    return np.packbits(coalitions, axis=1)


def unpack(packed: Packed, players: int) -> Bools:
    """Unpack (m, bytes) into (m, n) bool."""
    return np.unpackbits(packed, axis=1, count=players).astype(np.bool_)


def sizes(packed: Packed) -> Ints:
    """Number of players of each coalition, (m,)."""
    return _BITS_SET[packed].sum(axis=1)


def distinct(packed: Packed) -> tuple[Packed, Ints]:
    """Return the distinct rows, smaller coalitions first, and the position of each given row among them.

    A model that skips absent tokens takes about the same time for neighbours, so batches of neighbours are
    balanced. The order depends only on the set of rows.
    """
    if not packed.shape[1]:
        return packed[:1], np.zeros(len(packed), dtype=np.int64)
    # Every row becomes a single value, compared byte by byte.
    whole = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    rows = packed[first]
    order = np.argsort(sizes(rows), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[order], place[inverse.ravel()]


def toggled(inside: Bools, rows: Ints) -> Packed:
    """Toggle the players of each row (m, k) in a coalition (n,); packed result. Player n stands for no player."""
    packed = np.repeat(pack(inside[None]), len(rows), axis=0)
    row = np.arange(len(rows))
    for column in rows.T:
        real = column < len(inside)
        chosen = column[real]
        packed[row[real], chosen // 8] ^= (128 >> (chosen % 8)).astype(np.uint8)
    return packed


def from_integers(codes: Ints, players: int) -> Packed:
    """Convert codes, whose bit k is player k, into packed coalitions."""
    return pack((codes[:, None] >> np.arange(players)) & 1 == 1)


def empty_and_full(players: int) -> Packed:
    """The empty and the full coalition, (2, bytes)."""
    return pack(np.stack([np.zeros(players, dtype=np.bool_), np.ones(players, dtype=np.bool_)]))


def all_pairs(players: Sequence[int] | Ints) -> Ints:
    """All pairs (p, 2) of the given players, in their order."""
    chosen = np.asarray(players, dtype=np.int64)
    first, second = np.triu_indices(len(chosen), k=1)
    return np.stack([chosen[first], chosen[second]], axis=1)
