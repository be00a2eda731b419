"""Decorrelation regularizers of the experts' latents, and their warm-up.

Source: FL-I2MoE (arXiv 2603.13326) and its follow-up (arXiv 2606.29613).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import FLOATS, statistics_dtype, without_autocast

BARLOW_EPS = 1e-5
CKA_EPS = 1e-8


def rep_cos(latents: Tensor | Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Mean over expert pairs e < f and samples of (cos(z_e, z_f) * g)^2.

    Args:
        latents: the latents z of E experts: E x (B, d), as InteractionMoE.forward returns last, or (E, B, d).
            float32, float64, bfloat16 or float16.
        weights: (B, E), the expert weights that forward returns: g = (w_e + w_f) / 2. None: g = 1.

    Returns:
        (), float64 for float64, else float32; 0 for one expert. Differentiable in latents and weights. The cosine
        of a zero latent is 0.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.

    Cost: O(E^2 B d); the latents are read once, the pairs of all experts are one batched product.
    """
    z = _stacked(latents)
    experts, batch, _ = z.shape
    if weights is not None:
        check.require_tensor("weights", weights)
        check.require_floating("weights", weights)
        check.require_shape("weights", weights, (batch, experts), "(B, E)")
        if weights.device != z.device:
            raise ValueError(f"weights: expected device {z.device}, got {weights.device}")
    with without_autocast(z.device):
        units = F.normalize(z, dim=2).transpose(0, 1)
        cosines = units @ units.transpose(1, 2)  # (B, E, E)
        if weights is not None:
            half = 0.5 * weights.to(z.dtype)
            cosines = cosines * (half.unsqueeze(2) + half.unsqueeze(1))
        return _mean_over_pairs(cosines.square().mean(dim=0))


def rep_barlow(latents: Tensor | Sequence[Tensor]) -> Tensor:
    """Mean over expert pairs e < f of the mean squared off-diagonal element of C = z_e^T z_f / B.

    z is standardized over the batch first: (z - mean) / (population standard deviation + 1e-5). A constant feature
    becomes 0; its gradient is finite, because the gradient of the standard deviation is 0 there.

    Arguments, result and errors as in `rep_cos`; 0 for one expert, B = 1 or d = 1.

    Cost: for B <= d O(E B^2 d + E^2 B d), no d x d matrix, memory O(E^2 B d); else O(E^2 B d^2).
    """
    z = _stacked(latents)
    batch, width = z.shape[1:]
    with without_autocast(z.device):
        z = z - z.mean(dim=1, keepdim=True)
        # Unlike a square root, the norm has gradient 0 at 0.
        deviation = torch.linalg.vector_norm(z, dim=1, keepdim=True) / math.sqrt(batch)
        z = z / (deviation + BARLOW_EPS)
        if batch <= width:
            diagonals = (z.unsqueeze(1) * z).sum(dim=2)
            sums = (_squared_norms(z) - diagonals.square().sum(dim=2)).clamp_min(0.0)
        else:
            # Without a subtraction, since the diagonal may hold almost all of the sum.
            different = 1.0 - torch.eye(width, dtype=z.dtype, device=z.device)
            sums = (_cross_products(z) * different.unsqueeze(1)).square().sum(dim=(1, 3))
        # For d = 1 there is no off-diagonal element, and the sum may hold a rounding error.
        scale = 0.0 if width == 1 else 1.0 / (batch * batch * width * (width - 1))
        return _mean_over_pairs(sums * scale)


def rep_cka(latents: Tensor | Sequence[Tensor]) -> Tensor:
    """Mean over expert pairs e < f of the linear CKA of their latents, centered over the batch.

    CKA = |z_e^T z_f|^2 / (|z_e^T z_e| |z_f^T z_f| + 1e-8) in Frobenius norms: 1 for equal latents. For a latent
    that is constant over the batch it is 0, with gradient 0.

    Arguments, result and errors as in `rep_cos`; 0 for one expert or B = 1.

    Cost: for B <= d O(E B^2 d) and no d x d matrix; else O(E^2 B d^2).
    """
    z = _stacked(latents)
    with without_autocast(z.device):
        squares = _squared_norms(z - z.mean(dim=1, keepdim=True))
        # sqrt has no finite gradient at 0; clamp_min makes it 0 below the smallest normal number.
        norms = squares.diagonal().clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        return _mean_over_pairs(squares / (torch.outer(norms, norms) + CKA_EPS))


def warmup_scale(epoch: float, warmup_epochs: int) -> float:
    """Factor of a regularizer's weight in a linear warm-up from 0 in epoch 0 to 1 in epoch warmup_epochs - 1.

    Args:
        epoch: the number of the epoch, from 0.
        warmup_epochs: length of the warm-up in epochs; with 0 or 1 the factor is always 1.

    Raises:
        TypeError, ValueError: epoch is not a finite number, or warmup_epochs is not an int >= 0.
    """
    if isinstance(epoch, bool) or not isinstance(epoch, Real):
        raise TypeError(f"epoch: expected a number, got {type(epoch).__name__}")
    if not math.isfinite(epoch):
        raise ValueError(f"epoch: expected a finite number, got {epoch}")
    check.require_count("warmup_epochs", warmup_epochs, 0)
    if warmup_epochs <= 1:
        return 1.0
    return min(1.0, max(0.0, float(epoch) / (warmup_epochs - 1)))


def _stacked(latents: Tensor | Sequence[Tensor]) -> Tensor:
    """Check the latents; return (E, B, d) in the dtype of sums."""
    if isinstance(latents, (list, tuple)):
        if not latents:
            raise ValueError("latents: expected at least one expert, got none")
        for e, z in enumerate(latents):
            name = f"latents[{e}]"
            check.require_tensor(name, z)
            if z.dim() != 2:
                raise ValueError(f"{name}: expected (B, d), got {tuple(z.shape)}")
            check.require_shape(name, z, tuple(latents[0].shape), "(B, d) as latents[0]")
            check.require_same(name, z, "latents[0]", latents[0])
        latents = torch.stack(list(latents))
    check.require_tensor("latents", latents)
    assert isinstance(latents, Tensor)
    if latents.dtype not in FLOATS:
        raise TypeError(
            f"latents: expected float32, float64, bfloat16 or float16, got {latents.dtype}"
        )
    if latents.dim() != 3 or 0 in latents.shape:
        raise ValueError(f"latents: expected (E, B, d), none of them 0, got {tuple(latents.shape)}")
    return latents.to(statistics_dtype(latents.dtype))


def _mean_over_pairs(values: Tensor) -> Tensor:
    """Mean of values (E, E) above the diagonal; 0 for E = 1."""
    experts = len(values)
    return values.triu(1).sum() / max(1, experts * (experts - 1) // 2)


def _squared_norms(z: Tensor) -> Tensor:
    """Squared Frobenius norms (E, E) of z_e^T z_f, of z (E, B, d).

    For B <= d from B x B matrices: the norm is the sum of the elementwise product of z_e z_e^T and z_f z_f^T.
    """
    if z.shape[1] <= z.shape[2]:
        grams = (z @ z.transpose(1, 2)).flatten(1)
        return grams @ grams.T
    return _cross_products(z).square().sum(dim=(1, 3))


def _cross_products(z: Tensor) -> Tensor:
    """z_e^T z_f of all pairs as one product, (E, d, E, d), of z (E, B, d)."""
    experts, _, width = z.shape
    columns = z.transpose(0, 1).flatten(1)
    return (columns.T @ columns).view(experts, width, experts, width)
