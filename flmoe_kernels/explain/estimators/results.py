"""Results of pair estimates: values, errors and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.archive import Arrays, Saved
from flmoe_kernels.explain.extras import optional_package
from flmoe_kernels.explain.games.coalitions import Floats, Ints
from flmoe_kernels.explain.reliability import RULE, near_ties

from .indices import KSII, LINEAR, SII, STII

CLOSED_FORM = "closed_form"
_ROUNDING = 1e-9  # relative to the values of the game
LARGEST, SMALLEST, MAGNITUDE = RANKINGS = ("largest", "smallest", "magnitude")


def with_notes(line: str, notes: Sequence[str]) -> str:
    """A result's printed form: a line that describes it, and a line for every note."""
    return "\n".join([line, *(f"note: {note}" for note in notes)])


def too_small(values: Floats, errors: Floats, size: float) -> tuple[str, ...]:
    """A note if zeros would be closer to the index than the values.

    The squared error of zeros is the sum of the squared index, whose unbiased estimate is the sum of the squared
    values minus the squared errors; that of the values is the sum of the squared errors. Errors far below `size`,
    the largest known value, are rounding errors.
    """
    errors = np.where(errors <= _ROUNDING * size, 0.0, errors)
    known = np.isfinite(values) & np.isfinite(errors)
    error = float((errors[known] ** 2).sum())
    if error <= 0.0 or (values[known] ** 2).sum() - error >= error:
        return ()
    return (
        "the budget is too small: zeros would have a smaller error than these values, taken together; raise the "
        "budget or use fewer candidate pairs",
    )


def scored(found: PairValues) -> tuple[int, bool]:
    """The number of pairs with a value, and whether these are all pairs of the tokens."""
    count = int(np.isfinite(found.values).sum())
    return count, count == math.comb(found.players, 2)


