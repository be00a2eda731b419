"""Recognition of published layers inside a model, and of unsupported state.

`layers` describes what a layer computes. This module checks for state that a replacement would lose: methods of
subclasses, hooks on inner parts, modes, compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.layers.parts import UnsupportedLayer, joined
from flmoe_kernels.layers.routed_mlp import structure as routed_mlp
from flmoe_kernels.layers.routed_mlp.state import add_router_0, prepare_state_dict
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP, RoutedSpec

LAYER_NAMES = (InteractionMoE.__name__, ReferenceInteractionMoE.__name__)
MODULE_STATE = frozenset(vars(nn.Module()))
FASTMOE = "fmoe"


@dataclasses.dataclass(frozen=True)
class Place:
    """An attribute or element that refers to a module.

    Attributes:
        path: name inside the model, empty for the model itself.
        module: the module.
        assign: replaces the module.
        parent: the module that holds it, None for the model itself.
    """

    path: str
    module: nn.Module
    assign: Callable[[nn.Module], None]
    parent: nn.Module | None


def find_layers(model: nn.Module, assign: Callable[[nn.Module], None]) -> list[list[Place]]:
    """Find all interaction layers, sparse MLPs outside of them, and every place that refers to such a layer.

    Layers are recognised by class name. The search includes modules and their lists and dicts.

    Args:
        model: the model.
        assign: receives a replacement of the model itself.
    """
    layers: dict[int, list[Place]] = {}
    for place in _places(model, "", assign, None, set()):
        if _is_layer(place.module):
            layers.setdefault(id(place.module), []).append(place)
    return list(layers.values())


def _places(
    value: Any,
    path: str,
    assign: Callable[[Any], None],
    parent: nn.Module | None,
    seen: set[int],
) -> Iterator[Place]:
    """Yield every place at and below value that refers to a module, except places inside of a layer."""
    if isinstance(value, nn.Module):
        yield Place(path, value, assign, parent)
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        if _is_layer(value):
            return
        inside: list[tuple[Any, Any, dict | list]] = [
            (key, child, value.__dict__)
            for key, child in vars(value).items()
            if key not in MODULE_STATE
        ]
        inside += [(key, child, value._modules) for key, child in value._modules.items()]
        parent = value
    else:
        keyed = enumerate(value) if isinstance(value, list) else value.items()
        inside = [(key, child, value) for key, child in keyed]
    for key, child, holder in inside:
        if not isinstance(child, nn.Module | list | dict):
            continue
        below = f"{path}.{key}" if path else str(key)
        yield from _places(child, below, partial(holder.__setitem__, key), parent, seen)


def _is_layer(module: nn.Module) -> bool:
    names = {base.__name__ for base in type(module).__mro__}
    return not names.isdisjoint((*LAYER_NAMES, SPARSE_MLP))


def recognise(places: list[Place]) -> LayerSpec | RoutedSpec:
    """Describe a layer that a fast layer can replace in all of these places.

    Raises:
        UnsupportedLayer: the layer cannot be replaced; the message is the reason.
    """
    layer = places[0].module
    if isinstance(layer, InteractionMoE):
        raise UnsupportedLayer("already fast")
    name = type(layer).__name__
    if name not in (*LAYER_NAMES, SPARSE_MLP):
        raise UnsupportedLayer("a subclass of the layer, whose own methods would be lost")
    if any(type(place.parent).__name__ == "OptimizedModule" for place in places):
        raise UnsupportedLayer("the layer is compiled: swap first, then compile")
    check_state(layer)
    return routed_mlp.describe(layer) if name == SPARSE_MLP else describe(layer)


def check_state(layer: nn.Module) -> None:
    """Check for state that a fast layer would not keep.

    Raises:
        UnsupportedLayer: the layer was compiled in place, a part has a hook or a replaced forward, or a part
            whose mode matters is in a different mode than the layer.
    """
    if getattr(layer, "_compiled_call_impl", None) is not None:
        raise UnsupportedLayer("the layer is compiled: swap first, then compile")
    every_mode_matters = type(layer).__name__ == SPARSE_MLP
    for name, part in layer.named_modules():
        if "forward" in vars(part):
            raise UnsupportedLayer(f"{joined(name, 'forward')}: replaced on this instance")
        if part is layer:
            continue
        if _has_hook(part):
            raise UnsupportedLayer(
                f"{name}: carries a hook, which would never run, because the fast layer does not "
                "call its parts"
            )
        mode_matters = (
            every_mode_matters
            or isinstance(part, nn.Dropout)
            or ".mlp.gate" in name
            or ".all_gates." in name
        )
        if mode_matters and part.training != layer.training:
            raise UnsupportedLayer(
                f"{name}: in {_mode(part)} mode while the layer is in {_mode(layer)} mode; the "
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


def _mode(module: nn.Module) -> str:
    return "train" if module.training else "eval"


def check_can_run(layer: nn.Module) -> None:
    """Check the device, because FastMoE's kernels do not: a CPU tensor crashes the process.

    Raises:
        UnsupportedLayer: the layer has parts from the fmoe package and is not on a CUDA device.
    """
    first = next(layer.parameters(), None)
    if first is None or first.is_cuda:
        return
    for name, part in layer.named_modules():
        if type(part).__module__.split(".")[0] == FASTMOE:
            raise UnsupportedLayer(
                f"{name}: FastMoE's own code runs only on a CUDA device, so the layers cannot be compared; move "
                "the model to a CUDA device before the swap, or pass check=False"
            )
