"""Interaction layers for tests: random parameters, all outputs of a call."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.layers.interaction_moe.fusion import Compat, Masks
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE, Replacements
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from tests.support.inputs import as_dtype, draw, draw_masks, draw_replacements, gradients


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer and a call of it, without the data.

    sparse: return gate losses. gate: gate of sparse fusion models, else None. mlp_experts, top_k, routers
    and capacity (for training and evaluation, None for the gate's default) are settings of their MLPs.
    """

    lengths: tuple[int, ...] = (5, 4)
    compat: Compat = "fl_i2moe"
    batch: int = 2
    dim: int = 8
    heads: int = 2
    layers: int = 1
    classes: int = 3
    dropout: float = 0.0
    sparse: bool = False
    masks: str = "none"
    gate: str | None = None
    mlp_experts: int = 4
    top_k: int = 2
    routers: int = 1
    capacity: float | None = None
    options: tuple[tuple[str, Any], ...] = ()  # further arguments of the layer

    def __str__(self) -> str:
        sizes = f"L{'-'.join(map(str, self.lengths))}B{self.batch}D{self.dim}"
        name = f"{self.compat}:{sizes}h{self.heads}n{self.layers}:{self.masks}"
        name += "".join(f":{option}={value}" for option, value in self.options)
        if self.gate is None:
            return name
        limit = "" if self.capacity is None else f"c{self.capacity}"
        return f"{name}:{self.gate}E{self.mlp_experts}k{self.top_k}r{self.routers}{limit}"

    @property
    def experts(self) -> int:
        return len(self.lengths) + 2 if dict(self.options).get("uniqueness", True) else 2

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 50) -> list[Tensor]:
        return [
            draw(self.batch, length, self.dim, dtype=dtype, seed=seed + m)
            for m, length in enumerate(self.lengths)
        ]

    def fusion(self, backend: str | None = None) -> FusionTransformer:
        fusion = FusionTransformer(
            *(len(self.lengths), self.dim, self.classes, self.layers, self.heads, self.dropout),
            *(self.compat, self.lengths[0] if self.compat == "i2moe" else None),
            mlp_sparse=self.gate is not None,
            num_experts=self.mlp_experts,
            num_routers=self.routers,
            top_k=self.top_k,
            gate=self.gate or "GShardGate",
            backend=backend,
        )
        for part in fusion.modules():
            if self.capacity is not None and hasattr(part, "capacity"):
                setattr(part, "capacity", (self.capacity, self.capacity))  # noqa: B010
        return fusion

    def reference(self, dtype: torch.dtype = torch.float32) -> ReferenceInteractionMoE:
        """The reference layer in train mode; its reweighting has dropout only if the rest has dropout."""
        layer = ReferenceInteractionMoE(
            *(len(self.lengths), self.fusion(), self.sparse, self.dim, 2 * self.dim, 3, 1.5),
            **dict(self.options),
        )
        with torch.no_grad():
            for i, (name, parameter) in enumerate(layer.named_parameters()):
                # Not 0 or 1, so that every parameter changes the result.
                values = draw(*parameter.shape, seed=1000 + i)
                matrix = parameter.dim() == 2 or ".experts." in name
                fan_in = parameter.shape[-1] if matrix else 4
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(offset + values * fan_in**-0.5)
        if self.dropout == 0:
            for part in layer.reweight.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
        return layer.to(dtype)


FL = LayerCase((7, 5), dim=16, batch=3)
I2 = LayerCase((6, 6), "i2moe", dim=16, batch=3)
SPARSE_FL = dataclasses.replace(FL, layers=3, sparse=True, gate="GShardGate")
SPARSE_I2 = dataclasses.replace(I2, sparse=True, gate="GShardGate")
# These gates draw random numbers in training, so only eval mode can be compared.
RANDOM_GATES = ("SwitchGate", "NoisyGate")


def fusion_of(
    case: LayerCase, backend: str | None, dtype: torch.dtype = torch.float32
) -> FusionTransformer:
    """A fusion model with random parameters; in eval mode if its gates draw random numbers."""
    fusion = case.fusion(backend)
    with torch.no_grad():
        for i, parameter in enumerate(fusion.parameters()):
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(draw(*parameter.shape, seed=1000 + i) * fan_in**-0.5)
    return fusion.to(dtype).train(case.gate not in RANDOM_GATES)


