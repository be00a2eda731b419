"""The sizes of an interaction layer: its state_dict and the layer itself follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from .reference import Compat, FusionTransformer, ReferenceInteractionMoE

MLP_EXPANSION = 2


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """Rates of one fusion layer: on attention probabilities, after the projection, on the attention
    branch before its residual (dropout1), inside the MLP, and on the MLP branch (dropout2)."""

    attention: float
    projection: float
    residual1: float
    mlp: float
    residual2: float


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the parameters of a layer tell about it.

    Attributes:
        num_modalities: M; the layer has M + 2 experts.
        hidden_dim: token width D.
        num_classes: C.
        num_layers: fusion layers of every expert.
        compat: "fl_i2moe", or "i2moe" when the experts have learned positions.
        num_patches: tokens per modality of the learned positions, else None.
        reweight_hidden: hidden width of the reweighting MLP, None when it is a single linear map.
        reweight_layers: its number of linear maps.
    """

    num_modalities: int
    hidden_dim: int
    num_classes: int
    num_layers: int
    compat: Compat
    num_patches: int | None
    reweight_hidden: int | None
    reweight_layers: int

    @property
    def num_experts(self) -> int:
        return self.num_modalities + 2

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the layer's state_dict with its shape; there are no others."""
        return dict(self._shapes())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        dim, hidden = self.hidden_dim, MLP_EXPANSION * self.hidden_dim
        latent = self.num_modalities * dim
        inner = [self.reweight_hidden or 0] * (self.reweight_layers - 1)
        widths = [latent, *inner, self.num_experts]
        for i in range(self.reweight_layers):
            yield f"reweight.mlp.network.{3 * i}.weight", (widths[i + 1], widths[i])
            yield f"reweight.mlp.network.{3 * i}.bias", (widths[i + 1],)
        for e in range(self.num_experts):
            fusion = f"interaction_experts.{e}.fusion_model"
            if self.num_patches is not None:
                yield f"{fusion}.pos_embed", (1, self.num_modalities * self.num_patches, dim)
            for i in range(self.num_layers):
                layer = f"{fusion}.network.{i}"
                for norm in ("norm1", "norm2"):
                    yield f"{layer}.{norm}.weight", (dim,)
                    yield f"{layer}.{norm}.bias", (dim,)
                yield f"{layer}.attn.q.weight", (dim, dim)
                yield f"{layer}.attn.kv.weight", (2 * dim, dim)
                yield f"{layer}.attn.proj.weight", (dim, dim)
                yield f"{layer}.attn.proj.bias", (dim,)
                yield f"{layer}.mlp.network.0.weight", (hidden, dim)
                yield f"{layer}.mlp.network.0.bias", (hidden,)
                yield f"{layer}.mlp.network.3.weight", (dim, hidden)
                yield f"{layer}.mlp.network.3.bias", (dim,)
            yield f"{fusion}.network.{self.num_layers}.fc.weight", (self.num_classes, latent)
            yield f"{fusion}.network.{self.num_layers}.fc.bias", (self.num_classes,)


@dataclasses.dataclass(frozen=True)
class LayerSpec(Architecture):
    """An architecture with what its parameters do not tell.

    Attributes:
        num_heads: attention heads H, a divisor of D.
        fusion_sparse: whether the forward also returns gate losses.
        norm_eps: epsilon of every LayerNorm.
        temperature: of the softmax over experts.
        dropout: rates of each fusion layer, the same in all experts.
        reweight_dropout: rate inside the reweighting MLP.
    """

    num_heads: int
    fusion_sparse: bool
    norm_eps: float
    temperature: float
    dropout: tuple[DropoutRates, ...]
    reweight_dropout: float


def build(
    architecture: Architecture,
    num_heads: int = 4,
    temperature: float = 1.0,
    dropout: float = 0.5,
    *,
    fusion_sparse: bool = False,
) -> ReferenceInteractionMoE:
    """A reference layer of this architecture with fresh parameters.

    Args:
        architecture: the sizes.
        num_heads: attention heads, a divisor of hidden_dim; not part of a checkpoint.
        temperature: of the softmax over experts, positive; not part of a checkpoint.
        dropout: rate of every dropout inside the fusion models.
        fusion_sparse: whether the forward also returns gate losses.

    Raises:
        ValueError: an argument outside these ranges.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    fusion = FusionTransformer(
        architecture.num_modalities,
        architecture.hidden_dim,
        architecture.num_classes,
        architecture.num_layers,
        num_heads,
        dropout,
        architecture.compat,
        architecture.num_patches,
    )
    return ReferenceInteractionMoE(
        architecture.num_modalities,
        fusion,
        fusion_sparse,
        architecture.hidden_dim,
        architecture.reweight_hidden or architecture.hidden_dim,
        architecture.reweight_layers,
        temperature,
    )


def build_like(spec: LayerSpec) -> ReferenceInteractionMoE:
    """A reference layer with every size and rate of `spec`, and fresh parameters."""
    layer = build(spec, spec.num_heads, spec.temperature, fusion_sparse=spec.fusion_sparse)
    for part in layer.reweight.mlp.network:
        if isinstance(part, nn.Dropout):
            part.p = spec.reweight_dropout
    for expert in layer.interaction_experts:
        for encoder, rates in zip(expert.fusion_model.network, spec.dropout, strict=False):
            encoder.attn.attn_drop.p = rates.attention
            encoder.attn.proj_drop.p = rates.projection
            encoder.dropout1.p = rates.residual1
            encoder.mlp.network[2].p = rates.mlp
            encoder.dropout2.p = rates.residual2
            encoder.norm1.eps = encoder.norm2.eps = spec.norm_eps
    return layer
