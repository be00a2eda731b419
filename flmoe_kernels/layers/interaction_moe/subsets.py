"""Logits of samples without some of their tokens, from a table of embedded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.dtypes import autocast_dtype, statistics_dtype
from flmoe_kernels.layers.modalities import Masks, Modalities, valid_tokens
from flmoe_kernels.layers.parts import UnsupportedLayer, check_plain
from flmoe_kernels.ops.encoder import api as ops

from .dense import infer
from .experts import ExpertAverage
from .forward import position_table
from .fusion import Inputs
from .module import InteractionMoE
from .packing import Views, plan_tokens

Fills = Sequence[Tensor | None] | None


def has_subset_logits(layer: Any) -> bool:
    """Whether `subset_logits` computes this layer: an InteractionMoE of dense experts, see `check_plain`."""
    if not isinstance(layer, InteractionMoE) or layer.spec.sparse is not None:
        return False
    if backends.requested(layer.backend) not in (None, backends.CPU):
        return False
    try:
        check_plain(layer, "")
    except UnsupportedLayer:
        return False
    return True


def subset_logits(
    layer: Any,
    inputs: Inputs,
    masks: Masks,
    rows: Tensor,
    absent: Sequence[Tensor],
    fills: Fills,
    expert: int | None,
) -> Tensor | None:
    """Logits (N, C) of samples `rows` (N,) without the tokens `absent`, M x (N, L_m) bool.

    They are those of `layer.inference` for B samples, or of one expert, but the inputs are not expanded to N rows,
    and the first encoder layer computes the queries, keys and values of each token once. Absent tokens have the
    values `fills`, broadcastable to (L_m, D), or are masked out (None).

    Returns None if it cannot be computed in this way, which needs the CPU kernels, dense experts, all modalities
    and finite tokens, and neither gradients nor autocast.
    """
    possible = len(rows) > 0 and rows.is_cpu and all(x is not None for x in inputs)
    if not possible or not has_subset_logits(layer):
        return None
    used, samples = rows.unique(return_inverse=True)
    chosen = [None if x is None else x[used] for x in inputs]
    layer._check_options()
    call, backend = layer._enter(chosen, masks and [None if x is None else x[used] for x in masks])
    if backend != backends.CPU or any(call.absent):
        return None
    if autocast_dtype(call.inputs[0].device) is not None:
        return None
    logits: Tensor | None = layer._run(
        _logits, call, layer, samples, torch.cat(list(absent), dim=1), fills, expert, backend
    )
    return logits


def _logits(
    call: Modalities,
    layer: InteractionMoE,
    samples: Tensor,
    absent: Tensor,
    fills: Fills,
    expert: int | None,
    backend: str,
) -> Tensor | None:
    encoders = layer._dense_encoders()
    if encoders is None:
        return None
    weights, networks = encoders.read(), encoders.networks
    if not encoders.infers(backend, [*call.inputs, *weights]):
        return None
    experts = range(len(networks)) if expert is None else range(expert, expert + 1)
    each = len(weights) // len(networks)
    weights = weights[experts.start * each : experts.stop * each]
    table, kept = _table(call, samples, absent, fills)
    if not bool(table.isfinite().all()):
        return None  # of an absent token, 0 * NaN would be NaN
    count, length, width = table.shape
    lengths = [x.shape[1] for x in call.inputs]
    plan = plan_tokens(len(samples), lengths, kept.split(lengths, dim=1), kept.device)
    # The table's last row of tokens holds the fills.
    source = samples.unsqueeze(1).expand_as(kept)
    source = source if fills is None else torch.where(absent, count - 1, source)
    places = (source * length + torch.arange(length, device=kept.device)).flatten()[plan.index]
    learned = layer._learned_positions(experts)
    if learned is None:
        rows = table + position_table(length, width, table.device, table.dtype)
    else:
        rows = table + learned.to(table.dtype).unsqueeze(1)
    latents = infer(
        rows.view(-1, 1, count * length, width),
        *(weights, [networks[e] for e in experts], plan, Views(), layer.spec.compat, places),
    )
    logits = layer._head(latents, experts)[:, 0]
    if expert is not None:
        return logits[0]
    features = None
    if not isinstance(layer.reweight, ExpertAverage):
        normalized = layer._normalized(call)
        features = _features(table, kept, samples, absent, fills is not None, lengths, normalized)
    return layer._mixture(features, logits, backend)[1]


def _table(
    call: Modalities, samples: Tensor, absent: Tensor, fills: Fills
) -> tuple[Tensor, Tensor]:
    """All tokens (U, L, D), padded ones 0, followed by the fills, if any; tokens of each subset (N, L) bool."""
    tokens = torch.cat(call.inputs, dim=1)
    valid = torch.cat(valid_tokens(call.inputs, call.masks), dim=1)
    tokens = torch.where(valid.unsqueeze(2), tokens, 0.0)
    kept = valid[samples]
    if fills is None:
        return tokens, kept & ~absent
    filled = [
        fill.to(tokens.dtype).expand(x.shape[1:])
        for x, fill in zip(call.inputs, fills, strict=True)
        if fill is not None
    ]
    return torch.cat([tokens, torch.cat(filled).unsqueeze(0)]), kept


def _features(
    table: Tensor,
    kept: Tensor,
    samples: Tensor,
    absent: Tensor,
    filled: bool,
    lengths: Sequence[int],
    normalized: Sequence[bool],
) -> Tensor:
    """The reweighting features (N, M * D) of all subsets, see ops.reweighting."""
    exact = table.to(statistics_dtype(table.dtype))
    parts = [kept & ~absent, kept & absent] if filled else [kept]
    pooled = exact.new_empty((len(kept), len(lengths), exact.shape[2]))
    for sample in range(len(table) - filled):
        mine = samples == sample
        sources = exact[[sample, -1]] if filled else exact[sample : sample + 1]
        start = 0
        for m, length in enumerate(lengths):
            own = slice(start, start := start + length)
            picked = torch.cat([part[mine, own] for part in parts], dim=1).to(exact.dtype)
            # Unlike torch's, this product is the same for any number of threads.
            total = ops.expert_linear(
                picked.unsqueeze(0),
                sources[:, own].flatten(0, 1).T.unsqueeze(0),
                None,
                backends.CPU,
            )
            pooled[mine, m] = total[0] / picked.sum(dim=1, keepdim=True).clamp_min(1.0)
    scaled = [
        F.normalize(pooled[:, m], dim=1) if scale else pooled[:, m]
        for m, scale in enumerate(normalized)
    ]
    return torch.cat(scaled, dim=1).to(table.dtype)
