"""Kinds of interaction experts and their messages for token pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

UNIQUE_A, UNIQUE_B, SYNERGY, REDUNDANCY, NULL = KINDS = (
    "unique_a",
    "unique_b",
    "synergy",
    "redundancy",
    "null",
)
# The kinds of the published layer, for one pair of modalities.
DEFAULT_KINDS = (UNIQUE_A, UNIQUE_B, SYNERGY, REDUNDANCY)

# kind -> (s1, s2, s3): the pair's message is s1 * a_i + s2 * c_j + s3 * a_i * c_j. Operators represent kinds
# by positions in KINDS; csrc/cpu/pair_gate.h has the same table.
COEFFICIENTS: dict[str, tuple[float, float, float]] = {
    UNIQUE_A: (1.0, 0.0, 0.0),
    UNIQUE_B: (0.0, 1.0, 0.0),
    SYNERGY: (0.0, 0.0, 1.0),
    REDUNDANCY: (0.5, 0.5, 0.0),
    NULL: (0.0, 0.0, 0.0),
}
_OTHER_SIDE = {UNIQUE_A: UNIQUE_B, UNIQUE_B: UNIQUE_A}
MAX_EXPERTS = 8


def swap_sides(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds of the same experts seen from side b: pair_moe(k, q, c, a, kinds=swap_sides(kinds))."""
    return tuple(_OTHER_SIDE.get(kind, kind) for kind in kinds)


def kind_codes(kinds: Iterable[str]) -> list[int]:
    return [KINDS.index(kind) for kind in kinds]


def coefficients_of(codes: Sequence[int]) -> list[tuple[float, float, float]]:
    return [COEFFICIENTS[KINDS[code]] for code in codes]
