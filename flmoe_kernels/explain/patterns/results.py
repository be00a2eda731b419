"""Results: measures of importance by sample, and their means with confidence intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.archive import Saved
from flmoe_kernels.explain.estimators.results import with_notes
from flmoe_kernels.explain.reliability import LEAST_COUNT, RULE

NORMALIZED_ENTROPY = "normalized_entropy"
ALL = "all"
# Fields that two compared results have in common.
_COMMON = ("index", "measures", "scopes", "top", "confidence", "method", "settings")


class Interval(NamedTuple):
    """A mean over `samples` values and its confidence interval, NaN for fewer than LEAST_COUNT samples."""

    mean: float
    low: float
    high: float
    samples: int


def mean_interval(values: Tensor, confidence: float) -> Interval:
    """The mean of values (B,) and Student's interval mean +- t s / sqrt(n); NaN values are left out.

    t: the quantile of the t distribution with n - 1 degrees of freedom. The interval is exact for normal values,
    and approximate for others, by the central limit theorem. Samples count as independent.
    """
    values = values[~values.isnan()]
    count = len(values)
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if count < LEAST_COUNT:
        return Interval(mean, math.nan, math.nan, count)
    reach = student_quantile(0.5 * (1 + confidence), count - 1) * float(values.std()) / count**0.5
    return Interval(mean, mean - reach, mean + reach, count)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, for at least 15 degrees of freedom.

    Expansion in 1 / freedom around the normal quantile (Abramowitz and Stegun, 26.7.5); relative error below 1e-4
    up to a probability of 0.9995.
    """
    x = NormalDist().inv_cdf(probability)
    square = x * x
    terms = (
        (square + 1) / 4,
        ((5 * square + 16) * square + 3) / 96,
        (((3 * square + 19) * square + 17) * square - 15) / 384,
        ((((79 * square + 776) * square + 1482) * square - 1920) * square - 945) / 92160,
    )
    return x * (1 + sum(term / freedom ** (i + 1) for i, term in enumerate(terms)))


