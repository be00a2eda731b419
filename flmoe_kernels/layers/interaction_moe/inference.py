"""The encoders of all experts without gradients, in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.ops.encoder import api as ops

from .forward import require_like
from .fusion import Compat
from .packing import TokenPlan, Views, fold_views

Networks = Sequence[Sequence[Any]]  # the encoder layers of each expert


class EncoderWeights:
    """Weights of dense encoders in the order of `encoder_inference`.

    The modules are those of one check of the layer's parts; parameters and modes are read in every call.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self._places: list[tuple[Any, str]] = []
        self._dropouts: list[Any] = []
        for layer in (layer for network in networks for layer in network):
            attention, mlp = layer.attn, layer.mlp.network
            self._places += [(layer.norm1, "weight"), (layer.norm1, "bias")]
            self._places += [(attention.q, "weight"), (attention.kv, "weight")]
            for part in (attention.proj, layer.norm2, mlp[0], mlp[3]):
                self._places += [(part, "weight"), (part, "bias")]
            self._dropouts += [attention.attn_drop, attention.proj_drop, layer.dropout1]
            self._dropouts += [mlp[2], layer.dropout2]

    def read(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The weights; None if the call needs gradients or dropout."""
        if any(part.training and part.p > 0 for part in self._dropouts):
            return None
        weights = [part._parameters.get(name) for part, name in self._places]
        if any(
            x is None for x in weights
        ):  # replicas of DataParallel have only the slower attributes
            weights = [getattr(part, name) for part, name in self._places]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *weights)):
            return None
        require_like(weights, weights[0])
        return weights


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
        index = (torch.arange(n) + n * replaced).flatten()
        cu_samples, cu_segments = (
            _repeated(bounds, views.count, n) for bounds in (cu_samples, cu_segments)
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


def _repeated(bounds: Tensor, views: int, rows: int) -> Tensor:
    """Boundaries of the same runs in each view, (views * runs + 1,)."""
    starts = rows * torch.arange(views, dtype=bounds.dtype).unsqueeze(1)
    return torch.cat([(bounds[:-1] + starts).flatten(), bounds[-1:] + starts[-1]])
