"""Interaction mixture of experts in plain PyTorch; reference for tests and benchmarks.

Mathematics: FL-I2MoE (arXiv 2603.13326) and its ancestor I2MoE (arXiv 2505.19190). It does exactly the work of the
published layer: every expert runs every perturbed view in a Python loop, attention materialises its (L, L) maps,
and each dropout is a separate operation. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.ops.interaction_losses.reference import interaction_losses
from flmoe_kernels.ops.reweighting.reference import reweighting_features

from .fusion import MLP, Compat, Masks

Replacements = Sequence[Sequence[Tensor]]

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

    def forward(self, inputs: Sequence[Tensor], masks: Masks = None) -> Tensor:
        if (first := next(self.mlp.parameters(), None)) is not None:
            inputs = check.widened(inputs, first)
        features = reweighting_features(inputs, check.padded_masks(masks, inputs))
        return torch.softmax(self.mlp(features) / self.temperature, dim=1)


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
    ) -> Any:
        """Run the full view, then for each modality the view in which it is replaced.

        Returns:
            A list of results by view; with fusion_sparse also a list of gate losses.
        """
        noise: Sequence[Tensor | None] = replacements or [None] * len(inputs)
        views = [self(inputs, masks)]
        for m, own in zip(range(len(inputs)), noise, strict=True):
            views.append(self.forward_with_replacement(inputs, masks, m, noise=own))
        if not self.fusion_sparse:
            return views
        results, gate_losses = zip(*views, strict=True)
        return list(results), list(gate_losses)


class ReferenceInteractionMoE(nn.Module):
    """The layer as published: (M + 1)(M + 2) fusion passes in Python loops.

    Args:
        num_modalities: M, at least two.
        fusion_model: template fusion model; every expert gets a deep copy.
        fusion_sparse: also return gate losses, zeros if the fusion model is dense.
        hidden_dim: token width D.
        hidden_dim_rw: hidden width of the reweighting MLP.
        num_layer_rw: number of linear layers of the reweighting MLP.
        temperature_rw: temperature of the softmax over experts.
    """

    reweight: Reweighting
    interaction_experts: Any  # a ModuleList of InteractionExpert

    def __init__(
        self,
        num_modalities: int,
        fusion_model: nn.Module,
        fusion_sparse: bool = False,
        hidden_dim: int = 256,
        hidden_dim_rw: int = 256,
        num_layer_rw: int = 2,
        temperature_rw: float = 1.0,
    ) -> None:
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"num_modalities: expected at least 2, got {num_modalities}")
        self.num_modalities = num_modalities
        self.fusion_sparse = fusion_sparse
        num_experts = num_modalities + 2
        self.reweight = Reweighting(
            num_modalities, num_experts, hidden_dim, hidden_dim_rw, num_layer_rw, temperature_rw
        )
        self.interaction_experts = nn.ModuleList(
            InteractionExpert(copy.deepcopy(fusion_model), fusion_sparse)
            for _ in range(num_experts)
        )
        for part in self.interaction_experts.modules():
            if isinstance(getattr(type(part), "backend", None), property):
                part.backend = REFERENCE

    @property
    def compat(self) -> Compat:
        learned = self.interaction_experts[0].fusion_model.pos_embed is not None
        return "i2moe" if learned else "fl_i2moe"

    def forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        *,
        replacements: Replacements | None = None,
    ) -> tuple:
        """Run every expert on every view.

        Args:
            inputs: M token sequences (B, L_m, D).
            masks: M masks (B, L_m), True (or 1) = valid; each may be None.
            replacements: replacements[e][m] (B, L_m, D) instead of fresh N(0, 1) noise.

        Returns:
            (expert_outputs, weights (B, E), logits (B, C), losses [M + 2], gate_losses when
            fusion_sparse, latents [E x (B, M * D)] unless compat is "i2moe"). expert_outputs[e][v] is
            (logits, latent), or the logits alone when compat is "i2moe"; v = 0 is the full view.
            gate_losses[e][v] is the sum over sparse layers and modalities, differentiable.
        """
        runs = [
            expert.forward_multiple(
                inputs, masks, replacements=None if replacements is None else replacements[e]
            )
            for e, expert in enumerate(self.interaction_experts)
        ]
        gate_losses: tuple = ()
        if self.fusion_sparse:
            runs, losses = (list(column) for column in zip(*runs, strict=True))
            gate_losses = (losses,)
        learned = self.compat == "i2moe"
        weights = self.reweight(inputs, masks)
        full = [views[0] if learned else views[0][0] for views in runs]
        logits = (torch.stack(full, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        if learned:
            return (runs, weights, logits, interaction_losses(runs), *gate_losses)
        latents = [[latent for _, latent in views] for views in runs]
        own = [views[0] for views in latents]
        return (runs, weights, logits, interaction_losses(latents), *gate_losses, own)

    def inference(
        self, inputs: Sequence[Tensor], masks: Masks = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run only the full view: ([logits (B, C)] * E, weights (B, E), logits (B, C))."""
        results = [expert(inputs, masks) for expert in self.interaction_experts]
        if self.fusion_sparse:
            results = [result for result, _ in results]
        expert_logits = [x if self.compat == "i2moe" else x[0] for x in results]
        weights = self.reweight(inputs, masks)
        logits = (torch.stack(expert_logits, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        return expert_logits, weights, logits