def fast_layer(case: LayerCase, dtype: torch.dtype = torch.float32) -> InteractionMoE:
    """The layer on the CPU kernels, in train mode unless its gates draw random numbers."""
    layer = InteractionMoE.adopt(case.reference(dtype), backend="cpu")
    return layer.train(case.gate not in RANDOM_GATES)


def data(case: LayerCase, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Any, Any]:
    """Inputs, masks and replacements for a case."""
    x = case.inputs(dtype)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    return x, masks, draw_replacements(x, case.experts)


def gates_of(layer: nn.Module) -> list[Any]:
    return [part.gate for part in layer.modules() if isinstance(part, RoutedMLP)]


def named_outputs(result: Sequence[Any]) -> dict[str, Tensor]:
    """All tensors that a layer's forward returns, by name."""
    experts = result[0]
    found = {"weights": result[1], "logits": result[2], "losses": torch.stack(list(result[3]))}
    found["expert_logits"] = torch.stack(
        [torch.stack([v if isinstance(v, Tensor) else v[0] for v in views]) for views in experts]
    )
    if not isinstance(experts[0][0], Tensor):
        found["expert_latents"] = torch.stack(
            [torch.stack([latent for _, latent in views]) for views in experts]
        )
        found["latents"] = torch.stack(list(result[-1]))
    if len(result) == 5 + ("latents" in found):
        found["gate_losses"] = torch.stack([torch.stack(list(views)) for views in result[4]])
    return found


def outputs_and_gradients(
    layer: nn.Module,
    inputs: Sequence[Tensor | None],
    masks: Masks,
    replacements: Replacements | None,
    **given: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of a call, and their gradients by parameter, input and replacement."""
    x = [None if each is None else each.detach().requires_grad_() for each in inputs]
    noise = None
    if replacements is not None:
        noise = [[each.detach().requires_grad_() for each in row] for row in replacements]
    outputs = named_outputs(layer(x, masks, replacements=noise, **given))
    leaves: dict[str, Tensor] = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves |= {f"inputs.{m}": each for m, each in enumerate(x) if each is not None}
    for e, row in enumerate(noise or []):
        leaves |= {f"replacements.{e}.{m}": each for m, each in enumerate(row)}
    # The latents are used only once.
    wanted = [out for name, out in outputs.items() if name != "latents"]
    found = gradients(wanted, list(leaves.values()))
    return {name: x.detach() for name, x in outputs.items()}, dict(zip(leaves, found, strict=True))


def assert_layer_within_budget(case: LayerCase, layer: nn.Module, dtype: torch.dtype) -> None:
    """Compare a layer's outputs and gradients on one call, with given noise, with the reference layer.

    Args:
        case: the call, and the architecture and parameters of the reference.
        layer: a layer with the same parameters, in `dtype`; the reference runs in its mode.
        dtype: dtype of parameters and inputs; the oracle computes in float64 from the rounded values.
    """
    x = case.inputs(dtype)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    noise = draw_replacements(x, case.experts)
    found = [
        outputs_and_gradients(layer, x, masks, noise),
        outputs_and_gradients(case.reference(dtype).train(layer.training), x, masks, noise),
        outputs_and_gradients(
            case.reference(dtype).double().train(layer.training),
            as_dtype(x, torch.float64),
            masks,
            as_dtype(noise, torch.float64),
        ),
    ]
    actual, low, exact = ({**outputs, **grads} for outputs, grads in found)
    assert_all_within_budget(actual, low, exact, f"of {case} in {dtype}")


def assert_all_within_budget(
    actual: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor], what: str
) -> None:
    """Compare named outputs and gradients with the reference and the oracle."""
    assert actual.keys() == low.keys() == exact.keys(), "other outputs or parameters"
    exact = {name: value for name, value in exact.items() if value.numel()}
    sizes: dict[str, float] = {}
    for name, value in exact.items():
        kind = _kind(name)
        sizes[kind] = max(sizes.get(kind, 0.0), float(value.abs().max()))
    for name, oracle in exact.items():
        # In deep layers the gradients of queries are tiny, so their errors are relative to those of other layers
        # and experts.
        size = sizes[_kind(name)]
        vanishes = float(oracle.abs().max()) < 0.25 * size
        results = actual[name], low[name], oracle
        assert_within_budget(*results, f"{name} {what}", magnitude=size, may_vanish=vanishes)


def _kind(name: str) -> str:
    """Kind of a result: parameters with the same role in all experts and layers; each output is its own kind."""
    if ".attn." in name:
        # Only differences of scores matter, so the gradient of q is a difference of terms of this size.
        return "attn"
    return re.sub(r"\d+", "#", name) if "." in name else name
