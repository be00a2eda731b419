"""Results of masking: drops of a metric, accuracy, F1 and AUROC."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.archive import Saved
from flmoe_kernels.explain.attribution.targets import PROB
from flmoe_kernels.explain.estimators.results import with_notes
from flmoe_kernels.explain.reliability import CONFIDENCE_95, LEAST_COUNT, RULE, error_of_mean

from .performance import area_notes, performance

# Arrays of MaskingDrops, with the dimension of the samples.
_SAMPLES = {
    **{"identified": 2, "random": 3, "original": 1, "masked": 0, "maskable": 0, "targets": 0},
    **{"near_ties": 0, "labels": 0, "logits": 0, "masked_logits": 2},
}
# Fields that results of one data set have in common.
_COMMON = ("index", "unit", "budgets", "metrics", "multi_label")
COMPREHENSIVENESS, SUFFICIENCY = KINDS = ("comprehensiveness", "sufficiency")
MEAN, AUC = AOPC_MODES = ("mean", "auc")


class Summary(NamedTuple):
    """Means over samples: tensors (K,) for the budgets, or () for the aggregate over budgets.

    identified: the mean drop when identified tokens are masked.
    standard_error: of that mean, over samples, see `reliability.error_of_mean`; NaN for fewer than LEAST_COUNT.
    random: the mean drop when random tokens are masked, over seeds and samples.
    random_std: the standard deviation over seeds of the samples' mean; NaN for one seed.
    gap: advantage of identified tokens: identified - random for comprehensiveness, which should be large;
        random - identified for sufficiency, which should be small.
    gap_error: standard error of the gap over samples, each paired with its own random sets; NaN as standard_error.

    Without random draws random, random_std, gap and gap_error are NaN.
    """

    identified: Tensor
    standard_error: Tensor
    random: Tensor
    random_std: Tensor
    gap: Tensor
    gap_error: Tensor

    def gap_interval(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the paired 95% confidence interval of the gap."""
        return self.gap - CONFIDENCE_95 * self.gap_error, self.gap + CONFIDENCE_95 * self.gap_error

    def __repr__(self) -> str:
        numbers = (
            f"{name}=" + " ".join(f"{number:.5g}" for number in x.flatten().tolist())
            for name, x in self._asdict().items()
        )
        return f"Summary({', '.join(numbers)})"


