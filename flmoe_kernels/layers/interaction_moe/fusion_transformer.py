"""FusionTransformer: the published fusion model, computed by fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.modalities import Masks, Modalities
from flmoe_kernels.layers.parts import record_methods, share_parameters
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP

from .architecture import FusionSizes, FusionSpec, LayerSpec
from .dense import Networks, infer, train
from .forward import embed, encode, pack_inputs, require_like, stack_layer
from .fusion import MLP, Inputs, ReferenceFusionTransformer
from .kernel_layer import KernelLayer
from .packing import Views
from .structure import describe_fusion, fusion_spec


@record_methods
class FusionTransformer(KernelLayer, ReferenceFusionTransformer):
    """A transformer over the tokens of all modalities with a linear head, alone or in an interaction layer.

    Args:
        num_modalities: M, at least one.
        hidden_dim: token width D, divisible by num_heads.
        output_dim: number of classes C.
        num_layers: encoder layers, at least one.
        num_heads: attention heads.
        dropout: rate of every dropout in the model.
        compat: "fl_i2moe" (pre-norm, sinusoidal positions, masks) or "i2moe" (learned positions).
        num_patches: tokens per modality; required by "i2moe", whose positions are a parameter.
        mlp_sparse: use routed MLPs, without dropout, in encoder layers 0, 2, 4, ..., as published.
        num_experts: experts of each routed MLP; required by mlp_sparse.
        num_routers: gates per routed MLP; only the first routes.
        top_k: experts per token; SwitchGate sets it to 1.
        gate: "NaiveGate", "GShardGate", "SwitchGate" or "NoisyGate".
        modality_dropout: probability that a modality of a sample is dropped in training; at least one is kept.
        backend: "reference", "cpu" or "triton"; default by device and `use_backend`.

    Inputs of a lower precision than the parameters are cast to the parameters' dtype. The list of masks may be
    shorter than the inputs: missing masks count as all valid. Values of padded tokens have no effect. A sample of
    padding alone has the latent 0 (NaN in the reference backend).

    The head and routed MLPs are called, a routed MLP once per modality with the padded tokens (B, L_m, D), so that
    their hooks run. The other parts are not called; a part that was changed takes effect or raises an error. If
    `capture_attn` is set on an attention (network.*.attn), the plain PyTorch forward runs and stores the map in
    `last_attn`, see Attention.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2603.13326 and 2505.19190.
    """

    def _complete(self, backend: str | None) -> None:
        self._start(fusion_spec(self), backend)

    @classmethod
    def adopt(cls, model: nn.Module, *, backend: str | None = None) -> FusionTransformer:
        """Make a fast model from a published fusion model: new modules that share the model's Parameter objects.

        Raises:
            UnsupportedLayer: the kernels do not support a part of the model; the error names it.
        """
        spec = describe_fusion(model)
        with torch.device("meta"):
            self = build_fusion(spec, spec.num_heads)
        set_rates(self, spec)
        if isinstance(model, ReferenceFusionTransformer):
            self.modality_dropout = model.modality_dropout
        for name, part in self.named_modules():
            if isinstance(part, RoutedMLP):
                captures = getattr(model.get_submodule(name), "capture_topk_pre_mix", False)
                part.capture_topk_pre_mix = bool(captures)
        share_parameters(model, self)
        self._start(spec, backend)
        return self

    def _fusion(self) -> Any:
        return self

    def _networks(self) -> Networks:
        return [[*self.network][:-1]]

    def _checked_parts(self) -> tuple[nn.Module, tuple[str, ...]]:
        # Not attributes: torch.export replaces them by proxies. A subclass may have further modules.
        network = vars(self)["_modules"].get("network")
        parts: Any = nn.Module()
        parts.add_module("network", network)
        own = vars(self)["_parameters"]
        if "pos_embed" in own:
            parts._parameters["pos_embed"] = own["pos_embed"]  # in functional_call no Parameter
        else:
            parts.pos_embed = self.pos_embed
        parts.compat, parts.num_modalities = self.compat, self.num_modalities
        parts._is_replica = getattr(self, "_is_replica", False)
        return parts, called_parts(network)

    def _describe(self, parts: nn.Module) -> FusionSpec:
        return describe_fusion(parts, self._spec, called_parts(parts.network))

    def _resized(self) -> bool:
        return super()._resized() or self.compat != self._spec.compat

    def forward(
        self, inputs: Inputs, masks: Masks = None, return_latent: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify token sequences; see ReferenceFusionTransformer.forward.

        Raises:
            TypeError, ValueError: inputs or masks have the wrong type, shape, dtype or device.
            BackendUnavailable: the requested backend cannot run this.
            UnsupportedLayer: a part was changed so that the kernels cannot compute it.
        """
        if isinstance(masks, bool):  # the second argument of the older variant
            masks, return_latent = None, masks
        call, backend = self._enter(inputs, masks)
        if backend == REFERENCE:
            logits, latent = self._plain(call)
        else:
            logits, latent = self._run(self._on_kernels, call, backend)
        return (logits, latent) if return_latent else logits

    def _on_kernels(self, call: Modalities, backend: str) -> tuple[Tensor, Tensor]:
        plan, tokens = pack_inputs(call.inputs, call.masks, backend)
        positions: Tensor | None = self.pos_embed
        if positions is not None:
            require_like([positions], self._parameter)
            positions = positions.to(tokens.dtype)
        rows = embed(tokens, plan, positions, 1)
        encoders = self._dense_encoders()
        if encoders is None:
            (network,) = self._networks()
            layers = [stack_layer([x], self.compat, tokens.dtype, called=True) for x in network]
            latents, _ = encode(rows, layers, plan, Views(), self.compat, backend)
        elif encoders.infers(backend, [rows, *(weights := encoders.read())]):
            latents = infer(rows, weights, encoders.networks, plan, Views(), self.compat)
        else:
            latents = train(rows, weights, encoders, plan, Views(), self.compat, backend)
        latent = latents[0, 0].to(self._parameter.dtype)
        logits = self.network[-1](latent)
        return logits.to(latent.dtype), self._returned(latent)


