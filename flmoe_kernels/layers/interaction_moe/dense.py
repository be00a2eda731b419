"""Dense encoders of all experts as one operator call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.ops.encoder import api as ops

from .forward import branch_rate, draw_seeds, rate_of, require_like
from .fusion import Compat
from .packing import TokenPlan, Views, fold_views

Networks = Sequence[Sequence[Any]]  # the encoder layers of each expert


class Encoders:
    """Weights and rates of dense encoders, in the order of `encoder_inference`.

    The modules are those of one check of the layer's parts; parameters, rates and modes are read in every call.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self._places: list[tuple[Any, str]] = []
        for layer in (layer for network in networks for layer in network):
            attention, mlp = layer.attn, layer.mlp.network
            self._places += [(layer.norm1, "weight"), (layer.norm1, "bias")]
            self._places += [(attention.q, "weight"), (attention.kv, "weight")]
            for part in (attention.proj, layer.norm2, mlp[0], mlp[3]):
                self._places += [(part, "weight"), (part, "bias")]
        # Of each layer: five kinds, and each kind's modules of all experts.
        self._dropouts = [
            [
                [x.attn.attn_drop for x in layers],
                [x.attn.proj_drop for x in layers],
                [x.dropout1 for x in layers],
                [x.mlp.network[2] for x in layers],
                [x.dropout2 for x in layers],
            ]
            for layers in zip(*networks, strict=True)
        ]

    def read(self) -> list[Tensor]:
        """The weights."""
        weights = [part._parameters.get(name) for part, name in self._places]
        if any(
            x is None for x in weights
        ):  # replicas of DataParallel have only the slower attributes
            weights = [getattr(part, name) for part, name in self._places]
        require_like(weights, weights[0])
        return weights

    def infers(self, backend: str, tensors: Sequence[Tensor]) -> bool:
        """Whether a call needs neither gradients of `tensors` nor dropout, and the backend has a kernel for it."""
        kinds = (kind for layer in self._dropouts for kind in layer)
        drops = any(part.training and part.p > 0 for kind in kinds for part in kind)
        return backend == backends.CPU and not drops and not _differentiable(tensors)

    def rates(self, compat: Compat) -> list[float]:
        """The rates of each layer's dropouts, as `encoder_layers` takes them."""
        rates = []
        for attention, projection, residual, mlp, output in self._dropouts:
            rates += [
                rate_of("attn_drop", attention),
                branch_rate(projection, residual, compat),
                rate_of("mlp.network.2", mlp),
                rate_of("dropout2", output),
            ]
        return rates


def _differentiable(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def train(
    rows: Tensor,
    weights: Sequence[Tensor],
    encoders: Encoders,
    plan: TokenPlan,
    views: Views,
    compat: Compat,
    backend: str,
) -> Tensor:
    """Compute latents (E, V, B, M * D) from rows (E, 2, n, D) with views or (E, 1, n, D) without, as `encode`."""
    experts, copies, _, width = rows.shape
    rates = encoders.rates(compat)
    seeds = draw_seeds(rates, rows.device)
    samples, modality, index = plan.samples, None, None
    if views.folded:
        plan, index = fold_views(plan, views)
    elif copies > 1:
        modality = views.places(plan)
    first = encoders.networks[0][0]
    # Triton kernels read the number of valid rows on the GPU. Plans of the CPU have only valid rows, except while
    # tracing.
    padded = backend == backends.TRITON and not plan.compact
    count = plan.cu_samples[-1:] if padded else None
    latents = ops.encoder_layers(
        rows,
        modality,
        index,
        plan.cu_samples,
        plan.cu_segments,
        count,
        weights,
        seeds,
        rates,
        first.attn.num_heads,
        1 if views.folded else views.count,
        first.norm1.eps,
        compat == "i2moe",
        _differentiable([rows, *weights]),
        backend,
    )
    return latents.view(experts, views.count, samples, plan.modalities * width)


def infer(
    rows: Tensor,
    weights: Sequence[Tensor],
    networks: Networks,
    plan: TokenPlan,
    views: Views,
    compat: Compat,
    index: Tensor | None = None,
) -> Tensor:
    """Compute latents (E, V, B, M * D) from rows (E or 1, 2, n, D) with views or (E or 1, 1, n, D) without.

    Without replacements the rows may be the same for all experts. A view that does not exist has latent 0 if
    `views.folded`. index: without views, the place of each of the plan's rows among the given rows.
    """
    first = networks[0][0]
    sets, copies, n, width = rows.shape
    cu_samples, cu_segments = plan.cu_samples, plan.cu_segments
    if views.folded:
        folded, index = fold_views(plan, views)
        cu_samples, cu_segments = folded.cu_samples, folded.cu_segments
    elif copies > 1:
        replaced = views.places(plan) == torch.arange(-1, views.count - 1).unsqueeze(1)
        count: int | Tensor = n
        index = (torch.arange(n) + n * replaced).flatten()
        # The valid rows of all views come first, because no run may contain padding.
        if not plan.compact:
            count = cu_samples[-1]
            places = torch.arange(views.count * n)
            view, row = places // count.clamp(min=1), places % count.clamp(min=1)
            index = index[view.clamp(max=views.count - 1) * n + row]
        cu_samples, cu_segments = (
            _repeated(bounds, views.count, count) for bounds in (cu_samples, cu_segments)
        )
    latents = ops.encoder_inference(
        rows.view(sets, copies * n, width),
        index,
        cu_samples,
        cu_segments,
        [x if x.dtype is rows.dtype else x.to(rows.dtype) for x in weights],
        len(networks),
        first.attn.num_heads,
        first.norm1.eps,
        compat == "i2moe",
        backends.CPU,
    )
    return latents.view(len(networks), views.count, plan.samples, plan.modalities * width)


def _repeated(bounds: Tensor, views: int, rows: int | Tensor) -> Tensor:
    """Boundaries of the same runs in each view, (views * runs + 1,); a view has the given number of rows."""
    starts = rows * torch.arange(views, dtype=bounds.dtype).unsqueeze(1)
    return torch.cat([(bounds[:-1] + starts).flatten(), bounds[-1:] + starts[-1]])
