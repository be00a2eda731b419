"""Published variants of the interaction layer, and the equivalent options of InteractionMoE."""

from __future__ import annotations

from torch import nn

_OPTIONS = {
    "ZeroVectorInteractionMoE": 'replacement="zero"',
    "MeanVectorInteractionMoE": 'replacement="mean"',
    "LessPerturbedForwardPassIMoE": "num_perturbed=",
    "SynergyRedundancyOnlyIMoE": "uniqueness=False",
    "SimpleWeightedAverageIMoE": 'reweighting="average"',
}
_REASONS = {
    **{
        name: f"InteractionMoE({option}) computes this layer and loads its state_dict"
        for name, option in _OPTIONS.items()
    },
    "NoInteractionLossIMoE": (
        "InteractionMoE(interaction_loss=False) computes this layer; its state_dict has the prefix "
        "interaction_experts.{e}.fusion_model instead of experts.{e}"
    ),
    "LatentContrastiveInteractionMoE": (
        "no counterpart: interaction losses on the latents of a model with learned positions"
    ),
    "SingleInterctionExpert": "no counterpart: a single expert without reweighting",
    "InterpretCC": "no counterpart: one vector per modality instead of token sequences",
    "MoEPlusPlusTransformer": "no counterpart: gate residuals, constant and zero experts",
    "EarlyFusionTransformer": "no counterpart: torch's encoder on features joined per token",
    "LateFusionTransformer": "no counterpart: torch's encoder on single numbers as tokens",
    "LowRankTensorFusion": "no counterpart: a product of low-rank factors, without attention",
}


def variant_of(layer: nn.Module) -> tuple[str, str] | None:
    """Class name of a published variant and the equivalent option, or the reason for having none; else None."""
    for kind in type(layer).__mro__:
        if kind.__name__ in _REASONS:
            return kind.__name__, _REASONS[kind.__name__]
    return None