def called_parts(network: Any) -> tuple[str, ...]:
    """Name prefixes of the parts that a fusion model calls: the head and routed MLPs."""
    if not isinstance(network, (nn.Sequential, nn.ModuleList)):
        return ()
    routed = [
        f"network.{i}.mlp"
        for i, layer in enumerate(network)
        if isinstance(getattr(layer, "mlp", None), RoutedMLP)
    ]
    return (*routed, f"network.{len(network) - 1}")


def build_fusion(spec: FusionSizes, num_heads: int, dropout: float = 0.5) -> FusionTransformer:
    """A fusion model of these sizes with fresh parameters."""
    sparse = spec.sparse
    routed: dict[str, Any] = {}
    if sparse is not None:
        routed = {
            "num_experts": sparse.num_experts,
            "num_routers": sparse.num_routers,
            "top_k": sparse.top_k,
            "gate": sparse.gate,
        }
    fusion = FusionTransformer(
        *(spec.num_modalities, spec.hidden_dim, spec.num_classes, spec.num_layers, num_heads),
        *(dropout, spec.compat, spec.num_patches),
        mlp_sparse=sparse is not None,
        **routed,
    )
    for part in fusion.modules():
        if sparse is not None and isinstance(part, RoutedMLP):
            sparse.configure(part)
    return fusion


def set_rates(fusion: FusionTransformer, spec: FusionSpec | LayerSpec) -> None:
    """Set the dropout rates and the epsilon of the norms."""
    for encoder, rates in zip(fusion.network, spec.dropout, strict=False):
        encoder.attn.attn_drop.p = rates.attention
        encoder.attn.proj_drop.p = rates.projection
        encoder.dropout1.p = rates.residual1
        if isinstance(encoder.mlp, MLP):
            dropout: Any = encoder.mlp.network[2]
            dropout.p = rates.mlp
        encoder.dropout2.p = rates.residual2
        encoder.norm1.eps = encoder.norm2.eps = spec.norm_eps
