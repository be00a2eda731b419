"""InteractionMoE: the published layer, computed by fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.dtypes import autocast_dtype, without_autocast
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.gate_base import Gate
from flmoe_kernels.layers.routed_mlp.gates import GATES
from flmoe_kernels.layers.routed_mlp.module import ExpertLinear, Experts, RoutedMLP
from flmoe_kernels.ops.interaction_losses import interaction_losses
from flmoe_kernels.ops.reweighting import mix_experts, reweighting_features

from .architecture import LayerSpec, build_like
from .forward import LayerWeights, embed, encode, stack_layer
from .fusion import MLP, Attention, EncoderLayer, FusionTransformer, Head, Masks
from .inputs import validate_inputs, validate_replacements
from .packing import TokenPlan, plan_tokens
from .reference import (
    InteractionExpert,
    ReferenceInteractionMoE,
    Replacements,
    Reweighting,
)
from .sparse import GateLosses, sum_losses
from .structure import describe

_OPERATOR = "interaction_moe"
# The parts of a layer after construction.
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
        fusion_sparse: also return gate losses, zeros if the fusion models are dense.
        hidden_dim: token width D.
        hidden_dim_rw, num_layer_rw, temperature_rw: the reweighting MLP.
        backend: "reference", "cpu" or "triton"; default by device and `use_backend`.

    Shapes and results are those of `ReferenceInteractionMoE`. Differences: noise and dropout are equal in
    distribution, not bitwise; two successive dropouts are merged; if all tokens of a sample are padded, its latent
    is 0, not NaN (the reference backend keeps the NaN). The kernels are differentiable once, the reference backend
    any number of times. Under torch.autocast the CPU kernels compute in the parameters' dtype and the Triton
    kernels in autocast's, with float32 statistics; both return logits, weights, latents and losses in the
    parameters' dtype. In sparse fusion models the kernels call only the gates, so what a RoutedMLP records of its
    last call (last_topk_indices and similar) stays empty.

    Raises:
        UnsupportedLayer (a ValueError): the kernels do not support the fusion model.

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
        """Make a fast layer from an existing layer: new modules that share the layer's Parameter objects.

        Raises:
            UnsupportedLayer: the kernels do not support a part of the layer; the error names it.
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
        """Fill this layer with new modules that hold `layer`'s parameters.

        The reference backend then runs for any class of `layer`.
        """
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        with torch.device("meta"):
            skeleton = build_like(self._spec)
        self.reweight = skeleton.reweight
        self.interaction_experts = skeleton.interaction_experts
        for name in list(skeleton.state_dict()):
            owner, _, leaf = name.rpartition(".")
            skeleton.get_submodule(owner).register_parameter(leaf, parameters[name])
        for part in skeleton.modules():
            if isinstance(part, Gate):
                # The kernels' forward calls the gates too; the MLPs run only in the reference backend.
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
        """Run the layer; arguments and results as in ReferenceInteractionMoE.forward.

        Raises:
            TypeError, ValueError: inputs, masks or replacements have the wrong type, shape, dtype or device.
            BackendUnavailable: the requested backend cannot run this.
        """
        inputs, backend = self._enter(inputs, masks)
        if replacements is not None and autocast_dtype(inputs[0].device) is not None:
            replacements = [[x.to(inputs[0].dtype) for x in each] for each in replacements]
        validate_replacements(self._spec, replacements, inputs)
        if backend == backends.REFERENCE:
            return super().forward(inputs, masks, replacements=replacements)
        with _autocast_of(backend, inputs[0].device):
            return self._fast_forward(inputs, masks, replacements, backend)

    def inference(
        self, inputs: Sequence[Tensor], masks: Masks = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run only the full view, as ReferenceInteractionMoE.inference does."""
        inputs, backend = self._enter(inputs, masks)
        if backend == backends.REFERENCE:
            return super().inference(inputs, masks)
        with _autocast_of(backend, inputs[0].device):
            plan, tokens = self._plan(inputs, masks, backend)
            latents, _ = self._latents(tokens, plan, None, 1, backend)
            logits = self._head(latents)[:, 0]
            weights, mixed = self._mix(inputs, masks, tokens, plan, logits, backend)
            return list(logits.unbind(0)), weights, mixed

    def _enter(self, inputs: Sequence[Tensor], masks: Masks) -> tuple[Sequence[Tensor], str]:
        """Return the inputs, cast to the dtype of the computation, and the backend."""
        parameter = self._parameter
        backend = backends.choose(_OPERATOR, parameter, self.backend)
        like, cast = parameter, autocast_dtype(parameter.device)
        if cast is not None and isinstance(inputs, list | tuple):
            # Under autocast an encoder returns low precision. The layer computes in its parameters' dtype or, with
            # Triton, in autocast's dtype, as torch's own layers do.
            dtype = cast if backend == backends.TRITON else parameter.dtype
            inputs = [x.to(dtype) if isinstance(x, Tensor) else x for x in inputs]
            like = parameter.detach().new_empty((0,), dtype=dtype)
        validate_inputs(self._spec, inputs, masks, like)
        if backend != backends.REFERENCE and not torch.compiler.is_compiling():
            self._check_parts()
        return inputs, backend

    @property
    def _parameter(self) -> Tensor:
        """Any parameter: all have the same dtype and device."""
        first: Any = self.reweight.mlp.network[0].weight
        return first

    def _check_parts(self) -> None:
        """Check that no part has been changed; the kernels do not call the parts, so a change would be ignored.

        Raises:
            UnsupportedLayer: a part has another class than at construction, or a hook.
        """
        for root in (self.reweight, self.interaction_experts):
            for part in root.modules():
                if type(part) not in _PARTS:
                    raise UnsupportedLayer(
                        f"{type(part).__name__}: replaced after construction; the kernels "
                        "would not call it, use backend='reference'"
                    )
                if part._forward_hooks or part._forward_pre_hooks:
                    raise UnsupportedLayer(
                        f"{type(part).__name__}: carries a hook, which the kernels would not "
                        "call; use backend='reference'"
                    )

    def _plan(
        self, inputs: Sequence[Tensor], masks: Masks, backend: str
    ) -> tuple[TokenPlan, Tensor]:
        """Return the plan of the rows, and the tokens (B, L, D) of all modalities."""
        first, lengths = inputs[0], [x.shape[1] for x in inputs]
        # Triton's interpreter uses the same plan as a GPU.
        reads = backend != backends.TRITON
        plan = plan_tokens(first.shape[0], lengths, masks, first.device, reads=reads)
        return plan, torch.cat(list(inputs), dim=1)

    def _layers(self, dtype: torch.dtype) -> list[LayerWeights]:
        networks = [expert.fusion_model.network for expert in self.interaction_experts]
        return [
            stack_layer([network[i] for network in networks], self._spec.compat, dtype)
            for i in range(self._spec.num_layers)
        ]

    def _latents(
        self,
        tokens: Tensor,
        plan: TokenPlan,
        replacements: Replacements | None,
        views: int,
        backend: str,
    ) -> tuple[Tensor, list[GateLosses]]:
        spec, dtype = self._spec, tokens.dtype
        positions = None
        if spec.compat == "i2moe":
            learned = [expert.fusion_model.pos_embed for expert in self.interaction_experts]
            positions = torch.cat(learned).to(dtype)
        rows = embed(tokens, plan, positions, spec.num_experts, replacements, views > 1)
        return encode(rows, self._layers(dtype), plan, views, spec.compat, backend)

    def _head(self, latents: Tensor) -> Tensor:
        """Logits (E, V, B, C) of latents (E, V, B, M * D), in the parameters' dtype."""
        heads = [expert.fusion_model.network[-1].fc for expert in self.interaction_experts]
        weight = torch.stack([head.weight for head in heads]).to(latents.dtype)
        bias = torch.stack([head.bias for head in heads]).to(latents.dtype)
        flat = torch.baddbmm(bias.unsqueeze(1), latents.flatten(1, 2), weight.mT)
        flat = flat.to(self._parameter.dtype)
        return flat.view(*latents.shape[:3], self._spec.num_classes)

    def _mix(
        self,
        inputs: Sequence[Tensor],
        masks: Masks,
        tokens: Tensor,
        plan: TokenPlan,
        logits: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Weights (B, E) of the experts and the mixture (B, C) of their logits (E, B, C)."""
        features = reweighting_features(inputs, masks, tokens, plan.valid, backend)
        scores = self.reweight.mlp(features)
        return mix_experts(scores, logits, self.reweight.temperature, backend)

    def _fast_forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks,
        replacements: Replacements | None,
        backend: str,
    ) -> tuple:
        (plan, tokens), views = self._plan(inputs, masks, backend), self.num_modalities + 1
        latents, gates = self._latents(tokens, plan, replacements, views, backend)
        logits = self._head(latents)
        latents = latents.to(logits.dtype)
        weights, mixed = self._mix(inputs, masks, tokens, plan, logits[:, 0], backend)
        gate_losses: tuple = ()
        if self.fusion_sparse:
            gate_losses = (sum_losses(gates, self._spec.num_experts, views, latents),)
        view_logits = _by_expert(logits)
        if self._spec.compat == "i2moe":
            losses = list(interaction_losses(logits, backend).unbind(0))
            return (view_logits, weights, mixed, losses, *gate_losses)
        losses = list(interaction_losses(latents, backend).unbind(0))
        view_latents = _by_expert(latents)
        outputs = [
            list(zip(expert_logits, expert_latents, strict=True))
            for expert_logits, expert_latents in zip(view_logits, view_latents, strict=True)
        ]
        return (outputs, weights, mixed, losses, *gate_losses, [z[0] for z in view_latents])


def _autocast_of(backend: str, device: torch.device) -> AbstractContextManager:
    """Context without autocast for the CPU kernels; Triton needs it for the gates and the reweighting MLP."""
    if backend == backends.TRITON:
        return nullcontext()
    return without_autocast(device)


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
    """Nested lists of x (E, V, ...); a single unbind, so that the backward is a single stack."""
    flat = x.flatten(0, 1).unbind(0)
    views = x.shape[1]
    return [list(flat[e * views : (e + 1) * views]) for e in range(x.shape[0])]