@dataclass(frozen=True, eq=False, repr=False)
class MaskingDrops(Saved):
    """Drops of B samples for K budgets and Q metrics, in float64.

    f is a metric of the target, x a sample, T the tokens identified for a budget, and N all maskable tokens:

        comprehensiveness = f(x) - f(x with T masked)
        sufficiency       = f(x) - f(x with N without T masked)

    Drops of a sample without maskable tokens are NaN; it is left out of all means.

    Attributes:
        index: "faithfulness" (T by attributions) or "pair_masking" (T by ranked pairs).
        unit: of the budgets, "percent" of each modality's tokens or "tokens".
        budgets: K increasing numbers.
        metrics: Q of "prob", "log_prob", "logit", see `Targets.read`.
        identified: (2, Q, B, K): comprehensiveness, sufficiency.
        random: (2, Q, R, B, K), the same for random T with as many tokens of each modality; R repeats.
        original: (Q, B), f(x).
        masked: (B, K) int64, the size of T.
        maskable: (B,) int64, the size of N.
        targets, multi_label: see Attribution.
        seed: of the random draws.
        evaluations: number of samples, masked or not, that the model evaluated.
        batch_size: samples evaluated at once.
        settings: fill, expert, exempt and settings of the call.
        near_ties: (B, K) bool, whether T was chosen among near-ties: a token or pair was left out that is not
            distinguishable from the last one chosen. False for listed pairs, which have no values. None in files
            of earlier versions.
        labels: (B,) classes or (B, C) 0/1, int64, None if none were given; then there are no logits either.
        logits: (B, C), of the unmasked samples.
        masked_logits: (2, 1 + R, B, K, C), of the samples with T, or all but T, masked; identified T first.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = tuple(_SAMPLES)
    _OPTIONAL: ClassVar[tuple[str, ...]] = ("near_ties", "labels", "logits", "masked_logits")

    index: str
    unit: str
    budgets: tuple[float, ...]
    metrics: tuple[str, ...]
    identified: Tensor
    random: Tensor
    original: Tensor
    masked: Tensor
    maskable: Tensor
    targets: Tensor
    multi_label: bool
    seed: int
    evaluations: int
    batch_size: int
    settings: dict[str, Any]
    near_ties: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None
    masked_logits: Tensor | None = None

    @classmethod
    def concatenate(cls, results: Sequence[MaskingDrops]) -> MaskingDrops:
        """Join the results of the batches of a data set; means, F1 and AUROC are then over all samples.

        Give every batch a seed of its own: batches with equal seeds have equal random ranks. settings["seeds"]
        lists the seeds.

        Raises:
            TypeError, ValueError: no results, or results of calls with different arguments.
        """
        for i, result in enumerate(results):
            if not isinstance(result, MaskingDrops):
                raise TypeError(f"results[{i}]: expected MaskingDrops, got {type(result).__name__}")
        if not results:
            raise ValueError("results: expected at least one, got none")
        first = results[0]
        common = first._common()
        for i, result in enumerate(results):
            for name, own in result._common().items():
                if own != common[name]:
                    raise ValueError(
                        f"results[{i}]: expected {name} {common[name]!r} as in results[0], got {own!r}"
                    )
        joined: dict[str, Any] = {
            name: torch.cat([getattr(x, name).to(first.maskable.device) for x in results], dim=dim)
            for name, dim in _SAMPLES.items()
            if getattr(first, name) is not None
        }
        seeds = [seed for x in results for seed in x.settings.get("seeds", [x.seed])]
        return dataclasses.replace(
            first,
            evaluations=sum(x.evaluations for x in results),
            batch_size=max(x.batch_size for x in results),
            settings=first.settings | {"seeds": seeds},
            **joined,
        )

    def performance(self) -> list[dict[str, Any]]:
        """Accuracy, F1 and AUROC: of the unmasked samples, then for every kind, budget and choice of T.

        Returns:
            Rows with the keys kind, budget, tokens ("identified" or "random", whose metrics are means over
            repeats), accuracy, micro_f1, macro_f1 and auroc, see `performance.Performance`. The first row has None
            for the first three. Samples without maskable tokens are left out.

        Raises:
            ValueError: there are no labels.
            ModuleNotFoundError: scikit-learn is not installed.
        """
        if self.labels is None or self.logits is None or self.masked_logits is None:
            raise ValueError("labels: expected labels in the call of faithfulness, got None")
        there = self.maskable > 0
        labels = self.labels[there]

        def row(kind: str | None, budget: float | None, tokens: str | None, *sets: Tensor) -> Any:
            found = [performance(x, labels)._asdict() for x in sets]
            means = {
                name: float(np.mean([x[name] for x in found]))
                for name in ("accuracy", "micro_f1", "macro_f1", "auroc")
            }
            return {"kind": kind, "budget": budget, "tokens": tokens, **means}

        rows = [row(None, None, None, self.logits[there])]
        for kind, of_kind in zip(KINDS, self.masked_logits[:, :, there], strict=True):
            for k, budget in enumerate(self.budgets):
                identified, *random = of_kind[:, :, k]
                rows.append(row(kind, budget, "identified", identified))
                if random:
                    rows.append(row(kind, budget, "random", *random))
        return rows

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on identified tokens chosen among near-ties, and reasons for missing errors."""
        notes: tuple[str, ...] = ()
        tied = torch.zeros(0) if self.near_ties is None else self.near_ties.any(dim=1)
        what = "pairs" if self.unit == "tokens" else "tokens"
        if bool(tied.any()):
            notes += (
                f"the choice of identified tokens is not distinguishable for {int(tied.sum())} of "
                f"{len(tied)} samples: {what} left out differ from the last one chosen by at most {RULE}"
                + (" or two standard errors" if what == "pairs" else ""),
            )
        count = int((self.maskable > 0).sum())
        if count < LEAST_COUNT:
            notes += (
                f"no standard errors: expected at least {LEAST_COUNT} samples with maskable tokens, "
                f"got {count}",
            )
        seeds = self.settings.get("seeds", [])
        if self.random.shape[2] and len(set(seeds)) < len(seeds):
            notes += ("batches with equal seeds: their random tokens are not independent",)
        if self.labels is not None:
            there = self.maskable > 0
            notes += area_notes(self.labels[there], self.targets.shape[1])
        return notes

    def values(self, kind: str = COMPREHENSIVENESS, metric: str = PROB) -> Tensor:
        """Return the drops of single samples, (B, K)."""
        return self.identified[self._places(kind, metric)].clone()

    def curve(self, kind: str = COMPREHENSIVENESS, metric: str = PROB) -> Summary:
        """Return the means over samples for every budget."""
        return self._summary(kind, metric, torch.eye(len(self.budgets), dtype=torch.float64))

    def aopc(self, kind: str = COMPREHENSIVENESS, metric: str = PROB, mode: str = MEAN) -> Summary:
        """Return the area over the perturbation curve: the mean over budgets (DeYoung et al., arXiv 1911.03429).

        Args:
            mode: "mean", or "auc": the trapezoidal area over the budgets, divided by their span.
        """
        check.require_choice("mode", mode, AOPC_MODES)
        weights = torch.full((len(self.budgets),), 1.0 / len(self.budgets), dtype=torch.float64)
        if mode == AUC and len(self.budgets) > 1:
            x = torch.tensor(self.budgets, dtype=torch.float64)
            step = x.diff() / (2.0 * (x[-1] - x[0]))
            zero = step.new_zeros(1)
            weights = torch.cat([step, zero]) + torch.cat([zero, step])
        return Summary(*(x[0] for x in self._summary(kind, metric, weights.unsqueeze(1))))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of numbers for every kind, metric and budget, and for AOPC, whose budget is None."""
        rows = []
        for kind in KINDS:
            for metric in self.metrics:
                curve = self.curve(kind, metric)
                parts = [Summary(*values) for values in zip(*curve, strict=True)]
                for budget, part in zip(
                    (*self.budgets, None), (*parts, self.aopc(kind, metric)), strict=True
                ):
                    numbers = {name: float(x) for name, x in part._asdict().items()}
                    rows.append({"kind": kind, "metric": metric, "budget": budget, **numbers})
        return rows

    def table(self) -> str:
        """Format the rows as text, below a line that describes them."""
        lines = [
            repr(self),
            f"{'kind':<18}{'metric':<10}{self.unit:>8}"
            + "".join(f"{name:>15}" for name in Summary._fields),
        ]
        for row in self.rows():
            budget = "AOPC" if row["budget"] is None else f"{row['budget']:g}"
            numbers = "".join(f"{row[name]:>15.5g}" for name in Summary._fields)
            lines.append(f"{row['kind']:<18}{row['metric']:<10}{budget:>8}{numbers}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        budgets = ", ".join(f"{budget:g}" for budget in self.budgets)
        line = (
            f"MaskingDrops({self.index} of {len(self.maskable)} samples; {budgets} {self.unit}, fill "
            f"{self.settings.get('fill')!r}; {self.random.shape[2]} random repeats, seed {self.seed}; "
            f"{self.evaluations} evaluations)"
        )
        return with_notes(line, self.notes)

    def _common(self) -> dict[str, Any]:
        common = {name: getattr(self, name) for name in _COMMON}
        common |= {"settings." + name: x for name, x in self.settings.items() if name != "seeds"}
        common |= {name: "no" if getattr(self, name) is None else "yes" for name in self._OPTIONAL}
        common |= {"classes": self.targets.shape[1], "random repeats": self.random.shape[2]}
        return common

    def _places(self, kind: str, metric: str) -> tuple[int, int]:
        check.require_choice("kind", kind, KINDS)
        check.require_choice("metric", metric, self.metrics)
        return KINDS.index(kind), self.metrics.index(metric)

    def _summary(self, kind: str, metric: str, weights: Tensor) -> Summary:
        place = self._places(kind, metric)
        weights = weights.to(self.identified.device)
        there = self.maskable > 0
        identified = self.identified[place][there] @ weights
        by_seed = (self.random[place][:, there] @ weights).mean(dim=1)
        mean, random = identified.mean(dim=0), by_seed.mean(dim=0)
        seeds, samples = len(by_seed), len(identified)
        spread = by_seed.std(dim=0) if seeds > 1 else random * torch.nan
        sign = 1.0 if kind == COMPREHENSIVENESS else -1.0
        gaps = sign * (identified - (self.random[place][:, there] @ weights).mean(dim=0))
        errors = [mean * torch.nan, mean * torch.nan]
        if samples >= LEAST_COUNT:
            errors = [
                error_of_mean((x - x.mean(dim=0)).square().sum(dim=0), samples)
                for x in (identified, gaps)
            ]
        return Summary(mean, errors[0], random, spread, gaps.mean(dim=0), errors[1])
