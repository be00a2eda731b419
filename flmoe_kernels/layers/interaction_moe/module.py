"""InteractionMoE: the published layer, computed by fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import autocast_dtype, without_autocast
from flmoe_kernels.core.native import constant_in_traces
from flmoe_kernels.layers.parts import UnsupportedLayer, class_name, separate
from flmoe_kernels.layers.routed_mlp.gate_base import Gate
from flmoe_kernels.layers.routed_mlp.gates import GATES
from flmoe_kernels.layers.routed_mlp.module import ExpertLinear, Experts, RoutedMLP, Routers
from flmoe_kernels.layers.snapshot import PartsSnapshot, has_global_hook
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
from .structure import describe, fusion_width

_OPERATOR = "interaction_moe"
_REMEDY = "; use backend='reference'"
# The classes of the parts after construction.
_CLASSES = frozenset(
    {
        *(Reweighting, InteractionExpert, FusionTransformer, EncoderLayer, Attention, MLP, Head),
        *(RoutedMLP, Experts, ExpertLinear, Routers, *GATES.values()),
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
        width = fusion_width(fusion_model)
        if width not in (None, hidden_dim):
            raise ValueError(
                f"hidden_dim: expected {width}, the fusion model's width, got {hidden_dim}"
            )
        super().__init__(
            num_modalities,
            fusion_model,
            fusion_sparse,
            hidden_dim,
            hidden_dim_rw,
            num_layer_rw,
            temperature_rw,
        )
        self._spec = _supported(self)
        self._take_parameters(self)
        self._snapshot: PartsSnapshot | None = None
        self.backend = backend

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
        self._spec = spec
        self._take_parameters(layer)
        self._snapshot = None
        self.backend = backend
        self.training = layer.training
        return self

    def _take_parameters(self, layer: nn.Module) -> None:
        """Fill this layer with new modules that hold `layer`'s parameters.

        The reference backend then runs for any class of `layer`.
        """
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        modes = {name: part.training for name, part in layer.named_modules()}
        with torch.device("meta"):
            skeleton = build_like(self._spec)
        self.reweight = skeleton.reweight
        self.interaction_experts = skeleton.interaction_experts
        for name, _ in list(skeleton.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            # A head may have no bias.
            skeleton.get_submodule(owner).register_parameter(leaf, parameters.get(name))
        for name, part in skeleton.named_modules():
            part.training = modes.get(name, layer.training)

    @property
    def backend(self) -> str | None:
        """The requested backend, None for the choice by device; setting it sets the gates' too."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend is not None:
            check.require_choice("backend", backend, backends.BACKENDS)
        self._backend = backend
        for part in self.modules():
            if isinstance(part, Gate):
                # The kernels' forward calls the gates too; the MLPs run only in the reference backend.
                part.backend = backend

    @property
    def spec(self) -> LayerSpec:
        """Sizes and rates, as of the last check of the parts."""
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
        return self._run(self._fast_forward, inputs, masks, replacements, backend)

    def inference(
        self, inputs: Sequence[Tensor], masks: Masks = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run only the full view, as ReferenceInteractionMoE.inference does."""
        inputs, backend = self._enter(inputs, masks)
        if backend == backends.REFERENCE:
            return super().inference(inputs, masks)
        return self._run(self._fast_inference, inputs, masks, backend)

    def _run(self, compute: Callable[..., tuple], inputs: Sequence[Tensor], *rest: Any) -> tuple:
        """Compute on the kernels; an error that a changed part has caused names the part."""
        with _autocast_of(rest[-1], inputs[0].device):
            if torch.compiler.is_compiling():
                return compute(inputs, *rest)
            try:
                return compute(inputs, *rest)
            except (AttributeError, RuntimeError, TypeError, ValueError):
                # A parameter of another shape, which a snapshot does not show.
                if reason := self._check():
                    raise UnsupportedLayer(reason + _REMEDY) from None
                raise

    def _enter(self, inputs: Sequence[Tensor], masks: Masks) -> tuple[Sequence[Tensor], str]:
        """Return the inputs, cast to the dtype of the computation, and the backend."""
        parameter = self._parameter
        backend = backends.choose(_OPERATOR, parameter, self.backend)
        if backend != backends.REFERENCE and (reason := self._unsupported_reason()):
            raise UnsupportedLayer(reason + _REMEDY)
        like, cast = parameter, autocast_dtype(parameter.device)
        if cast is not None and isinstance(inputs, list | tuple):
            # Under autocast an encoder returns low precision. The layer computes in its parameters' dtype or, with
            # Triton, in autocast's dtype, as torch's own layers do.
            dtype = cast if backend == backends.TRITON else parameter.dtype
            inputs = [x.to(dtype) if isinstance(x, Tensor) else x for x in inputs]
            like = parameter.detach().new_empty((0,), dtype=dtype)
        validate_inputs(self._spec, self._num_patches(), inputs, masks, like)
        return inputs, backend

    @property
    def _parameter(self) -> Tensor:
        """Any parameter: all have the same dtype and device."""
        try:
            weight = self.interaction_experts[0].fusion_model.network[0].norm1.weight
        except (AttributeError, IndexError, TypeError):
            weight = None  # a part was replaced
        return weight if isinstance(weight, Tensor) else next(self.parameters())

    def _num_patches(self) -> int | None:
        """Tokens per modality of the learned positions, which may be new ones."""
        positions = self.interaction_experts[0].fusion_model.pos_embed
        return None if positions is None else positions.shape[1] // self.num_modalities

    # torch.compile runs this once, while tracing, and does not trace it.
    @constant_in_traces
    def _unsupported_reason(self) -> str:
        """The reason why the kernels cannot compute this layer with its present parts, or "".

        If nothing has changed since the last call, this takes microseconds.
        """
        snapshot, spec = self._snapshot, self._spec
        same = snapshot is not None and snapshot.unchanged()
        same = same and self.num_modalities == spec.num_modalities
        same = same and self.fusion_sparse == spec.fusion_sparse
        same = same and self._num_patches() == spec.num_patches
        return "" if same else self._check()

    def _check(self) -> str:
        """Describe the parts again; return the reason why the kernels cannot compute them, or ""."""
        # The modules themselves: torch.export puts proxies in their place, and a subclass may add its own.
        children = vars(self)["_modules"]
        layer: Any = nn.Module()
        for name in ("reweight", "interaction_experts"):
            layer.add_module(name, children.get(name))
        layer.num_modalities, layer.fusion_sparse = self.num_modalities, self.fusion_sparse
        layer._is_replica = getattr(self, "_is_replica", False)
        named = {
            name: part
            for name, part in layer.named_modules()
            # The layer calls reweight.mlp.
            if part is not layer and not name.startswith("reweight.mlp")
        }
        snapshot = PartsSnapshot(list(named.values()), [children])
        # torch.jit.trace would record the shapes that are read.
        internal: Any = torch._C
        tracing = internal._get_tracing_state()
        internal._set_tracing_state(None)
        try:
            if has_global_hook():
                raise UnsupportedLayer(
                    "torch.nn.modules.module: a hook on all modules is registered, but the kernels do not "
                    "call the parts of the layer"
                )
            for name, part in named.items():
                if type(part) not in _CLASSES:
                    raise UnsupportedLayer(
                        f"{name}: {class_name(part)}, which the kernels would not call"
                    )
            spec = _supported(layer, self._spec)
        except UnsupportedLayer as error:
            self._snapshot = None
            return str(error)
        finally:
            internal._set_tracing_state(tracing)
        self._spec, self._snapshot = spec, snapshot
        return ""

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other parts.
        return {**self.__dict__, "_snapshot": None}

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
        flat, classes = latents.flatten(1, 2), weight.shape[1]
        if all(head.bias is None for head in heads):
            flat = torch.bmm(flat, weight.mT)
        else:
            zero = weight.new_zeros(classes)
            biases = [zero if head.bias is None else head.bias for head in heads]
            bias = torch.stack(biases).to(latents.dtype)
            flat = torch.baddbmm(bias.unsqueeze(1), flat, weight.mT)
        return flat.to(self._parameter.dtype).view(*latents.shape[:3], classes)

    def _fast_inference(
        self, inputs: Sequence[Tensor], masks: Masks, backend: str
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        plan, tokens = self._plan(inputs, masks, backend)
        latents, _ = self._latents(tokens, plan, None, 1, backend)
        logits = self._head(latents)[:, 0]
        weights, mixed = self._mix(inputs, masks, tokens, plan, logits, backend)
        return separate(logits), weights, mixed

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
        weights, mixed = mix_experts(scores, logits, self.reweight.temperature, backend)
        return weights.clone(), mixed  # the backward reads the original

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
            losses = separate(interaction_losses(logits, backend))
            return (view_logits, weights, mixed, losses, *gate_losses)
        losses = separate(interaction_losses(latents, backend))
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
    """Nested lists of x (E, V, ...); a single copy, so that the backward is a single stack."""
    flat = separate(x.flatten(0, 1))
    views = x.shape[1]
    return [flat[e * views : (e + 1) * views] for e in range(x.shape[0])]
