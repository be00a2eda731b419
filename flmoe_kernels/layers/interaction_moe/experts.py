"""Parts of the interaction layer: reweighting and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.layers.modalities import Masks
from flmoe_kernels.ops.reweighting.reference import reweighting_features

from .fusion import MLP

REWEIGHT_DROPOUT = 0.5


class Reweighting(nn.Module):
    """Weights (B, E) of the experts from the pooled inputs: softmax(MLP(features) / temperature)."""

    def __init__(
        self,
        num_modalities: int,
        num_experts: int,
        hidden_dim: int,
        hidden_dim_rw: int,
        num_layers: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.mlp = MLP(
            hidden_dim * num_modalities,
            hidden_dim_rw,
            num_experts,
            num_layers,
            nn.ReLU(),
            REWEIGHT_DROPOUT,
        )

    def forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        normalized: Sequence[bool] | None = None,
    ) -> Tensor:
        if (first := next(self.mlp.parameters(), None)) is not None:
            inputs = check.widened(inputs, first)
        features = reweighting_features(inputs, check.padded_masks(masks, inputs), normalized)
        return torch.softmax(self.mlp(features) / self.temperature, dim=1)


class ExpertAverage(nn.Module):
    """Weights (B, E) that are the same for all samples: the softmax of a parameter, at first 1 / E each."""

    temperature = 1.0

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((num_experts,), 1.0 / num_experts))

    def forward(self, inputs: Sequence[Tensor], *_masks: Any) -> Tensor:
        return torch.softmax(self.weights, dim=0).repeat(inputs[0].shape[0], 1)


def fusion_width(model: nn.Module) -> int | None:
    """The token width of a fusion model, None if its structure is unknown."""
    norms = [part for name, part in model.named_modules() if name.endswith(".norm1")]
    return norms[0].normalized_shape[-1] if norms and isinstance(norms[0], nn.LayerNorm) else None


class InteractionExpert(nn.Module):
    """One interaction expert: its fusion model runs on the full input and on perturbed views.

    The result of a pass is (logits (B, C), latent (B, M * D)), or the logits alone if the fusion model has learned
    positions (I2MoE). With fusion_sparse, it is followed by the gate loss.
    """

    fusion_model: Any  # a FusionTransformer, or a module with its methods

    def __init__(self, fusion_model: nn.Module, fusion_sparse: bool = False) -> None:
        super().__init__()
        self.fusion_model = fusion_model
        self.fusion_sparse = fusion_sparse

    def forward(self, inputs: Sequence[Tensor], masks: Masks = None) -> Any:
        """Run the full view."""
        if self.fusion_model.pos_embed is None:
            result = self.fusion_model(inputs, masks, return_latent=True)
        else:
            result = self.fusion_model(inputs, masks)
        loss = self.fusion_model.gate_loss()  # always read, because reading clears it
        return (result, loss) if self.fusion_sparse else result

    def forward_with_replacement(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        replace_index: int | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Any:
        """Run the view in which modality `replace_index`, if any, is replaced by noise, by default N(0, 1)."""
        view = list(inputs)
        if replace_index is not None:
            view[replace_index] = torch.randn_like(view[replace_index]) if noise is None else noise
        return self(view, masks)

    def forward_multiple(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        *,
        replacements: Sequence[Tensor] | None = None,
        replaced: Sequence[int] | None = None,
        exists: Tensor | None = None,
    ) -> Any:
        """Run the full view, then for each modality the view in which it is replaced; return the results by view.

        With fusion_sparse also return a list of gate losses. Views exist for the modalities `replaced` (None: all)
        and for the samples in `exists` (B, M) bool (None: all). A view that does not exist has latent 0.
        """
        noise = [None] * len(inputs) if replacements is None else replacements
        views = [self(inputs, masks)]
        for m, own in enumerate(noise):
            if replaced is not None and m not in replaced:
                views.append(self._blank(views[0]))
                continue
            view = self.forward_with_replacement(inputs, masks, m, noise=own)
            if exists is not None:
                view = _where(exists[:, m : m + 1], view, self._blank(view))
            views.append(view)
        if not self.fusion_sparse:
            return views
        results, gate_losses = zip(*views, strict=True)
        return list(results), list(gate_losses)

    def _blank(self, view: Any) -> Any:
        """The result of a view that does not exist."""
        result = view[0] if self.fusion_sparse else view
        head = getattr(self.fusion_model, "network", [None])[-1]
        if isinstance(result, Tensor):
            latent = result.new_zeros((result.shape[0], head.fc.weight.shape[1]))
            blank = head(latent)
        else:
            latent = torch.zeros_like(result[1])
            blank = (torch.zeros_like(result[0]) if head is None else head(latent), latent)
        return (blank, torch.zeros_like(view[1])) if self.fusion_sparse else blank


def _where(exists: Tensor, view: Any, blank: Any) -> Any:
    """The view's results, blank where it does not exist; gate losses, which have no samples, as they are."""
    if not isinstance(view, tuple):
        has_samples = isinstance(view, Tensor) and view.dim() > 0
        return torch.where(exists, view, blank) if has_samples else view
    return tuple(_where(exists, x, y) for x, y in zip(view, blank, strict=True))
