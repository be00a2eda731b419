"""Description and check of a sparse MLP in a fusion layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.gates import gate_class
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP, describe

from .architecture import GATE_SETTINGS, SparseSpec
from .fusion import MLP_EXPANSION

CLASS_NAMES = (SPARSE_MLP, RoutedMLP.__name__)


def is_sparse(mlp: nn.Module) -> bool:
    """Whether this is a sparse MLP of any kind."""
    names = {base.__name__ for base in type(mlp).__mro__}
    return hasattr(mlp, "experts") or not names.isdisjoint(CLASS_NAMES)


def describe_sparse(mlp: nn.Module, path: str, dim: int) -> SparseSpec:
    """The description of a fusion layer's sparse MLP: the published class or a RoutedMLP.

    Raises:
        UnsupportedLayer: the fast layer does not support a part; the error names it.
    """
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
        mlp = RoutedMLP(
            num_experts,
            dim,
            MLP_EXPANSION * dim,
            n_router=num_routers,
            gate=gate,
            top_k=top_k,
        )
    return describe_sparse(mlp, "mlp", dim)


def _settings(gate: Any) -> dict[str, Any]:
    values = {name: getattr(gate, name, None) for name in GATE_SETTINGS}
    if values["capacity"] is not None:
        values["capacity"] = tuple(float(rate) for rate in values["capacity"])
    return values
