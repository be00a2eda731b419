"""Launches of the reweighting; tensors are contiguous unless stated otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import RowTiles, blocks_of, power_of_two

from .kernels import (
    features_gradient_kernel,
    features_kernel,
    mix_gradient_kernel,
    mix_kernel,
)

# The same for every architecture, class of shape and dtype: these kernels are bound by bytes or by latency, and
# all that shapes decide is how many programs there are. "features" holds all columns of a token, 4096 elements and
# as many sums. "mix" is one program of one warp for eight samples: launch latency dominates it; with more than 64
# classes for four, because eight would spill on sm_80. Which tiles are fastest is not measured.
TABLE = {
    "features": RowTiles(4096, 1 << 20, 8, 8192),
    "features_gradient": RowTiles(4096, 1 << 20, 8, 4096),
    "mix": RowTiles(512, 128, 1, 32, rows=8),
    "mix_gradient": RowTiles(512, 128, 1, 128, rows=8),
}
_STAGES = 2


def _odd(lengths: Sequence[int]) -> tuple[int, ...]:
    """Odd numbers above 1, because Triton compiles again for elements of a tuple that are 1 or multiples of 16."""
    return tuple(2 * length + 3 for length in lengths)


def features_launch(
    tokens: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
    normalized: int,
    features: Tensor,
    statistics: Tensor,
) -> Launch:
    """Launch of features (B, M * D) and statistics (B, M, 2) float32 from tokens (B, L, D)."""
    batch, total, width = tokens.shape
    rows, chunk = TABLE["features"].shape(width)
    return Launch(
        features_kernel,
        batch * len(lengths),
        {
            **{"tokens": tokens, "mask": mask, "features": features, "statistics": statistics},
            **{"lengths": _odd(lengths), "normalized": normalized, "total": total},
        },
        {"WIDTH": width, "CHUNK": chunk, "TOKENS": rows},
        TABLE["features"].warps,
        _STAGES,
    )


def features_gradient_launch(
    grad_features: Tensor,
    features: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
    grad_tokens: Tensor,
) -> Launch:
    batch, total, width = grad_tokens.shape
    rows, chunk = TABLE["features_gradient"].shape(width)
    slots = blocks_of(max(lengths), rows)
    return Launch(
        features_gradient_kernel,
        batch * len(lengths) * slots,
        {
            **{"grad_features": grad_features, "features": features, "statistics": statistics},
            **{"mask": mask, "grad_tokens": grad_tokens, "lengths": _odd(lengths)},
            **{"total": total, "slots": slots},
        },
        {"WIDTH": width, "CHUNK": chunk, "TOKENS": rows},
        TABLE["features_gradient"].warps,
        _STAGES,
    )


def mix_launch(
    scores: Tensor, logits: Tensor, temperature: float, weights: Tensor, mixed: Tensor
) -> Launch:
    """Launch of weights (B, E) and mixed (B, C) from scores (B, E) and logits (E, B, C), with any first stride."""
    return _mix("mix", logits, temperature, scores=scores, weights=weights, mixed=mixed)


def mix_gradient_launch(
    grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    weights: Tensor,
    logits: Tensor,
    temperature: float,
    grads: tuple[Tensor | None, Tensor | None],
) -> Launch:
    """Launch of the gradients of scores and logits, None if not wanted; the latter is contiguous."""
    return _mix(
        "mix_gradient",
        logits,
        temperature,
        grad_weights=grad_weights,
        grad_mixed=grad_mixed,
        weights=weights,
        grad_scores=grads[0],
        grad_logits=grads[1],
    )


def _mix(name: str, logits: Tensor, temperature: float, **tensors: Tensor | None) -> Launch:
    experts, batch, classes = logits.shape
    rows, chunk = TABLE[name].shape(classes)
    return Launch(
        mix_kernel if name == "mix" else mix_gradient_kernel,
        blocks_of(batch, rows),
        {
            **tensors,
            **{"logits": logits, "of_expert": logits.stride(0), "temperature": temperature},
            **{"batch": batch, "classes": classes},
        },
        {"EXPERTS": experts, "LANES": power_of_two(experts), "ROWS": rows, "CHUNK": chunk},
        TABLE[name].warps,
        _STAGES,
    )


def call_launches(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], logits: Tensor
) -> dict[str, Launch]:
    """All launches of a training step by their key in TABLE; for any device, including meta."""
    experts, batch, _ = logits.shape
    statistics = tokens.new_empty((batch, len(lengths), 2), dtype=torch.float32)
    features = tokens.new_empty((batch, len(lengths) * tokens.shape[2]))
    weights, mixed = logits.new_empty((batch, experts)), logits[0]
    normalized = 0 if mask is None else (1 << len(lengths)) - 1
    return {
        "features": features_launch(tokens, mask, lengths, normalized, features, statistics),
        "features_gradient": features_gradient_launch(
            features, features, statistics, mask, lengths, tokens
        ),
        "mix": mix_launch(weights, logits, 1.0, weights, mixed),
        "mix_gradient": mix_gradient_launch(
            weights, mixed, weights, logits, 1.0, (weights, logits)
        ),
    }