@dataclass(frozen=True, eq=False, repr=False)
class PairValues(Saved):
    """An index of the token pairs of one sample.

    Attributes:
        index: "SII", "k-SII", "STII", "BII", see `linear`, or "RG", see `indices`.
        values: (p,) float64, in units of v; NaN for a pair that no draw gave a value.
        standard_errors: (p,), 0 if exact, NaN if the draws do not give one (see `notes` and `sampling`). They
            hold for single pairs: the largest of many values is more likely than the others to be too large by
            more than its error. Errors of pairs that share draws are not independent.
        player_values, player_errors: (n,), the index of single players, with SII the Shapley values; None for RG
            and with "toggling".
        pairs: (p, 2), players i < j.
        tokens: (n, 2), modality and position of each player.
        lengths: L_m of each modality, including padding.
        value, baseline: v(all) and v(none).
        method: "closed_form", "exact" (by enumeration) or "sampling".
        design: of sampling, "regression" or "toggling", see `Sampling`; else empty.
        stopped_by: "exact", "budget" or "tolerance"; "tolerance" causes a bias, see `sampling`.
        draws: coalitions drawn; with "toggling" each draw gives every pair one S.
        evaluations: coalitions evaluated by the design, and by the screening before it; a coalition that several
            steps of the run need counts once per step. In closed form 1, a pass of the layer.
        batch_size: coalitions that were evaluated together; a model's last bits may depend on it.
        candidates: a description of how the pairs were chosen.
        game: the value function, see `TokenGame.describe`.
        sampling: budget, tolerance, min_draws, seed and antithetic; None without sampling.
        sample: position in the batch.
        kinds: verdict on each pair, "synergy", "redundancy", "independent" or "undecided", by the rule of `kinds`;
            empty unless SII and RG were requested together.
        notes: candidates chosen among near-ties, what a screening left out, a budget that is too small, reasons
            for missing errors, and for a result of `top` a ranking that is not distinguishable.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = (
        *("tokens", "pairs", "values", "standard_errors"),
        *("player_values", "player_errors"),
    )
    _OPTIONAL: ClassVar[tuple[str, ...]] = ("player_values", "player_errors")
    _NUMPY: ClassVar[bool] = True

    index: str
    values: Floats
    standard_errors: Floats
    pairs: Ints
    tokens: Ints
    lengths: tuple[int, ...]
    value: float
    baseline: float
    method: str
    stopped_by: str
    draws: int
    evaluations: int
    batch_size: int
    candidates: str
    game: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] | None = None
    sample: int = 0
    notes: tuple[str, ...] = ()
    player_values: Floats | None = None
    player_errors: Floats | None = None
    design: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def efficiency_residual(self) -> float:
        """Sum of the index minus (v(all) - v(none)); 0 for an exact index, up to rounding.

        The sum is over players for SII, whose players have Shapley values, and over players and all pairs for
        k-SII and STII. NaN for other indices, for a part of the pairs, and without values of players.
        """
        if self.player_values is None or self.index not in (SII, KSII, STII):
            return math.nan
        total = float(self.player_values.sum())
        if self.index != SII:
            if len(self) < math.comb(self.players, 2):
                return math.nan
            total += float(self.values.sum())
        return total - (self.value - self.baseline)

    @property
    def players(self) -> int:
        return len(self.tokens)

    @property
    def exact(self) -> bool:
        return self.stopped_by == "exact"

    def __len__(self) -> int:
        return len(self.pairs)

    def matrix(self, errors: bool = False) -> Floats:
        """Return the values, or standard errors, as a symmetric matrix (n, n); NaN for other pairs."""
        whole = np.full((self.players, self.players), np.nan)
        i, j = self.pairs.T
        whole[i, j] = whole[j, i] = self.standard_errors if errors else self.values
        return whole

    def between(self, m: int = 0, n: int = 1, errors: bool = False) -> Floats:
        """Return (L_m, L_n), tokens of modality m with those of n; NaN for padding and other pairs."""
        for name, modality in (("m", m), ("n", n)):
            check.require_count(name, modality, 0, len(self.lengths) - 1)
        whole = np.full((self.lengths[m], self.lengths[n]), np.nan)
        rows, columns = (np.flatnonzero(self.tokens[:, 0] == k) for k in (m, n))
        part = self.matrix(errors)[np.ix_(rows, columns)]
        whole[np.ix_(self.tokens[rows, 1], self.tokens[columns, 1])] = part
        return whole

    def ranked(self, count: int | None = None, by: str = LARGEST) -> Ints:
        """Return positions in `pairs`, sorted by value: largest, smallest or magnitude; ties keep their order."""
        if count is not None:
            check.require_count("count", count, 0)
        order = np.argsort(-self.keys(by), kind="stable")
        return order if count is None else order[:count]

    def near_ties(self, count: int, by: str = LARGEST) -> int:
        """Return the number of pairs after the first `count` that are not distinguishable from the last of these.

        They differ from it by at most two standard errors of the difference, or 5% of the largest magnitude.
        """
        check.require_count("count", count, 0)
        order = self.ranked(by=by)
        return near_ties(self.keys(by)[order], count, self.standard_errors[order])

    def top(self, count: int, by: str = LARGEST) -> PairValues:
        """Return a copy with only the first pairs, in the order of `ranked`; its notes report near-ties."""
        check.require_count("count", count, 1)
        kept, tied = self.ranked(count, by), self.near_ties(count, by)
        notes = self.notes
        if tied:
            notes += (
                f"the choice of the first {count} pairs is not distinguishable: {tied} left out, whose "
                f"{self.index} differs from the last one kept by at most two standard errors or {RULE}",
            )
        return replace(
            self,
            notes=notes,
            pairs=self.pairs[kept],
            values=self.values[kept],
            standard_errors=self.standard_errors[kept],
            kinds=tuple(self.kinds[k] for k in kept) if self.kinds else (),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of plain Python values for every pair, in the order of `pairs`."""
        first, second = self.tokens[self.pairs[:, 0]], self.tokens[self.pairs[:, 1]]
        columns: dict[str, Any] = {
            "modality_i": first[:, 0],
            "token_i": first[:, 1],
            "modality_j": second[:, 0],
            "token_j": second[:, 1],
            "value": self.values,
            "standard_error": self.standard_errors,
        }
        if self.kinds:
            columns["kind"] = np.array(self.kinds)
        lists = [column.tolist() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def table(self, count: int = 10, by: str = LARGEST) -> str:
        """Format the first pairs as text, below a line that describes them."""
        best = self.top(count, by)
        lines = [
            with_notes(self._line(), best.notes),
            f"{'i':>10} {'j':>10} {self.index:>12} {'std. error':>12}",
        ]
        for row in best.rows():
            i = f"{row['modality_i']}:{row['token_i']}"
            j = f"{row['modality_j']}:{row['token_j']}"
            line = f"{i:>10} {j:>10} {row['value']:>12.5g} {row['standard_error']:>12.2g}"
            lines.append(f"{line}  {row['kind']}" if self.kinds else line)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values, ready for JSON; None for NaN, which JSON does not have."""
        arrays: dict[str, Any] = {"tokens": self.tokens.tolist(), "pairs": self.pairs.tolist()}
        for name in ("values", "standard_errors", *self._OPTIONAL):
            given = getattr(self, name)
            lists = given if given is None else given.tolist()
            arrays[name] = lists and [None if math.isnan(x) else x for x in lists]
        return {
            **self._header(),
            "lengths": list(self.lengths),
            "notes": list(self.notes),
            "kinds": list(self.kinds),
            **arrays,
        }

    def to_shapiq(self) -> Any:
        """Convert to shapiq.InteractionValues of order 2. It has no errors, and 0 for pairs without value.

        Raises:
            ModuleNotFoundError: shapiq is not installed.
            ValueError: the index is RG, which shapiq does not have.
        """
        if self.index not in LINEAR:
            known = ", ".join(LINEAR)
            raise ValueError(
                f"to_shapiq: expected an index of {known}, which shapiq has, got {self.index}"
            )
        lookup = {(int(i), int(j)): k for k, (i, j) in enumerate(self.pairs)}
        return optional_package("shapiq").InteractionValues(
            values=self.values.copy(),
            index=self.index,
            min_order=2,
            max_order=2,
            n_players=self.players,
            interaction_lookup=lookup,
            estimated=not self.exact,
            estimation_budget=self.evaluations,
            baseline_value=self.baseline,
        )

    def keys(self, by: str) -> Floats:
        """Keys (p,) of a ranking; the largest comes first."""
        check.require_choice("by", by, RANKINGS)
        signed = -self.values if by == SMALLEST else self.values
        return np.abs(signed) if by == MAGNITUDE else signed

    def __repr__(self) -> str:
        return with_notes(self._line(), self.notes)

    def _line(self) -> str:
        how = self.method.replace("_", " ")
        if self.design:
            how += f" by {self.design}"
        if not self.exact:
            how += f" of {self.draws} draws, stopped by {self.stopped_by}"
        return (
            f"PairValues({self.index} of {len(self)} pairs ({self.candidates}) of {self.players} "
            f"tokens; {how}; {self.evaluations} evaluations)"
        )

    @classmethod
    def _check(cls, name: str, arrays: Arrays) -> None:
        tokens, pairs = arrays["tokens"], arrays["pairs"]
        count = pairs.shape[:1]
        shapes = {
            "tokens": (*tokens.shape[:1], 2),
            "pairs": (*count, 2),
            "values": count,
            "standard_errors": count,
            **{name: tokens.shape[:1] for name in cls._OPTIONAL if name in arrays},
        }
        for key, shape in shapes.items():
            kind = "i" if key in ("tokens", "pairs") else "f"
            if arrays[key].shape != shape or arrays[key].dtype.kind != kind:
                raise ValueError(f"{name}: expected {key} {shape}, got {arrays[key].shape}")
        if pairs.size and not (pairs.min() >= 0 and pairs.max() < len(tokens)):
            raise ValueError(f"{name}: expected pairs of {len(tokens)} players, got other numbers")
