"""The reweighting through Triton: launch table, allocations and launches.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous, expect, expect_float32_or_half
from flmoe_kernels.core.triton.launches import Launch, run
from flmoe_kernels.core.triton.plans import planned
from flmoe_kernels.core.triton.tables import RowTiles, blocks_of, power_of_two

from .kernels import features_gradient_kernel, features_kernel, mix_gradient_kernel, mix_kernel

__all__ = ["features", "features_backward", "mix", "mix_backward"]

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


@planned(2)
def features(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], normalized: int
) -> tuple[Tensor, Tensor]:
    """Pooled tokens (B, M * D), and (B, M, 2) float32 for the backward."""
    expect_float32_or_half("tokens", tokens)
    batch, total, width = tokens.shape
    if sum(lengths) != total or not lengths or min(lengths) < 0:
        raise ValueError(f"lengths: expected lengths with the sum {total}, got {list(lengths)}")
    expect("mask", mask, (batch, total), torch.bool, tokens.device)
    out = tokens.new_empty((batch, len(lengths) * width))
    statistics = tokens.new_empty((batch, len(lengths), 2), dtype=torch.float32)
    if out.numel():
        arguments = {
            **{"tokens": tokens.contiguous(), "mask": contiguous(mask), "normalized": normalized},
            **{"features": out, "statistics": statistics, "total": total},
        }
        launch = _features(features_kernel, "features", batch, width, lengths, arguments)
        run([launch], tokens.device)
    return out, statistics


@planned(4)
def features_backward(
    grad_features: Tensor,
    features: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
) -> Tensor:
    expect_float32_or_half("features", features)
    batch, width = features.shape[0], features.shape[1] // max(len(lengths), 1)
    total, device = sum(lengths), features.device
    expect("features", features, (batch, len(lengths) * width), features.dtype, device)
    expect("grad_features", grad_features, features.shape, features.dtype, device)
    expect("statistics", statistics, (batch, len(lengths), 2), torch.float32, device)
    expect("mask", mask, (batch, total), torch.bool, device)
    grad = features.new_empty((batch, total, width))
    if grad.numel():
        name = "features_gradient"
        slots = blocks_of(max(lengths), TABLE[name].shape(width)[0])
        arguments = {
            **{"grad_features": grad_features.contiguous(), "features": features.contiguous()},
            **{"statistics": statistics.contiguous(), "mask": contiguous(mask)},
            **{"grad_tokens": grad, "total": total, "slots": slots},
        }
        kernel, programs = features_gradient_kernel, batch * slots
        run([_features(kernel, name, programs, width, lengths, arguments)], device)
    return grad


def _features(
    kernel: Any, name: str, programs: int, width: int, lengths: Sequence[int], arguments: dict
) -> Launch:
    """programs: for each modality."""
    tokens, chunk = TABLE[name].shape(width)
    # Odd numbers above 1, because Triton compiles again for elements of a tuple that are 1 or multiples of 16.
    arguments["lengths"] = tuple(2 * length + 3 for length in lengths)
    constants = {"WIDTH": width, "CHUNK": chunk, "TOKENS": tokens}
    programs *= len(lengths)
    return Launch(kernel, programs, arguments, constants, TABLE[name].warps, _STAGES)


@planned(2)
def mix(scores: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weights (B, E) and the mixture (B, C) of logits (E, B, C)."""
    logits = _logits(logits)
    experts, batch, classes = logits.shape
    expect("scores", scores, (batch, experts), logits.dtype, logits.device)
    weights, mixed = scores.new_empty((batch, experts)), logits.new_empty((batch, classes))
    tensors = {"scores": scores.contiguous(), "weights": weights, "mixed": mixed}
    _mix(mix_kernel, "mix", logits, temperature, tensors)
    return weights, mixed


@planned(4)
def mix_backward(
    grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    weights: Tensor,
    logits: Tensor,
    wants: Sequence[bool],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of scores (B, E) and of logits (E, B, C); those not requested are empty."""
    logits = _logits(logits)
    experts, batch, classes = logits.shape
    for name, x in (("grad_weights", grad_weights), ("weights", weights)):
        expect(name, x, (batch, experts), logits.dtype, logits.device)
    expect("grad_mixed", grad_mixed, (batch, classes), logits.dtype, logits.device)
    of_scores, of_logits = (
        x.new_empty(x.shape if want else (0,))
        for x, want in zip((weights, logits), wants, strict=True)
    )
    tensors = {
        **{"grad_weights": contiguous(grad_weights), "grad_mixed": contiguous(grad_mixed)},
        **{"weights": weights.contiguous(), "grad_scores": of_scores if wants[0] else None},
        **{"grad_logits": of_logits if wants[1] else None},
    }
    _mix(mix_gradient_kernel, "mix_gradient", logits, temperature, tensors)
    return of_scores, of_logits


def _mix(
    kernel: Any, name: str, logits: Tensor, temperature: float, tensors: Mapping[str, Tensor | None]
) -> None:
    """Run a kernel on logits (E, B, C) with any first stride."""
    experts, batch, classes = logits.shape
    rows, chunk = TABLE[name].shape(classes)
    launch = Launch(
        kernel,
        blocks_of(batch, rows),
        {
            **{**tensors, "logits": logits, "of_expert": logits.stride(0)},
            **{"temperature": temperature, "batch": batch, "classes": classes},
        },
        {"EXPERTS": experts, "LANES": power_of_two(experts), "ROWS": rows, "CHUNK": chunk},
        TABLE[name].warps,
        _STAGES,
    )
    run([launch] if batch else [], logits.device)


def _logits(x: Tensor) -> Tensor:
    """With the samples of an expert one after another; the experts may stand anywhere."""
    expect_float32_or_half("logits", x)
    if x.dim() != 3 or not x.shape[0]:
        raise ValueError(f"logits: expected (E, B, C) with E at least 1, got {tuple(x.shape)}")
    return x if x[0].is_contiguous() else x.contiguous()