@dataclass(frozen=True, eq=False, repr=False)
class PatternMeasures(Saved):
    """Measures of the importance maps of B samples: Q measures, S scopes, R parts, in float64.

    NaN where a measure is undefined: importance is 0 for all tokens, there is no valid token, or, for
    normalized_entropy, only one. These samples are left out of the means; `notes` counts them.

    Attributes:
        index: "concentration" or "specificity", after `minus` "difference of ...".
        measures: Q names, see `concentration` and `specificity`.
        scopes: S names: "all" tokens, and "modality 0" etc. if there are several.
        parts: R names: experts and "mixture", or for specificity pairs of experts.
        values: (Q, S, R, B).
        tokens: (S, B) int64, valid tokens.
        near_ties: (B,) bool, whether a set of top tokens of the sample was chosen among near-ties; False for
            concentration, which does not depend on the choice.
        top: number of the top tokens (int), or their share of the valid tokens (float).
        confidence: probability that an interval contains the expectation.
        method: of the attributions, see `Attribution.index`.
        settings: arguments of that method.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = ("values", "tokens", "near_ties")

    index: str
    measures: tuple[str, ...]
    scopes: tuple[str, ...]
    parts: tuple[str, ...]
    values: Tensor
    tokens: Tensor
    near_ties: Tensor
    top: int | float
    confidence: float
    method: str
    settings: dict[str, str | int]

    def of(self, measure: str, part: str, scope: str = ALL) -> Tensor:
        """Return the values of the samples, (B,)."""
        places = []
        for name, value, known in (
            ("measure", measure, self.measures),
            ("scope", scope, self.scopes),
            ("part", part, self.parts),
        ):
            check.require_choice(name, value, known)
            places.append(known.index(value))
        return self.values[tuple(places)].clone()

    def summary(self, measure: str, part: str, scope: str = ALL) -> Interval:
        """Return the mean over samples with its confidence interval, see `mean_interval`.

        The confidence is that of a single interval, not of all intervals of a table together.
        """
        return mean_interval(self.of(measure, part, scope), self.confidence)

    def minus(self, other: PatternMeasures) -> PatternMeasures:
        """Return the paired differences per sample: these values minus those of `other`.

        Args:
            other: measures of the same samples and tokens, with the same arguments and attribution method: of the
                same parts, or of a single part, which is subtracted from every part.

        Raises:
            TypeError, ValueError: other is no PatternMeasures or does not match; the message names the difference.
        """
        if not isinstance(other, PatternMeasures):
            raise TypeError(f"other: expected PatternMeasures, got {type(other).__name__}")
        for name in _COMMON:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other: expected {name} {mine!r}, got {theirs!r}")
        if len(other.parts) > 1 and other.parts != self.parts:
            raise ValueError(
                f"other: expected the parts {', '.join(self.parts)}, or a single one, got "
                f"{', '.join(other.parts)}"
            )
        if not torch.equal(self.tokens, other.tokens.to(self.tokens.device)):
            raise ValueError("other: expected the same samples, got other numbers of valid tokens")
        device = self.values.device
        return dataclasses.replace(
            self,
            index=f"difference of {self.index}",
            values=self.values - other.values.to(device),
            near_ties=self.near_ties | other.near_ties.to(device),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on undefined values, on too few samples and on top tokens chosen among near-ties."""
        batch = len(self.near_ties)
        absent = self.values.isnan()
        notes: tuple[str, ...] = ()
        if bool(absent.any()):
            by_scope = absent.any(dim=2).any(dim=0).sum(dim=1).tolist()
            counts = [
                f"{n} in {scope}" for n, scope in zip(by_scope, self.scopes, strict=True) if n
            ]
            single = ", or, for normalized_entropy, a single one" * (
                NORMALIZED_ENTROPY in self.measures
            )
            notes += (
                f"left out of means: of {batch} samples {', '.join(counts)} (importance 0 for all tokens, no "
                f"valid token{single})",
            )
        if batch - int(absent.sum(dim=3).max()) < LEAST_COUNT:
            notes += (f"no intervals for means of fewer than {LEAST_COUNT} samples",)
        if bool(self.near_ties.any()):
            notes += (
                f"top tokens are nearly tied in {int(self.near_ties.sum())} of {batch} samples: the best token "
                f"that is not chosen differs from the last chosen one by at most {RULE}",
            )
        return notes

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every scope, part and measure: scope, part, measure, mean, low, high, samples."""
        return [
            {"scope": scope, "part": part, "measure": measure}
            | self.summary(measure, part, scope)._asdict()
            for scope in self.scopes
            for part in self.parts
            for measure in self.measures
        ]

    def table(self) -> str:
        """Format means and intervals as text, below a line that describes them."""
        scope, part = (max(map(len, x)) + 2 for x in (self.scopes, self.parts))
        head = f"{'':<{scope + part}}" + "".join(f"{name:>28}" for name in self.measures)
        lines = [repr(self), head]
        rows = self.rows()
        for first in range(0, len(rows), len(self.measures)):
            own = rows[first : first + len(self.measures)]
            cells = "".join(f"{_cell(row):>28}" for row in own)
            lines.append(f"{own[0]['scope']:<{scope}}{own[0]['part']:<{part}}{cells}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        top = f"{self.top} tokens" if isinstance(self.top, int) else f"{self.top:.4g} of the tokens"
        line = (
            f"PatternMeasures({self.index} of {self.method} for {len(self.near_ties)} samples; top "
            f"{top}; {100 * self.confidence:g}% intervals)"
        )
        return with_notes(line, self.notes)


def _cell(row: dict[str, Any]) -> str:
    # Adding 0.0 removes the sign of a zero.
    mean, low, high = (round(row[name], 4) + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def require_confidence(confidence: object) -> float:
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        raise TypeError(f"confidence: expected a number, got {type(confidence).__name__}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    return float(confidence)


def joined(parts: Sequence[PatternMeasures]) -> PatternMeasures:
    """The results of batches as one, over all samples."""
    device = parts[0].values.device
    together: dict[str, Any] = {
        name: torch.cat([getattr(x, name).to(device) for x in parts], dim=-1)
        for name in PatternMeasures._ARRAYS
    }
    return dataclasses.replace(parts[0], **together)
