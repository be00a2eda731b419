"""Token sets, and measurement of a metric's drop when they are masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.explain.attribution.targets import Targets
from flmoe_kernels.explain.extras import progress_bar
from flmoe_kernels.explain.games.masked import MaskedModel
from flmoe_kernels.explain.games.memory import require_room
from flmoe_kernels.explain.games.tokens import places
from flmoe_kernels.ops.pair_moe.results import NEAR_TIE

from .drops import KINDS, SUFFICIENCY

_DRAW_BYTES = 40  # bytes per random rank, with the temporary memory of the sort
_DROP_BYTES = 160  # bytes per sample and budget: drops of two kinds and three metrics, and copies
_LOGIT_BYTES = 64  # bytes per class, sample and budget: logits of two kinds, and copies


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
    candidate: Sequence[Tensor], n_random: int, seed: int, budgets: int = 1, classes: int = 0
) -> list[Tensor]:
    """Draw uniformly random ranks, M x (n_random, B, L_m), for the candidates M x (B, L_m).

    They do not depend on the device, and a larger n_random keeps the first draws. Raises ValueError: the draws,
    the sets of `budgets` budgets chosen by them, and the logits of `classes` classes do not fit in memory.
    """
    tokens, batch = sum(x.numel() for x in candidate), len(candidate[0])
    drops = _DROP_BYTES + _LOGIT_BYTES * classes
    each = (_DRAW_BYTES + 2 * budgets) * tokens + drops * budgets * batch
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
    keep: bool = False,
) -> dict[str, Any]:
    """Measure the drops of token sets; return identified, random, original and evaluations of MaskingDrops.

    chosen: M x (1 + R, K, B, L_m) bool, among the candidates M x (B, L_m): the identified, then the random sets.
    keep: also return logits and masked_logits.
    """
    sets, budgets, batch = chosen[0].shape[:3]
    count = sets * budgets * batch
    flat = [x.flatten(0, 2) for x in chosen]
    empty = torch.stack([x.sum(dim=1) for x in candidate]).sum(dim=0) == 0

    kept: list[Tensor] = []

    def read(rows: Tensor, absent: Sequence[Tensor]) -> Tensor:
        logits = masked.logits(rows, absent)
        if keep:
            kept.append(logits.double())
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
    found = {
        "identified": drops[:, :, 0].clone(),
        "random": drops[:, :, 1:].clone(),
        "original": original,
        "evaluations": batch + 2 * count,
    }
    if keep:
        logits = torch.cat(kept)
        shape = (len(KINDS), sets, budgets, batch, logits.shape[1])
        found["logits"] = logits[:batch].clone()
        found["masked_logits"] = logits[batch:].view(shape).transpose(2, 3).contiguous()
    return found
