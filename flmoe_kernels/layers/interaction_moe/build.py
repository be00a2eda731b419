"""Construction of reference layers from their sizes."""

from __future__ import annotations

from torch import nn

from .architecture import Architecture, LayerSpec
from .fusion_transformer import FusionTransformer, build_fusion, set_rates
from .reference import ReferenceInteractionMoE


def build(
    architecture: Architecture,
    num_heads: int = 4,
    temperature: float = 1.0,
    dropout: float = 0.5,
    *,
    fusion_sparse: bool = False,
    uniqueness: bool = True,
) -> ReferenceInteractionMoE:
    """A reference layer of this architecture with fresh parameters; the other settings are not in a checkpoint.

    Raises ValueError: an argument is outside its range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return ReferenceInteractionMoE(
        architecture.num_modalities,
        build_fusion(architecture, num_heads, dropout),
        fusion_sparse,
        architecture.hidden_dim,
        architecture.reweight_hidden or architecture.hidden_dim,
        architecture.reweight_layers,
        temperature,
        uniqueness=uniqueness,
        reweighting="mlp" if architecture.reweight_layers else "average",
    )


def build_like(spec: LayerSpec) -> ReferenceInteractionMoE:
    """A reference layer with every size and rate of `spec`, and fresh parameters."""
    options = {"fusion_sparse": spec.fusion_sparse, "uniqueness": spec.uniqueness}
    layer = build(spec, spec.num_heads, spec.temperature, **options)
    for part in layer.reweight.modules():
        if isinstance(part, nn.Dropout):
            part.p = spec.reweight_dropout
    for part in layer.modules():
        if isinstance(part, FusionTransformer):
            set_rates(part, spec)
    return layer
