"""Runs of a layer and its replacement on the same inputs, with the same replacement noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec

from .agreement import Disagreement, Outputs, collect, first_line
from .calls import Case


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

    Noise of gates is 0 while `in_gate` is not empty. The layer's positions are in float64 if the noise is, which
    the published code computes in float32.
    """

    def __init__(self, noise: Sequence[Tensor], in_gate: Sequence[object] = ()) -> None:
        super().__init__()
        self.left, self.in_gate = list(noise), in_gate
        self.exact = bool(noise) and noise[0].dtype == torch.float64

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn_like, torch.rand_like) and self.in_gate:
            return torch.zeros_like(args[0])
        if func is torch.arange and self.exact and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        # Tensors that are not sequences (B, L, D) are noise of a gate, which is 0 in eval mode.
        if func is not torch.randn_like or args[0].dim() != 3:
            return func(*args, **kwargs)
        if not self.left or self.left[0].shape != args[0].shape:
            raise Disagreement("the noise is not one replacement per expert and modality")
        return self.left.pop(0)


def draw_noise(case: Case, num_experts: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(x.shape, generator=generator).to(x) for x in case.inputs]
        for _ in range(num_experts)
    ]


def call(function: Callable[..., Any], case: Case) -> Any:
    """Call with masks if the signature has them: the older variant's layer has no masks."""
    if "masks" in inspect.signature(function).parameters:
        return function(list(case.inputs), case.masks)
    if case.masks is not None:
        raise Disagreement("was called with masks, but takes none")
    return function(list(case.inputs))


def run_original(
    layer: Any,
    case: Case,
    noise: list[list[Tensor]],
    spec: LayerSpec,
    in_gate: Sequence[object] = (),
) -> Outputs:
    given = GivenNoise([x.to(case.inputs[0].dtype) for row in noise for x in row], in_gate)
    try:
        with given:
            result = call(layer.forward, case)
            if given.left:
                raise Disagreement(
                    "expected one replacement with torch.randn_like per view, got fewer"
                )
            inferred = call(layer.inference, case) if hasattr(layer, "inference") else None
    except Disagreement:
        raise
    except Exception as error:
        raise Disagreement(f"the layer's forward fails: {first_line(error)}") from error
    return collect(result, inferred, spec)


def run_fast(layer: Any, case: Case, noise: list[list[Tensor]], spec: LayerSpec) -> Outputs:
    try:
        result = layer(list(case.inputs), case.masks, replacements=noise)
        inferred = layer.inference(list(case.inputs), case.masks)
    except Exception as error:
        raise Disagreement(f"the fast layer fails: {first_line(error)}") from error
    return collect(result, inferred, spec)


def mlp_outputs(module: Any, x: Tensor, whose: str) -> Outputs:
    try:
        result = module(x)
    except Exception as error:
        raise Disagreement(f"{whose} fails: {first_line(error)}") from error
    if not isinstance(result, Tensor) or result.shape != x.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise Disagreement(f"{whose}: expected an output {tuple(x.shape)}, got {got}")
    return Outputs({"outputs": [result.double()]}, [], [])
