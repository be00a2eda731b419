"""torch.library registration of the reweighting: backends, schemas, fakes, autograd.

Only Triton has kernels, where one operator saves launches; on a CPU torch's own operators are as fast. The
reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.backend import BackendUnavailable
from flmoe_kernels.core.flops import no_products
from flmoe_kernels.core.registration import Derivative, define

_OPS = torch.ops.flmoe


@functools.cache
def _kernels(backend: str) -> Any:
    """The backend's module with features, mix and their backward functions."""
    match backend:
        case "triton":
            from . import triton

            return triton
        case _:
            raise BackendUnavailable(f"reweighting: this operator has no {backend} kernels")


def _features_fake(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], normalized: int
) -> tuple[Tensor, Tensor]:
    batch, modalities = tokens.shape[0], len(lengths)
    pooled = tokens.new_empty((batch, modalities * tokens.shape[2]))
    return pooled, tokens.new_empty((batch, modalities, 2), dtype=torch.float32)


def _mix_backward(*saved: Any) -> tuple[Tensor, Tensor]:
    *rest, temperature, wants, backend = saved
    return _OPS.mix_experts_backward(*rest, wants, temperature, backend)


def _mix_backward_flops(
    _grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    _weights: Tensor,
    logits: Tensor,
    wants: Sequence[bool],
    _temperature: float,
) -> int:
    return 0 if grad_mixed is None else sum(wants) * 2 * logits.numel()


define(
    "reweighting_features",
    "(Tensor tokens, Tensor? mask, SymInt[] lengths, int normalized) -> (Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).features(*args),
    _features_fake,
    Derivative(
        1,
        lambda tokens, mask, lengths, normalized, *results: ((*results, mask), (lengths,)),
    ),
    flops=no_products,
)
define(
    "reweighting_features_backward",
    "(Tensor grad_features, Tensor features, Tensor statistics, Tensor? mask, SymInt[] lengths) "
    "-> Tensor",
    lambda backend, *args: _kernels(backend).features_backward(*args),
    lambda grad, features, statistics, mask, lengths: features.new_empty(
        (features.shape[0], sum(lengths), features.shape[1] // len(lengths))
    ),
    flops=no_products,
)
define(
    "mix_experts",
    "(Tensor scores, Tensor logits, float temperature) -> (Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).mix(*args),
    lambda scores, logits, temperature: (
        scores.new_empty(scores.shape),
        logits.new_empty(logits.shape[1:]),
    ),
    Derivative(
        2,
        lambda scores, logits, temperature, weights, mixed: ((weights, logits), (temperature,)),
        _mix_backward,
        results=2,
    ),
    flops=lambda scores, logits, temperature: 2 * logits.numel(),
)
define(
    "mix_experts_backward",
    "(Tensor? grad_weights, Tensor? grad_mixed, Tensor weights, Tensor logits, bool[] wants, "
    "float temperature) -> (Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).mix_backward(*args),
    lambda grad_weights, grad_mixed, weights, logits, wants, temperature: tuple(
        x.new_empty(x.shape if want else (0,))
        for x, want in zip((weights, logits), wants, strict=True)
    ),
    flops=_mix_backward_flops,
)
