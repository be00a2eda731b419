"""InteractionMoE: the published layer's interface, parameters and answers, computed by fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..routed_mlp.gate_base import Gate
from ..routed_mlp.gates import GATES
from ..routed_mlp.module import ExpertLinear, Experts, RoutedMLP
from . import op as _op  # noqa: F401  registers flmoe::interaction_losses
from .api import validate_inputs, validate_replacements
from .architecture import LayerSpec, build_like
from .forward import LayerWeights, embed, encode, stack_layer
from .fusion import MLP, Attention, EncoderLayer, FusionTransformer, Head, Masks
from .packing import TokenPlan, plan_tokens
from .reference import (
    InteractionExpert,
    ReferenceInteractionMoE,
    Replacements,
    Reweighting,
    reweighting_features,
)
from .sparse import GateLosses
from .structure import UnsupportedLayer, describe

_OPERATOR = "interaction_moe"
# What a layer is made of after construction.
_PARTS = frozenset(
    {
        *(Reweighting, InteractionExpert, FusionTransformer, EncoderLayer, Attention, MLP, Head),
        *(RoutedMLP, Experts, ExpertLinear, *GATES.values(), nn.ModuleDict),
        *(nn.ModuleList, nn.Sequential, nn.Linear, nn.LayerNorm, nn.Dropout, nn.GELU, nn.ReLU),
    }
)


class InteractionMoE(ReferenceInteractionMoE):
    """The fast FL-I2MoE / I2MoE layer: same constructor, parameters, state_dict and outputs.

    Args:
        num_modalities: M, at least two.
        fusion_model: template of the experts' fusion model, a FusionTransformer or a fusion Transformer of
            the published code; every expert gets a deep copy.
        fusion_sparse: also return gate losses, zeros where the fusion models are dense.
        hidden_dim: token width D.
        hidden_dim_rw, num_layer_rw, temperature_rw: the reweighting MLP.
        backend: "reference" or "cpu"; default by device and `use_backend`.

    Shapes and returns are those of `ReferenceInteractionMoE`. Differences: noise and dropout are equal in
    distribution, not bitwise; two dropouts in a row are one; a sample whose tokens are all padded gives
    latent 0, not NaN (by the kernels; the reference backend keeps the NaN). Differentiable once by the
    kernels, any number of times by the reference backend. In sparse fusion models the kernels ask the gates
    alone: what a RoutedMLP notes of a call (last_topk_indices and the like) stays empty.

    Raises:
        UnsupportedLayer (a ValueError): the fusion model is not one that the kernels compute.

    Source: arXiv 2603.13326 and 2505.19190.
    """

    def __init__(
        self,
        num_modalities: int,
        fusion_model: nn.Module,
        fusion_sparse: bool = False,
        hidden_dim: int = 256,
        hidden_dim_rw: int = 256,
        num_layer_rw: int = 2,
        temperature_rw: float = 1.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_modalities,
            fusion_model,
            fusion_sparse,
            hidden_dim,
            hidden_dim_rw,
            num_layer_rw,
            temperature_rw,
        )
        self.backend = backend
        self._spec = _supported(self)
        self._take_parameters(self)

    @classmethod
    def adopt(cls, layer: nn.Module, *, backend: str | None = None) -> InteractionMoE:
        """A fast layer on the parameters of an existing one: the same Parameter objects, in modules of its own.

        Raises:
            UnsupportedLayer: naming the part that the kernels do not compute.
        """
        spec = _supported(layer)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.num_modalities = spec.num_modalities
        self.fusion_sparse = spec.fusion_sparse
        self.backend = backend
        self._spec = spec
        self._take_parameters(layer)
        return self.train(layer.training)

    def _take_parameters(self, layer: nn.Module) -> None:
        """Fill this layer with modules of its own that hold `layer`'s parameters.

        So the reference backend runs whatever classes the parameters came in.
        """
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        with torch.device("meta"):
            skeleton = build_like(self._spec)
        self.reweight = skeleton.reweight
        self.interaction_experts = skeleton.interaction_experts
        for name in list(skeleton.state_dict()):
            if name not in parameters:
                raise UnsupportedLayer(f"{name}: expected a parameter, found a buffer")
            owner, _, leaf = name.rpartition(".")
            skeleton.get_submodule(owner).register_parameter(leaf, parameters[name])
        for part in skeleton.modules():
            if isinstance(part, Gate):
                # The kernels' pass asks the gates too; only the reference's MLPs are always the reference.
                part.backend = self.backend

    @property
    def spec(self) -> LayerSpec:
        """Sizes and rates at construction."""
        return self._spec

    def forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        *,
        replacements: Replacements | None = None,
    ) -> tuple:
        """As ReferenceInteractionMoE.forward.

        Raises:
            TypeError, ValueError: inputs, masks or replacements of the wrong kind, shape, dtype or device.
            BackendUnavailable: the backend asked for cannot run this.
        """
        inputs, backend = self._enter(inputs, masks)
        if replacements is not None and torch.is_autocast_enabled(inputs[0].device.type):
            replacements = [[x.to(inputs[0].dtype) for x in each] for each in replacements]
        validate_replacements(self._spec, replacements, inputs)
        if backend == backends.REFERENCE:
            return super().forward(inputs, masks, replacements=replacements)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return self._fast_forward(inputs, masks, replacements, backend)

    def inference(
        self, inputs: Sequence[Tensor], masks: Masks = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As ReferenceInteractionMoE.inference: the full view alone."""
        inputs, backend = self._enter(inputs, masks)
        if backend == backends.REFERENCE:
            return super().inference(inputs, masks)
        with torch.autocast(inputs[0].device.type, enabled=False):
            plan = self._plan(inputs, masks)
            latents, _ = self._latents(inputs, plan, None, 1, backend)
            logits = self._head(latents)[:, 0]
            weights = self._weights(inputs, masks)
            return list(logits.unbind(0)), weights, _mix(weights, logits)

    def _enter(self, inputs: Sequence[Tensor], masks: Masks) -> tuple[Sequence[Tensor], str]:
        parameter: Any = self.reweight.mlp.network[0].weight
        if torch.is_autocast_enabled(parameter.device.type) and isinstance(inputs, list | tuple):
            # Under autocast an encoder hands over low precision; the layer keeps its parameters' type.
            inputs = [x.to(parameter.dtype) if isinstance(x, Tensor) else x for x in inputs]
        validate_inputs(self._spec, inputs, masks, parameter)
        backend = backends.choose(_OPERATOR, parameter, self.backend)
        if backend != backends.REFERENCE and not torch.compiler.is_compiling():
            self._check_parts()
        return inputs, backend

    def _check_parts(self) -> None:
        """The kernels do not call the parts one by one: one that would act differently must not be ignored.

        Raises:
            UnsupportedLayer: a part of another class than at construction, or with a hook.
        """
        for root in (self.reweight, self.interaction_experts):
            for part in root.modules():
                if type(part) not in _PARTS:
                    raise UnsupportedLayer(
                        f"{type(part).__name__}: put into the layer after construction; the kernels "
                        "would not call it, backend='reference' does"
                    )
                if part._forward_hooks or part._forward_pre_hooks:
                    raise UnsupportedLayer(
                        f"{type(part).__name__}: carries a hook on a part of the layer, which the "
                        "kernels would not call; backend='reference' does"
                    )

    def _plan(self, inputs: Sequence[Tensor], masks: Masks) -> TokenPlan:
        first = inputs[0]
        return plan_tokens(first.shape[0], [x.shape[1] for x in inputs], masks, first.device)

    def _layers(self) -> list[LayerWeights]:
        networks = [expert.fusion_model.network for expert in self.interaction_experts]
        return [
            stack_layer([network[i] for network in networks], self._spec.compat)
            for i in range(self._spec.num_layers)
        ]

    def _latents(
        self,
        inputs: Sequence[Tensor],
        plan: TokenPlan,
        replacements: Replacements | None,
        views: int,
        backend: str,
    ) -> tuple[Tensor, GateLosses]:
        spec = self._spec
        positions = None
        if spec.compat == "i2moe":
            learned = [expert.fusion_model.pos_embed for expert in self.interaction_experts]
            positions = torch.cat(learned)
        rows = embed(inputs, plan, positions, spec.num_experts, replacements, views > 1)
        return encode(rows, self._layers(), plan, views, spec.compat, backend)

    def _head(self, latents: Tensor) -> Tensor:
        """Logits (E, V, B, C) of latents (E, V, B, M * D)."""
        heads = [expert.fusion_model.network[-1].fc for expert in self.interaction_experts]
        weight = torch.stack([head.weight for head in heads])
        bias = torch.stack([head.bias for head in heads])
        flat = torch.baddbmm(bias.unsqueeze(1), latents.flatten(1, 2), weight.mT)
        return flat.view(*latents.shape[:3], self._spec.num_classes)

    def _weights(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
        scores = self.reweight.mlp(reweighting_features(inputs, masks))
        return torch.softmax(scores / self.reweight.temperature, dim=1)

    def _fast_forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks,
        replacements: Replacements | None,
        backend: str,
    ) -> tuple:
        plan, views = self._plan(inputs, masks), self.num_modalities + 1
        latents, gates = self._latents(inputs, plan, replacements, views, backend)
        logits = self._head(latents)
        weights = self._weights(inputs, masks)
        mixed = _mix(weights, logits[:, 0])
        gate_losses = (gates,) if self.fusion_sparse else ()
        view_logits = _by_expert(logits)
        if self._spec.compat == "i2moe":
            losses = list(torch.ops.flmoe.interaction_losses(logits).unbind(0))
            return (view_logits, weights, mixed, losses, *gate_losses)
        losses = list(torch.ops.flmoe.interaction_losses(latents).unbind(0))
        view_latents = _by_expert(latents)
        outputs = [
            list(zip(one, other, strict=True))
            for one, other in zip(view_logits, view_latents, strict=True)
        ]
        return (outputs, weights, mixed, losses, *gate_losses, [z[0] for z in view_latents])


def _supported(layer: nn.Module) -> LayerSpec:
    spec = describe(layer)
    for i, rates in enumerate(spec.dropout):
        if spec.compat == "i2moe" and rates.projection != rates.residual1:
            raise UnsupportedLayer(
                f"network.{i}: proj_drop and dropout1 differ, {rates.projection} and "
                f"{rates.residual1}; with the residual of I2MoE they must be equal"
            )
    return spec


def _by_expert(x: Tensor) -> list[list[Tensor]]:
    """x (E, V, ...) as nested lists; one unbind, so that its backward is one stack."""
    flat = x.flatten(0, 1).unbind(0)
    views = x.shape[1]
    return [list(flat[e * views : (e + 1) * views]) for e in range(x.shape[0])]


def _mix(weights: Tensor, logits: Tensor) -> Tensor:
    """sum_e weights (B, E) * logits (E, B, C) -> (B, C)."""
    return torch.einsum("be,ebc->bc", weights, logits)
