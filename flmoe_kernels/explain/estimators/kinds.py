"""Verdicts on pairs of tokens from SII and RG.

SII alone does not tell redundancy from a negative synergy, and says nothing about an interaction whose sign
depends on other tokens. With D = v(S + i + j) - v(S + i) - v(S + j) + v(S), the term of SII:

independent: D is 0 for nearly all S: its root mean square is at most 5% of the largest |index| of all pairs.
redundancy: the tokens share a part of their effect. SII has the sign against their effect, |SII| exceeds the
    overlap by at most 15% of it, and the overlap is above 0. Two copies have an |SII| equal to the overlap, which
    no estimate distinguishes from a slightly larger one.
synergy: |SII| is larger than the overlap can explain: together the tokens have more than the sum of their effects,
    or less than the better one alone (a negative synergy, with an SII below 0).
undecided: neither is certain at this budget; or, with any budget, the sign of D depends on other tokens, as in an
    XOR of three tokens, whose SII and RG are 0.

The overlap of tokens that raise v is RG: the value v(S + i + j) is between that of the better token and the sum
of both if and only if 0 <= -D <= min(v(S + i), v(S + j)) - v(S), whose mean is RG. It applies if SII < 0. For
tokens that lower v, and SII > 0, it is the RG of -v. A number is above another if it is larger by three
standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flmoe_kernels.ops.pair_moe.results import NEAR_TIE

from .indices import LOSS, RG, SII, SQUARE, Estimate

SYNERGY, REDUNDANCY, INDEPENDENT, UNDECIDED = KINDS = (
    *("synergy", "redundancy", "independent", "undecided"),
)
_MARGIN = 0.15  # share of the overlap by which |SII| may exceed it in a redundancy
_ERRORS = 3.0  # standard errors, because many pairs are judged at once
# Share of |v| and of the largest |index|; smaller differences may be rounding errors of float32 evaluations.
_ROUNDING = 1e-5


def pair_kinds(
    found: Mapping[str, Estimate], ends: tuple[float, float]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the verdict on each pair, and notes; `found` has SII and KIND_INDICES, `ends` v(none) and v(all)."""
    sii, overlap = found[SII], found[RG]
    values = [np.abs(found[name].values) for name in (SII, RG, LOSS)]
    largest = max((float(np.nanmax(x, initial=0.0)) for x in values), default=0.0)
    rounding = _ROUNDING * max(largest, *map(abs, ends))
    least = max(NEAR_TIE * largest, rounding)
    square = found[SQUARE]
    low, high = (square.values + sign * _ERRORS * square.errors for sign in (-1.0, 1.0))
    negative = sii.values < 0
    shared = np.where(negative, overlap.values, found[LOSS].values)
    shared_error = np.where(negative, overlap.errors, found[LOSS].errors)
    size, reach = np.abs(sii.values), _ERRORS * sii.errors + rounding
    excess, doubt = size - shared, _ERRORS * np.hypot(sii.errors, shared_error)
    more, covered = excess > doubt + rounding, excess + doubt <= _MARGIN * shared + rounding
    clear = size > reach
    verdicts = np.select(
        [
            high <= least**2,
            clear & more,
            clear & ~more & covered & (shared > _ERRORS * shared_error + rounding),
        ],
        [INDEPENDENT, SYNERGY, REDUNDANCY],
        UNDECIDED,
    )
    # Certainly not independent, though the mean is certainly small.
    mixed = (verdicts == UNDECIDED) & (low > least**2) & (size + reach <= least + 2.0 * rounding)
    notes: tuple[str, ...] = ()
    if mixed.any():
        notes = (
            f"{int(mixed.sum())} pairs are undecided with any budget: the sign of their interaction depends on "
            "other tokens",
        )
    return tuple(verdicts.tolist()), notes
