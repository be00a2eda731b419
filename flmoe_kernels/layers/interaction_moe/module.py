"""InteractionMoE: the published layer, computed by fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import autocast_dtype
from flmoe_kernels.layers.modalities import Masks, Modalities
from flmoe_kernels.layers.parts import (
    UnsupportedLayer,
    class_name,
    record_methods,
    separate,
    share_parameters,
)
from flmoe_kernels.ops.reweighting import mix_experts, reweighting_features

from .architecture import LayerSpec
from .build import build_like
from .dense import Networks, infer, train
from .experts import ExpertAverage, InteractionExpert, Reweighting
from .forward import embed, encode, pack_inputs, require_like, stack_layer, stack_replacements
from .fusion import Attention, Inputs
from .fusion_transformer import FusionTransformer
from .kernel_layer import KernelLayer
from .packing import TokenPlan, Views, plan_views
from .reference import (
    OPTIONS,
    ReferenceInteractionMoE,
    Replacements,
    check_replacements,
)
from .sparse import GateLosses, sum_losses
from .structure import describe
from .variants import variant_of


@record_methods
class InteractionMoE(KernelLayer, ReferenceInteractionMoE):
    """The fast FL-I2MoE / I2MoE layer: same constructor, parameters, state_dict and outputs.

    Args:
        num_modalities: M, at least two.
        fusion_model: template of the experts' fusion model, a FusionTransformer or a fusion Transformer of
            the published code; every expert gets a deep copy.
        fusion_sparse: also return gate losses, zeros if the fusion models are dense.
        hidden_dim: token width D.
        hidden_dim_rw, num_layer_rw, temperature_rw: the reweighting MLP.
        modality_dropout, replacement, num_perturbed, interaction_loss, uniqueness, reweighting: missing modalities
            in training and the published ablations; see ReferenceInteractionMoE.
        backend: "reference", "cpu" or "triton"; default by device and `use_backend`.

    Shapes and results are those of `ReferenceInteractionMoE`. Differences: noise and dropout are equal in
    distribution, not bitwise; two successive dropouts are merged; if all tokens of a sample are padded, its latent
    is 0, not NaN (the reference backend keeps the NaN). The kernels are differentiable once, the reference backend
    any number of times. Under torch.autocast the kernels compute in autocast's dtype (float64 stays), with float32
    statistics, and return logits, weights, latents and losses in the parameters' dtype. In sparse fusion models
    the kernels call only the gates, so what a RoutedMLP records of its last call (last_topk_indices and similar)
    stays empty.

    Raises:
        UnsupportedLayer (a ValueError): the kernels do not support the fusion model.

    Source: arXiv 2603.13326 and 2505.19190.
    """

    PART_CLASSES = KernelLayer.PART_CLASSES | {
        *(Reweighting, ExpertAverage, InteractionExpert, FusionTransformer)
    }

    def _complete(self, backend: str | None) -> None:
        self._spec = _supported(self)
        self._take_parameters(self)
        self._start(self._spec, backend)

    @classmethod
    def adopt(cls, layer: nn.Module, *, backend: str | None = None) -> InteractionMoE:
        """Make a fast layer from an existing layer: new modules that share the layer's Parameter objects.

        Raises:
            UnsupportedLayer: the kernels do not support a part of the layer; the error names it.
        """
        if (variant := variant_of(layer)) is not None:
            raise UnsupportedLayer(f"{variant[0]}: {variant[1]}")
        spec = _supported(layer)
        if spec.regression and not cls.regression:
            raise UnsupportedLayer(f"{class_name(layer)}: use InteractionMoERegression.adopt")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.num_modalities = spec.num_modalities
        self.fusion_sparse = spec.fusion_sparse
        own = isinstance(layer, ReferenceInteractionMoE)
        for name, default in OPTIONS.items():
            setattr(self, name, getattr(layer, name) if own else default)
        self._spec = spec
        self._take_parameters(layer)
        self._start(spec, backend)
        self.training = layer.training
        return self

    def _take_parameters(self, layer: nn.Module) -> None:
        """Fill this layer with new modules that hold `layer`'s parameters.

        The reference backend then runs for any class of `layer`.
        """
        with torch.device("meta"):
            skeleton = build_like(self._spec)
        share_parameters(layer, skeleton)
        for name, part in layer.named_modules():
            # Of this package's attentions only: published ones capture by default.
            if isinstance(part, Attention):
                own: Any = skeleton.get_submodule(name)
                own.capture_attn, own.require_attn_grad = part.capture_attn, part.require_attn_grad
        self.reweight = skeleton.reweight
        self.interaction_experts = skeleton.interaction_experts

    def forward(
        self,
        inputs: Inputs,
        masks: Masks = None,
        *,
        replacements: Replacements | None = None,
        mean_vectors: Sequence[Tensor] | None = None,
    ) -> tuple:
        """Run the layer; arguments and results as in ReferenceInteractionMoE.forward.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
            BackendUnavailable: the requested backend cannot run this.
        """
        self._check_options()
        call, backend = self._enter(inputs, masks)
        like = call.inputs[0]
        if autocast_dtype(like.device) is not None:
            replacements = check.cast_tensors(replacements, like.dtype)
            mean_vectors = check.cast_tensors(mean_vectors, like.dtype)
        elif isinstance(replacements, (list, tuple)):
            replacements = [check.widened(noise, like) for noise in replacements]
        replacements = check_replacements(replacements, call, self._spec.num_experts)
        given = self._replacements(call, replacements, check.widened(mean_vectors, like))
        if backend == backends.REFERENCE:
            with self._plain_parts():
                return self._plain_forward(call, given)
        return self._run(self._fast_forward, call, given, backend)

    def inference(self, inputs: Inputs, masks: Masks = None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run only the full view, as ReferenceInteractionMoE.inference does."""
        self._check_options()
        call, backend = self._enter(inputs, masks)
        if backend == backends.REFERENCE:
            with self._plain_parts():
                return self._plain_inference(call)
        return self._run(self._fast_inference, call, backend)

    def _plain_parts(self) -> AbstractContextManager:
        """If one expert captures maps, all experts run in plain PyTorch."""
        return backends.use_backend(backends.REFERENCE) if self._captures else nullcontext()

    def _fusion(self) -> Any:
        return self.interaction_experts[0].fusion_model

    def _checked_parts(self) -> tuple[nn.Module, tuple[str, ...]]:
        # Not attributes: torch.export replaces them by proxies. A subclass may have further modules.
        children = vars(self)["_modules"]
        parts: Any = nn.Module()
        for name in ("reweight", "interaction_experts"):
            parts.add_module(name, children.get(name))
        for name in ("num_modalities", "fusion_sparse", "uniqueness", "regression"):
            setattr(parts, name, getattr(self, name))
        parts._is_replica = getattr(self, "_is_replica", False)
        return parts, ("reweight.mlp",)

    def _describe(self, parts: nn.Module) -> LayerSpec:
        return _supported(parts, self._spec)

    def _resized(self) -> bool:
        own = self.fusion_sparse, self.uniqueness
        return super()._resized() or own != (self._spec.fusion_sparse, self._spec.uniqueness)

    def _networks(self) -> Networks:
        return [
            [*expert.fusion_model.network][: self._spec.num_layers]
            for expert in self.interaction_experts
        ]

    def _latents(
        self,
        tokens: Tensor,
        plan: TokenPlan,
        views: Views,
        replacements: Tensor | Literal["noise"] | None,
        backend: str,
    ) -> tuple[Tensor, list[GateLosses]]:
        spec, dtype = self._spec, tokens.dtype
        positions = self._learned_positions(range(spec.num_experts))
        positions = None if positions is None else positions.to(dtype)
        encoders = self._dense_encoders()
        if encoders is None:
            rows = embed(tokens, plan, positions, spec.num_experts, replacements)
            networks = zip(*self._networks(), strict=True)
            layers = [stack_layer(x, spec.compat, dtype) for x in networks]
            return encode(rows, layers, plan, views, spec.compat, backend)
        weights = encoders.read()
        given = [x for x in (tokens, positions, replacements) if isinstance(x, Tensor)]
        infers = encoders.infers(backend, [*given, *weights])
        shared = infers and positions is None and replacements is None
        rows = embed(tokens, plan, positions, 1 if shared else spec.num_experts, replacements)
        if infers:
            return infer(rows, weights, encoders.networks, plan, views, spec.compat), []
        return train(rows, weights, encoders, plan, views, spec.compat, backend), []

    def _learned_positions(self, experts: range) -> Tensor | None:
        """Positions (E, L, D) of I2MoE."""
        if self._spec.compat != "i2moe":
            return None
        learned = [self.interaction_experts[e].fusion_model.pos_embed for e in experts]
        require_like(learned, self._parameter)
        return torch.cat(learned)

    def _head(self, latents: Tensor, experts: range | None = None) -> Tensor:
        """Logits (E, V, B, C) of latents (E, V, B, M * D), in the parameters' dtype; experts: None for all."""
        chosen = range(len(self.interaction_experts)) if experts is None else experts
        heads = [self.interaction_experts[e].fusion_model.network[-1].fc for e in chosen]
        weights, biases = [head.weight for head in heads], [head.bias for head in heads]
        require_like((x for x in (*weights, *biases) if x is not None), self._parameter)
        weight = torch.stack(weights).to(latents.dtype)
        flat, classes = latents.flatten(1, 2), weight.shape[1]
        if all(x is None for x in biases):
            flat = torch.bmm(flat, weight.mT)
        else:
            if any(x is None for x in biases):
                zero = weights[0].new_zeros(classes)
                biases = [zero if x is None else x for x in biases]
            bias = torch.stack(biases).to(latents.dtype)
            flat = torch.baddbmm(bias.unsqueeze(1), flat, weight.mT)
        return flat.to(self._parameter.dtype).view(*latents.shape[:3], classes)

    def _fast_inference(
        self, call: Modalities, backend: str
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        plan, tokens = pack_inputs(call.inputs, call.masks, backend)
        latents, _ = self._latents(tokens, plan, Views(), None, backend)
        logits = self._head(latents)[:, 0]
        weights, mixed = self._mix(call, tokens, plan, logits, backend)
        return separate(logits), weights, mixed

    def _mix(
        self,
        call: Modalities,
        tokens: Tensor,
        plan: TokenPlan,
        logits: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Weights (B, E) of the experts and the mixture (B, C) of their logits (E, B, C)."""
        features = None
        if not isinstance(self.reweight, ExpertAverage):
            normalized = self._normalized(call)
            features = reweighting_features(
                call.inputs, call.masks, normalized, tokens, plan.valid, backend
            )
        return self._mixture(features, logits, backend)

    def _mixture(
        self, features: Tensor | None, logits: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """As `_mix`, from the reweighting's features (B, M * D), which an ExpertAverage does not need."""
        if isinstance(self.reweight, ExpertAverage):
            scores = self.reweight.weights.repeat(logits.shape[1], 1)
        else:
            scores = self.reweight.mlp(features)
        weights, mixed = mix_experts(scores, logits, self.reweight.temperature, backend)
        return weights.clone(), mixed  # the backward reads the original

    def _fast_forward(
        self, call: Modalities, replacements: Replacements | None, backend: str
    ) -> tuple:
        plan, tokens = pack_inputs(call.inputs, call.masks, backend)
        views = plan_views(plan, self._perturbed(call), fold=self._spec.sparse is None)
        fills: Tensor | Literal["noise"] | None = None
        if views.replaced:
            fills = "noise" if replacements is None else stack_replacements(replacements)
        latents, gates = self._latents(tokens, plan, views, fills, backend)
        latents = views.all_modalities(latents, 1, self.num_modalities)
        if views.exists is not None and not views.folded:
            # (V, B), contiguous: the latents take its order of dimensions.
            exists = F.pad(views.exists.T, (0, 0, 1, 0), value=True)
            latents = torch.where(exists.unsqueeze(2), latents, 0.0)
        logits = self._head(latents)
        latents = latents.to(logits.dtype)
        weights, mixed = self._mix(call, tokens, plan, logits[:, 0], backend)
        gate_losses: tuple = ()
        if self.fusion_sparse:
            sums = sum_losses(gates, self._spec.num_experts, views.count, latents)
            gate_losses = (_by_expert(views.all_modalities(sums, 1, self.num_modalities)),)
        view_logits = _by_expert(logits)
        learned = self._spec.compat == "i2moe"
        measured = self._measured(logits if learned else (logits, latents))
        losses = self._view_losses(measured, views.exists, backend)
        if learned:
            return (view_logits, weights, mixed, losses, *gate_losses)
        view_latents = _by_expert(latents)
        outputs = [
            list(zip(expert_logits, expert_latents, strict=True))
            for expert_logits, expert_latents in zip(view_logits, view_latents, strict=True)
        ]
        return (outputs, weights, mixed, losses, *gate_losses, [z[0] for z in view_latents])


def _supported(layer: nn.Module, known: LayerSpec | None = None) -> LayerSpec:
    spec = describe(layer, known)
    for i, rates in enumerate(spec.dropout):
        if spec.compat == "i2moe" and rates.projection != rates.residual1:
            raise UnsupportedLayer(
                f"network.{i}: proj_drop and dropout1 differ, {rates.projection} and "
                f"{rates.residual1}; with the residual of I2MoE they must be equal"
            )
    return spec


def _by_expert(x: Tensor) -> list[list[Tensor]]:
    """Nested lists of x (E, V, *); a single copy, so that the backward is a single stack."""
    flat = separate(x.flatten(0, 1))
    views = x.shape[1]
    return [flat[e * views : (e + 1) * views] for e in range(x.shape[0])]
