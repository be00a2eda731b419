"""Attention rollout and attention x gradient rollout without L x L maps.

A rollout multiplies the attention of all layers, R = A_n ... A_1, and returns w R for weights w (L,) over the
last layer's tokens. Only w R is needed, so w is multiplied by one matrix at a time, from the last layer to the
first. The matrix is computed from q and k in blocks of queries: no buffer is larger than MAX_SCORES scores,
whatever L is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.interaction_moe.fusion import Attention
from flmoe_kernels.layers.interaction_moe.packing import plan_tokens
from flmoe_kernels.ops.expert_attention.api import expert_attention

# Scores of one block, 4 MiB of float32; a few blocks exist at once. They fit in a CPU's caches, and one
# product fills a GPU. mmimdb's 516 tokens and 4 heads are computed by sample, 508 queries at a time.
MAX_SCORES = 2**20
# Lower bound of a row's sum, as in the published evaluator; only a row of zeros reaches it.
LEAST_SUM = 1e-12


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """Tensors of one attention call: q, k, v (B, L, H, d) and the output before projection (B, L, H * d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float


class RecordingAttention(nn.Module):
    """The attention of a fusion layer, with the same parameters, by expert_attention, which stores no map.

    Every call appends an AttentionRecord to `records`. Padded queries, and samples that are all padding, give 0;
    the reference gives unused values, and NaN. If gradients are enabled, the output always requires grad, even
    if no parameter does.

    padded: also compute padded queries, which attend to the valid keys as in the reference; without gradients.
    """

    def __init__(
        self, attention: Attention, records: list[AttentionRecord], padded: bool = False
    ) -> None:
        super().__init__()
        self.padded = self.capture_attn = padded  # then routed MLPs compute padded tokens, too
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.q, self.kv, self.proj = attention.q, attention.kv, attention.proj
        self.records = records

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        heads = (self.num_heads, x.shape[2] // self.num_heads)
        q = self.q(x)
        k, v = self.kv(x).chunk(2, dim=2)
        own_q, own_k, own_v = (part.detach().unflatten(-1, heads) for part in (q, k, v))
        if self.padded and key_mask is not None:
            out = _attended(own_q, own_k, own_v, self.scale, key_mask)
        else:
            masks = None if key_mask is None else [key_mask]
            plan = plan_tokens(x.shape[0], [x.shape[1]], masks, x.device)
            rows_q, rows_k, rows_v = (plan.pack(part).unflatten(-1, heads) for part in (q, k, v))
            packed: Any = expert_attention(
                rows_q, rows_k, rows_v, plan.cu_samples, scale=self.scale
            )
            flat = packed.flatten(1)
            if plan.index is not None:
                whole = flat.new_zeros((x.shape[0] * x.shape[1], x.shape[2]))
                flat = whole.index_copy(0, plan.index, flat)
            out = flat.view(x.shape)
        if torch.is_grad_enabled() and not out.requires_grad:
            out.requires_grad_()
        self.records.append(AttentionRecord(own_q, own_k, own_v, out, self.scale))
        return self.proj(out)


def evaluation_copy(
    module: nn.Module,
    replace: Callable[[nn.Module], nn.Module | None] = lambda part: None,
    copies: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """Copy a module, in eval mode and with the same parameters; the module itself is not changed.

    replace: returns the replacement of a part, or None to copy it. copies: of parts that occur repeatedly, by id.
    """
    copies = {} if copies is None else copies
    if id(module) not in copies:
        clone = replace(module)
        if clone is None:
            clone = copy.copy(module)
            clone.__dict__["_modules"] = {
                name: None if part is None else evaluation_copy(part, replace, copies)
                for name, part in module._modules.items()
            }
        clone.__dict__["training"] = False
        copies[id(module)] = clone
    return copies[id(module)]


def recording_copy(
    fusion: nn.Module, padded: bool = False
) -> tuple[nn.Module, list[AttentionRecord]]:
    """Copy a fusion model in eval mode, with the same parameters; also the list that attentions append to.

    padded: see RecordingAttention.
    """
    records: list[AttentionRecord] = []

    def replaced(part: nn.Module) -> nn.Module | None:
        return RecordingAttention(part, records, padded) if isinstance(part, Attention) else None

    copied: Any = evaluation_copy(fusion, replaced)
    copied.backend = REFERENCE  # which calls the attentions
    return copied, records


def attention_rollout(
    readout: Tensor, records: Sequence[AttentionRecord], valid: Tensor, residual: bool
) -> Tensor:
    """w R (B, L) in float64 for w = readout (B, L), R = A_n ... A_1 with head means A:

        A_l = (mean over heads of softmax(scale q k^T) + I) / 2, without I and 1/2 if there is no residual.

    Source: Abnar and Zuidema, arXiv 2005.00928. Takes about as long as the attention's forward pass.
    """
    rows = readout.double()
    for record in reversed(records):
        moved = torch.zeros_like(rows)
        for samples, queries, probabilities in _blocks(record.q, record.k, record.scale, valid):
            mean = probabilities.mean(dim=1)
            moved[samples] += _times(rows[samples, queries], mean)
        rows = 0.5 * (rows + moved) if residual else moved
    return rows


def gradient_rollout(
    readout: Tensor,
    records: Sequence[AttentionRecord],
    gradients: Sequence[Tensor],
    valid: Tensor,
    residual: bool,
) -> Tensor:
    """w R (B, L) in float64 for w = readout (B, L), R = M_n ... M_1 with

        C = mean over heads of relu(P * dP),   M = (C + I) / (row sums of C + I)

    P: the probabilities. dP = g v^T: the score's gradient by P, computed in blocks like P. g (B, L, H * d): the
    gradient by the attention's output, one for each record. Without a residual there is no I.
    """
    rows = readout.double()
    for record, gradient in zip(reversed(records), reversed(gradients), strict=True):
        g = gradient.view_as(record.q)
        moved = torch.zeros_like(rows)
        for samples, queries, probabilities in _blocks(record.q, record.k, record.scale, valid):
            # Shapes (samples, H, block, d) and (samples, H, d, L).
            by_probability = _upcast(g[samples, queries]).transpose(1, 2) @ _upcast(
                record.v[samples]
            ).permute(0, 2, 3, 1)
            mean = by_probability.mul_(probabilities).relu_().mean(dim=1)
            total = mean.sum(dim=2).double() + float(residual)
            share = rows[samples, queries] / total.clamp_min(LEAST_SUM)
            moved[samples] += _times(share, mean)
            if residual:
                moved[samples, queries] += share
        rows = moved
    return rows


def _blocks(
    q: Tensor, k: Tensor, scale: float, valid: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Probabilities (samples, H, block, L) of blocks of samples and queries; 0 for padded keys."""
    batch, length, heads, _ = q.shape
    samples = max(1, MAX_SCORES // max(1, heads * length * length))
    block = max(1, min(length, MAX_SCORES // max(1, heads * length)))
    for first in range(0, batch, samples):
        chosen = slice(first, first + samples)
        keys = _upcast(k[chosen]).permute(0, 2, 3, 1) * scale
        padded = ~valid[chosen, None, None, :]
        for start in range(0, length, block):
            queries = slice(start, start + block)
            scores = _upcast(q[chosen, queries]).transpose(1, 2) @ keys
            scores = scores.masked_fill_(padded, float("-inf")).softmax(dim=-1)
            # The softmax is NaN for a sample that is all padding.
            yield chosen, queries, scores.masked_fill_(padded, 0.0)


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor) -> Tensor:
    """Output (B, L, H * d) of the attention for all queries, padded ones too."""
    out = torch.empty_like(q)
    for samples, queries, probabilities in _blocks(q, k, scale, valid):
        mixed = probabilities @ _upcast(v[samples]).transpose(1, 2)
        out[samples, queries] = mixed.transpose(1, 2).to(out.dtype)
    return out.flatten(2)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (S, Q) times matrix (S, Q, L), computed in the matrix's dtype and returned in float64."""
    return (rows.to(matrix.dtype).unsqueeze(1) @ matrix).squeeze(1).double()


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
