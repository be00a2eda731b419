"""Sizes of fusion models and interaction layers, which determine their state_dicts; check of sparse MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.gates import gate_class
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP, describe, parameter_shapes

from .fusion import MLP_EXPANSION, Compat, is_sparse_layer

CLASS_NAMES = (SPARSE_MLP, RoutedMLP.__name__)
GATE_SETTINGS = ("capacity", "random_routing", "switch_eps", "noise_epsilon")


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """Dropout rates of one fusion layer."""

    attention: float  # on the probabilities
    projection: float
    residual1: float  # on the attention branch before its residual (dropout1)
    mlp: float  # inside the MLP; 0 in a routed MLP, which has no dropout
    residual2: float  # on the MLP branch (dropout2)


@dataclasses.dataclass(frozen=True)
class SparseSpec:
    """The routed MLPs of a sparse fusion model; parameters determine the sizes and whether a gate is noisy."""

    num_experts: int  # X, of every routed MLP
    d_hidden: int  # their hidden width F
    num_routers: int  # gates per routed MLP; only the first routes
    gate: str  # class of the gates, a name in routed_mlp's GATES
    top_k: int  # experts per token
    # Settings of the gate, None if it does not have them.
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
        for name in GATE_SETTINGS:
            if (value := getattr(self, name)) is not None:
                for router in mlp.all_gates.values():
                    setattr(router, name, value)


def is_sparse(mlp: nn.Module) -> bool:
    """Whether this is a sparse MLP of any kind."""
    names = {base.__name__ for base in type(mlp).__mro__}
    return hasattr(mlp, "experts") or not names.isdisjoint(CLASS_NAMES)


def describe_sparse(mlp: nn.Module, path: str, dim: int) -> SparseSpec:
    """The description of a fusion layer's sparse MLP: the published class or a RoutedMLP."""
    if type(mlp).__name__ not in CLASS_NAMES:
        raise UnsupportedLayer(
            f"{path}: expected {SPARSE_MLP} as the sparse MLP, got {type(mlp).__name__}"
        )
    try:
        spec = describe(mlp)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"{path}.{error}") from error
    for name, value, expected in (
        ("d_model", spec.d_model, dim),
        ("d_hidden", spec.d_hidden, MLP_EXPANSION * dim),
    ):
        if value != expected:
            raise UnsupportedLayer(f"{path}.{name}: expected {expected}, got {value}")
    if spec.act != "gelu":
        raise UnsupportedLayer(
            f"{path}.experts.activation: expected GELU with the exact erf, got {spec.act}"
        )
    routers = spec.routers(mlp)
    settings = {number: _settings(router) for number, router in routers.items()}
    for number, router in routers.items():
        linear = getattr(router, "gate", None)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            raise UnsupportedLayer(f"{path}.all_gates.{number}.gate: has no bias")
        if settings[number] != settings["0"]:
            raise UnsupportedLayer(f"{path}.all_gates.{number}: settings differ from gate 0")
    return SparseSpec(
        num_experts=spec.num_expert,
        d_hidden=spec.d_hidden,
        num_routers=len(routers),
        gate=gate_class(spec.gate).__name__,
        top_k=spec.top_k,
        **settings["0"],
    )


def default_sparse(
    num_experts: int, dim: int, num_routers: int, gate: str, top_k: int
) -> SparseSpec:
    """The description of the sparse MLPs of a fusion model of these sizes, with default gate settings."""
    with torch.device("meta"):
        sizes = (num_experts, dim, MLP_EXPANSION * dim)
        mlp = RoutedMLP(*sizes, n_router=num_routers, gate=gate, top_k=top_k)
    return describe_sparse(mlp, "mlp", dim)


def _settings(gate: Any) -> dict[str, Any]:
    values = {name: getattr(gate, name, None) for name in GATE_SETTINGS}
    if values["capacity"] is not None:
        values["capacity"] = tuple(float(rate) for rate in values["capacity"])
    return values


@dataclasses.dataclass(frozen=True)
class FusionSizes:
    """The properties of a fusion model that follow from its parameters."""

    num_modalities: int
    hidden_dim: int  # token width D
    num_classes: int
    num_layers: int
    compat: Compat  # "fl_i2moe", or "i2moe" with learned positions
    num_patches: int | None  # tokens per modality of the learned positions, else None
    sparse: SparseSpec | None  # in fusion layers 0, 2, 4, ..., None when all are dense


@dataclasses.dataclass(frozen=True)
class FusionSpec(FusionSizes):
    """The sizes and rates of a fusion model."""

    num_heads: int
    norm_eps: float  # of every LayerNorm
    dropout: tuple[DropoutRates, ...]  # of each fusion layer


def fusion_shapes(spec: FusionSizes, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
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
class Architecture(FusionSizes):
    """The properties of a layer that follow from its parameters."""

    reweight_hidden: int | None  # width of the reweighting MLP, None when it is a single linear map
    reweight_layers: int  # its linear layers, 0 for weights that are the same for all samples

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
    """An architecture and the properties of a layer that its parameters do not show."""

    num_heads: int
    norm_eps: float
    dropout: tuple[DropoutRates, ...]  # the same in all experts
    fusion_sparse: bool  # whether the forward also returns gate losses
    temperature: float  # of the softmax over experts
    reweight_dropout: float
    uniqueness: bool  # whether there is a uniqueness expert per modality
    regression: bool  # whether the losses are those of InteractionMoERegression

    @property
    def num_experts(self) -> int:
        return self.num_modalities + 2 if self.uniqueness else 2
