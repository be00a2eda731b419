"""Sizes of fusion models and interaction layers, which determine their state_dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.structure import parameter_shapes

from .fusion import MLP_EXPANSION, Compat, is_sparse_layer

GATE_SETTINGS = ("capacity", "random_routing", "switch_eps", "noise_epsilon")


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """Dropout rates of one fusion layer: on attention probabilities, after the projection, on the attention
    branch before its residual (dropout1), inside the MLP (0 in a routed MLP, which has no dropout),
    and on the MLP branch (dropout2)."""

    attention: float
    projection: float
    residual1: float
    mlp: float
    residual2: float


@dataclasses.dataclass(frozen=True)
class SparseSpec:
    """The routed MLPs of a sparse fusion model; parameters determine the sizes and whether a gate is noisy.

    Attributes:
        num_experts: X, experts of every routed MLP.
        d_hidden: their hidden width F.
        num_routers: gates per routed MLP; only the first routes.
        gate: class of the gates, a name in routed_mlp's GATES.
        top_k: experts per token.
        capacity, random_routing, switch_eps, noise_epsilon: settings of the gate, None if it does not have them.
    """

    num_experts: int
    d_hidden: int
    num_routers: int
    gate: str
    top_k: int
    capacity: tuple[float, float] | None
    random_routing: bool | None
    switch_eps: float | None
    noise_epsilon: float | None

    def parameter_shapes(self, path: str, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Keys and shapes of one routed MLP at `path`, for tokens of width `dim`."""
        sizes = (self.num_experts, dim, self.d_hidden)
        for name, shape in parameter_shapes(*sizes, self.gate, self.num_routers).items():
            yield f"{path}.{name}", shape

    def with_settings(self, found: dict[str, Any]) -> SparseSpec:
        """A copy with those settings in `found` that these gates have, if the type is right."""
        values: dict[str, Any] = {}
        for name in GATE_SETTINGS:
            own, value = getattr(self, name), found.get(name)
            if isinstance(own, tuple) and isinstance(value, (list, tuple)):
                value = tuple(value)
                fits = len(value) == len(own) and all(
                    isinstance(x, (int, float)) and x > 0 for x in value
                )
            else:
                fits = own is not None and isinstance(value, type(own))
            if fits:
                values[name] = value
        return dataclasses.replace(self, **values)

    def configure(self, mlp: RoutedMLP) -> None:
        """Give the gates of a routed MLP these settings."""
        for router in mlp.all_gates.values():
            for name in GATE_SETTINGS:
                if (value := getattr(self, name)) is not None:
                    setattr(router, name, value)


@dataclasses.dataclass(frozen=True)
class FusionSpec:
    """The sizes and rates of a fusion model; the attributes are those of LayerSpec."""

    num_modalities: int
    hidden_dim: int
    num_classes: int
    num_layers: int
    num_heads: int
    compat: Compat
    num_patches: int | None
    norm_eps: float
    dropout: tuple[DropoutRates, ...]
    sparse: SparseSpec | None


def fusion_shapes(
    spec: FusionSpec | Architecture, path: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys, which start with `path`, and shapes of a fusion model's parameters."""
    dim, hidden = spec.hidden_dim, MLP_EXPANSION * spec.hidden_dim
    if spec.num_patches is not None:
        yield f"{path}pos_embed", (1, spec.num_modalities * spec.num_patches, dim)
    for i in range(spec.num_layers):
        layer = f"{path}network.{i}"
        for norm in ("norm1", "norm2"):
            yield f"{layer}.{norm}.weight", (dim,)
            yield f"{layer}.{norm}.bias", (dim,)
        yield f"{layer}.attn.q.weight", (dim, dim)
        yield f"{layer}.attn.kv.weight", (2 * dim, dim)
        yield f"{layer}.attn.proj.weight", (dim, dim)
        yield f"{layer}.attn.proj.bias", (dim,)
        if spec.sparse is not None and is_sparse_layer(i):
            yield from spec.sparse.parameter_shapes(f"{layer}.mlp", dim)
            continue
        yield f"{layer}.mlp.network.0.weight", (hidden, dim)
        yield f"{layer}.mlp.network.0.bias", (hidden,)
        yield f"{layer}.mlp.network.3.weight", (dim, hidden)
        yield f"{layer}.mlp.network.3.bias", (dim,)
    head = f"{path}network.{spec.num_layers}.fc"
    yield f"{head}.weight", (spec.num_classes, spec.num_modalities * dim)
    yield f"{head}.bias", (spec.num_classes,)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The properties of a layer that follow from its parameters.

    Attributes:
        num_modalities: M.
        hidden_dim: token width D.
        num_classes: C.
        num_layers: fusion layers of every expert.
        compat: "fl_i2moe", or "i2moe" when the experts have learned positions.
        num_patches: tokens per modality of the learned positions, else None.
        reweight_hidden: hidden width of the reweighting MLP, None when it is a single linear map.
        reweight_layers: its number of linear layers, 0 for weights that are the same for all samples.
        sparse: the routed MLPs in fusion layers 0, 2, 4, ..., None when all are dense.
    """

    num_modalities: int
    hidden_dim: int
    num_classes: int
    num_layers: int
    compat: Compat
    num_patches: int | None
    reweight_hidden: int | None
    reweight_layers: int
    sparse: SparseSpec | None

    @property
    def num_experts(self) -> int:
        return self.num_modalities + 2

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """All keys of the layer's state_dict with their shapes."""
        return dict(self._shapes())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        latent = self.num_modalities * self.hidden_dim
        if not self.reweight_layers:
            yield "reweight.weights", (self.num_experts,)
        inner = [self.reweight_hidden or 0] * (self.reweight_layers - 1)
        widths = [latent, *inner, self.num_experts]
        for i in range(self.reweight_layers):
            yield f"reweight.mlp.network.{3 * i}.weight", (widths[i + 1], widths[i])
            yield f"reweight.mlp.network.{3 * i}.bias", (widths[i + 1],)
        for e in range(self.num_experts):
            yield from fusion_shapes(self, f"interaction_experts.{e}.fusion_model.")


@dataclasses.dataclass(frozen=True)
class LayerSpec(Architecture):
    """An architecture and the properties of a layer that its parameters do not show.

    Attributes:
        num_heads: attention heads H, a divisor of D.
        fusion_sparse: whether the forward also returns gate losses.
        norm_eps: epsilon of every LayerNorm.
        temperature: of the softmax over experts.
        dropout: rates of each fusion layer, the same in all experts.
        reweight_dropout: rate inside the reweighting MLP.
        uniqueness: whether there is a uniqueness expert per modality.
        regression: whether the losses are those of InteractionMoERegression.
    """

    num_heads: int
    fusion_sparse: bool
    norm_eps: float
    temperature: float
    dropout: tuple[DropoutRates, ...]
    reweight_dropout: float
    uniqueness: bool
    regression: bool

    @property
    def num_experts(self) -> int:
        return self.num_modalities + 2 if self.uniqueness else 2
