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
# by positions in KINDS; csrc/cpu/pair_gate.h and csrc/cuda/pair_moe.cu have the same table.
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


def pair_flops(codes: Sequence[int], rank: int, width: int, varies: bool) -> int:
    """FLOP of the forward per valid pair: 2 R for each expert's logit, and 2 V for each expert with a product.

    An expert needs a product for its message from side b; if only sums over the rows are needed (`varies` is
    False: "pool", or a map through a head), only "synergy" does, because the sum over rows of p c_j is c_j times
    the column's sum of p.
    """
    return 2 * rank * len(codes) + 2 * width * _products(codes, varies)


def pair_backward_flops(
    codes: Sequence[int],
    rank: int,
    width: int,
    varies: bool,
    wants: Sequence[bool] = (True,) * 5,
) -> int:
    """FLOP of the backward per valid pair, for the wanted gradients of q, k, a, c and gate_bias.

    The logits again, and the gradients of q and k; for messages, the gradients of the probabilities and c, and
    for "synergy" of a.
    """
    q, k, a, c, bias = wants
    messages = ((q or k or bias) + c) * _products(codes, varies) + a * _products(codes, False)
    return 2 * rank * len(codes) * (1 + q + k) + 2 * width * messages


def _products(codes: Sequence[int], varies: bool) -> int:
    return sum(bool(s3 or (s2 and varies)) for _, s2, s3 in coefficients_of(codes))
