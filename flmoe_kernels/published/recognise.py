"""Recognition of layers that a fast layer can replace, and of unsupported state.

`layers` describes what a layer computes and checks its parts. This module checks for state that a replacement
would lose: methods of subclasses, hooks on state_dicts, modes, compilation.
"""

from __future__ import annotations

import torch
from torch import nn

from flmoe_kernels.layers.interaction_moe.architecture import FusionSpec, LayerSpec
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import REGRESSION, describe, describe_fusion
from flmoe_kernels.layers.parts import UnsupportedLayer, check_methods
from flmoe_kernels.layers.routed_mlp import structure as routed_mlp
from flmoe_kernels.layers.routed_mlp.state import add_router_0, prepare_state_dict
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP, RoutedSpec

from .places import FUSION_NAMES, LAYER_NAMES, Place

FASTMOE = "fmoe"
Spec = LayerSpec | FusionSpec | RoutedSpec
_NOT_COMPARED = {"replacement": "noise", "num_perturbed": None, "interaction_loss": True}


def recognise(places: list[Place]) -> Spec:
    """Describe a layer that a fast layer can replace in all of these places; UnsupportedLayer has the reason."""
    layer = places[0].module
    if isinstance(layer, InteractionMoE | FusionTransformer):
        raise UnsupportedLayer("already fast")
    for option in _NOT_COMPARED if isinstance(layer, ReferenceInteractionMoE) else ():
        if (value := getattr(layer, option)) != _NOT_COMPARED[option]:
            raise UnsupportedLayer(
                f"swap cannot compare a layer with {option}={value!r}; use "
                f"{REGRESSION if layer.regression else LAYER_NAMES[0]}.adopt(layer)"
            )
    name = type(layer).__name__
    if isinstance(layer, torch.jit.ScriptModule):
        raise UnsupportedLayer("a ScriptModule: swap first, then script or trace the model")
    if name not in (*LAYER_NAMES, *FUSION_NAMES, SPARSE_MLP):
        raise UnsupportedLayer("a subclass of the layer, whose own methods would be lost")
    if any(type(place.parent).__name__ == "OptimizedModule" for place in places):
        raise UnsupportedLayer("the layer is compiled: swap first, then compile")
    for place in places:
        if place.assign is None:
            raise UnsupportedLayer(
                f"{place.path}: {place.held}; only layers that modules, lists and dicts hold can be replaced"
            )
    spec: Spec
    if name == SPARSE_MLP:
        check_methods(layer, "")
        spec = routed_mlp.describe(layer)
    else:
        spec = describe_fusion(layer) if name in FUSION_NAMES else describe(layer)
    check_state(layer)
    return spec


def check_state(layer: nn.Module) -> None:
    """Check for state that a fast layer would not keep: compilation, hooks and modes of the parts."""
    if getattr(layer, "_compiled_call_impl", None) is not None:
        raise UnsupportedLayer("the layer is compiled: swap first, then compile")
    mode = ("eval", "train")
    every_mode_matters = type(layer).__name__ == SPARSE_MLP
    for name, part in layer.named_modules():
        if part is layer:
            continue
        if _has_hook(part):
            raise UnsupportedLayer(
                f"{name}: has a hook, which would never run, because the fast layer has new parts"
            )
        mode_matters = (
            every_mode_matters
            or isinstance(part, nn.Dropout)
            or ".mlp.gate" in name
            or ".all_gates." in name
        )
        if mode_matters and part.training != layer.training:
            raise UnsupportedLayer(
                f"{name}: in {mode[part.training]} mode while the layer is in {mode[layer.training]} mode; the "
                "fast layer has one mode for all its parts"
            )


def _has_hook(part: nn.Module) -> bool:
    """Whether a part has a hook other than those of RoutedMLP's state_dict."""
    return any(
        getattr(hook, "hook", hook) not in (prepare_state_dict, add_router_0)
        for key, hooks in vars(part).items()
        if "_hooks" in key and hooks
        for hook in hooks.values()
    )


def check_can_run(layer: nn.Module) -> None:
    """Check the device, because FastMoE's kernels do not: a CPU tensor crashes the process."""
    first = next(layer.parameters(), None)
    if first is None or first.is_cuda:
        return
    for name, part in layer.named_modules():
        if type(part).__module__.split(".")[0] == FASTMOE:
            raise UnsupportedLayer(
                f"{name}: FastMoE's own code runs only on a CUDA device, so the layers cannot be compared; move "
                "the model to a CUDA device before the swap, or pass check=False"
            )
