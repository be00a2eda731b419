"""Measurement and results of a metric's drop when tokens are masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.archive import Saved
from flmoe_kernels.explain.attribution.targets import PROB, Targets
from flmoe_kernels.explain.estimators.results import with_notes
from flmoe_kernels.explain.extras import progress_bar
from flmoe_kernels.explain.games.masked import MaskedModel
from flmoe_kernels.explain.games.memory import require_room
from flmoe_kernels.explain.games.tokens import places
from flmoe_kernels.explain.reliability import LEAST_COUNT, RULE, error_of_mean
from flmoe_kernels.ops.pair_moe.results import NEAR_TIE

_DRAW_BYTES = 40  # of a random rank, with the sort that computes it
_DROP_BYTES = 160  # of the drops of a sample and budget: two kinds, three metrics, copies
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

    Without random draws random, random_std and gap are NaN.
    """

    identified: Tensor
    standard_error: Tensor
    random: Tensor
    random_std: Tensor
    gap: Tensor

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
    """

    _ARRAYS: ClassVar = (
        *("identified", "random", "original", "masked", "maskable", "targets", "near_ties"),
    )
    _OPTIONAL: ClassVar = ("near_ties",)

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

    def _places(self, kind: str, metric: str) -> tuple[int, int]:
        check.require_choice("kind", kind, KINDS)
        check.require_choice("metric", metric, self.metrics)
        return KINDS.index(kind), self.metrics.index(metric)

    def _summary(self, kind: str, metric: str, weights: Tensor) -> Summary:
        """Summarize the drops times weights (K, k)."""
        place = self._places(kind, metric)
        weights = weights.to(self.identified.device)
        there = self.maskable > 0
        identified = self.identified[place][there] @ weights
        by_seed = (self.random[place][:, there] @ weights).mean(dim=1)
        mean, random = identified.mean(dim=0), by_seed.mean(dim=0)
        seeds, samples = len(by_seed), len(identified)
        spread = by_seed.std(dim=0) if seeds > 1 else random * torch.nan
        error = mean * torch.nan
        if samples >= LEAST_COUNT:
            error = error_of_mean((identified - mean).square().sum(dim=0), samples)
        gap = mean - random if kind == COMPREHENSIVENESS else random - mean
        return Summary(mean, error, random, spread, gap)


def tied_tokens(scores: Tensor, allowed: Tensor, chosen: Tensor) -> Tensor:
    """Whether a token left out is a near-tie of the last one chosen, (B, K) bool.

    scores, allowed: (B, L). chosen: (K, B, L) bool, the tokens of highest score.
    """
    if not scores.shape[1]:
        return torch.zeros((scores.shape[0], len(chosen)), dtype=torch.bool, device=scores.device)
    size = scores.abs().masked_fill(~allowed, 0.0).amax(dim=1)
    low = scores.masked_fill(~chosen, torch.inf).amin(dim=2)
    high = scores.masked_fill(chosen | ~allowed, -torch.inf).amax(dim=2)
    return (low - high <= NEAR_TIE * size).T


def draw_places(
    candidate: Sequence[Tensor], n_random: int, seed: int, budgets: int = 1
) -> list[Tensor]:
    """Draw uniformly random ranks, M x (n_random, B, L_m), for the candidates M x (B, L_m).

    They do not depend on the device, and a larger n_random keeps the first draws.

    Raises:
        ValueError: the draws, and the sets of `budgets` budgets chosen by them, do not fit in memory.
    """
    tokens, batch = sum(x.numel() for x in candidate), len(candidate[0])
    each = (_DRAW_BYTES + 2 * budgets) * tokens + _DROP_BYTES * budgets * batch
    require_room("n_random", n_random, 0, each, candidate[0].device)
    generator = torch.Generator().manual_seed(int(seed))
    lengths = [x.shape[1] for x in candidate]
    keys = [
        torch.rand((len(candidate[0]), sum(lengths)), generator=generator, dtype=torch.float64)
        for _ in range(n_random)
    ]
    whole = torch.stack(keys) if keys else torch.zeros((0, len(candidate[0]), sum(lengths)))
    parts = whole.to(candidate[0].device).split(lengths, dim=2)
    return [places(part, allowed) for part, allowed in zip(parts, candidate, strict=True)]


@torch.no_grad()
def measure(
    masked: MaskedModel,
    targets: Targets,
    metrics: Sequence[str],
    chosen: Sequence[Tensor],
    candidate: Sequence[Tensor],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the drops of token sets; return identified, random, original and evaluations of MaskingDrops.

    Args:
        chosen: M x (1 + R, K, B, L_m) bool, among the candidates: the identified set, then the random sets.
        candidate: M x (B, L_m) bool.
    """
    sets, budgets, batch = chosen[0].shape[:3]
    count = sets * budgets * batch
    flat = [x.flatten(0, 2) for x in chosen]
    empty = torch.stack([x.sum(dim=1) for x in candidate]).sum(dim=0) == 0

    def read(rows: Tensor, absent: Sequence[Tensor]) -> Tensor:
        logits = masked.logits(rows, absent)
        values = torch.stack([targets.read(logits, metric, rows) for metric in metrics])
        if not bool((values.isfinite() | empty[rows]).all()):
            wrong = (~values.isfinite() & ~empty[rows]).nonzero()[0].tolist()
            raise ValueError(
                f"model: expected finite values of {metrics[wrong[0]]}, got "
                f"{float(values[tuple(wrong)])} for sample {int(rows[wrong[1]])}; a layer may give NaN "
                "if no token is left, then use fill='zero' or 'mean', which keep all tokens"
            )
        return values

    samples = torch.arange(batch, device=masked.device)
    parts = samples.split(masked.max_batch)
    original = torch.cat(
        [read(x, [torch.zeros_like(c[x]) for c in candidate]) for x in parts], dim=1
    )
    blocks = []
    with progress_bar(progress, batch + 2 * count, f"masking of {batch} sample(s)") as advance:
        advance(batch)
        for kind in KINDS:
            for rows in torch.arange(count, device=masked.device).split(masked.max_batch):
                of = rows % batch
                hidden = [x[rows] for x in flat]
                if kind == SUFFICIENCY:
                    hidden = [c[of] & ~gone for c, gone in zip(candidate, hidden, strict=True)]
                blocks.append(original[:, of] - read(of, hidden))
                advance(len(rows))
    drops = torch.cat(blocks, dim=1).view(len(metrics), len(KINDS), sets, budgets, batch)
    drops = drops.permute(1, 0, 2, 4, 3)
    drops = drops.masked_fill(empty[:, None], torch.nan)
    return {
        "identified": drops[:, :, 0].clone(),
        "random": drops[:, :, 1:].clone(),
        "original": original,
        "evaluations": batch + 2 * count,
    }
