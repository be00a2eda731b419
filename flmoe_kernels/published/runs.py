"""Runs of a layer and its replacement on the same inputs, with the same replacement noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flmoe_kernels.layers.interaction_moe.architecture import FusionSpec, LayerSpec
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.modalities import present_modalities
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .agreement import Disagreement, Outputs, collect, first_line, losses_of_existing
from .calls import Case
from .recognise import Spec


def lift_capacity(module: nn.Module, keep: str = "") -> None:
    """Switch off capacity limits, random routing and jitter, except `keep`, so that no row is dropped."""
    for part in module.modules():
        experts = getattr(part, "tot_expert", None)
        if experts is None:
            continue
        settings = {"capacity": (float(experts),) * 2, "random_routing": False, "switch_eps": 0.0}
        for name in settings.keys() & vars(part).keys() - {keep}:
            setattr(part, name, settings[name])


class GivenNoise(TorchFunctionMode):
    """Mode in which torch.randn_like returns the given tensors, in order.

    exact: compute positions in float64, which the published code computes in float32.
    """

    def __init__(self, noise: Sequence[Tensor], exact: bool = False) -> None:
        super().__init__()
        self.left, self.exact = list(noise), exact

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.arange and self.exact and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        # Tensors that are not sequences (B, L, D) are noise of a gate, which is 0 in eval mode.
        if func is not torch.randn_like or args[0].dim() != 3:
            return func(*args, **kwargs)
        if not self.left or self.left[0].shape != args[0].shape:
            raise Disagreement("expected one call of torch.randn_like per expert and modality")
        return self.left.pop(0)


def draw_noise(case: Case, num_experts: int) -> list[list[Tensor]]:
    """Replacements by expert and modality, with the same values in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in case.inputs]
        for _ in range(num_experts)
    ]


def call(function: Callable[..., Any], case: Case, **settings: Any) -> Any:
    """Call with masks if the signature has them: the older variant's layer has no masks."""
    parameters = inspect.signature(function).parameters
    if "masks" in parameters:
        return function(list(case.inputs), case.masks, **settings)
    if case.masks is None:
        return function(list(case.inputs), **settings)
    if not any(x.kind is x.VAR_POSITIONAL for x in parameters.values()):
        raise Disagreement("was called with masks, but takes none")
    return function(list(case.inputs), case.masks, **settings)


def run(module: nn.Module, case: Case, spec: Spec) -> Outputs:
    """Outputs of the original or the swapped layer, without hooks, with the noise of `draw_noise`.

    Raises Disagreement: the module fails, draws other noise or returns something else than the published layer.
    """
    fast = isinstance(module, InteractionMoE | FusionTransformer | RoutedMLP)
    noise = draw_noise(case, spec.num_experts) if isinstance(spec, LayerSpec) else []
    given = [] if fast else [x for row in noise for x in row]
    mode = GivenNoise(given, case.inputs[0].dtype == torch.float64)
    try:
        with mode:
            if isinstance(spec, RoutedSpec):
                return _mlp_outputs(module(case.inputs[0]), case)
            if isinstance(spec, FusionSpec):
                return _fusion_outputs(module, case, spec)
            return _layer_outputs(module, case, spec, mode, {"replacements": noise} if fast else {})
    except Disagreement:
        raise
    except Exception as error:
        whose = "the fast layer" if fast else "the layer's forward"
        raise Disagreement(f"{whose} fails: {first_line(error)}") from error


def _layer_outputs(
    layer: Any, case: Case, spec: LayerSpec, mode: GivenNoise, settings: dict[str, Any]
) -> Outputs:
    result = call(layer.forward, case, **settings)
    if mode.left:
        raise Disagreement("expected one replacement with torch.randn_like per view, got fewer")
    inferred = call(layer.inference, case) if hasattr(layer, "inference") else None
    exists = present_modalities(case.inputs, case.masks)
    outputs = collect(result, inferred, spec, exists)
    if isinstance(layer, ReferenceInteractionMoE):
        return outputs
    return losses_of_existing(outputs, case.inputs[0].dtype)


def _fusion_outputs(model: Any, case: Case, spec: FusionSpec) -> Outputs:
    result = call(model.forward, case, return_latent=True)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Disagreement("the fusion model's forward does not return logits and a latent")
    losses = [] if spec.sparse is None else [model.gate_loss()]
    alone = call(model.forward, case)
    if losses:
        model.gate_loss()  # so that losses do not accumulate
    groups = {"logits": [result[0].double(), alone.double()], "latents": [result[1].double()]}
    return Outputs(groups, [], [], losses)


def _mlp_outputs(result: Any, case: Case) -> Outputs:
    shape = case.inputs[0].shape
    if not isinstance(result, Tensor) or result.shape != shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise Disagreement(f"expected an output {tuple(shape)}, got {got}")
    return Outputs({"outputs": [result.double()]}, [], [])
