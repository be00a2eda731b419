"""Published relatives of the interaction layer, which `swap` does not replace, and what computes the same."""

from __future__ import annotations

from collections.abc import Iterator

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


def find_relatives(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Name, class and reason of every module of a class that is published beside the layer."""
    for name, module in model.named_modules():
        known = next((x.__name__ for x in type(module).__mro__ if x.__name__ in _REASONS), None)
        if known is not None:
            yield name, known, _REASONS[known]
