"""Search for published layers inside a model, and for every place that refers to one."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import REGRESSION
from flmoe_kernels.layers.parts import joined
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP

LAYER_NAMES = (InteractionMoE.__name__, ReferenceInteractionMoE.__name__, REGRESSION)
FUSION_NAMES = ("Transformer", "FusionTransformer", "ReferenceFusionTransformer")
MODULE_STATE = frozenset(vars(nn.Module()))
# Objects inside objects are searched to this depth, apart from modules, lists, tuples and dicts.
MOST_NESTED = 3

Assign = Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Place:
    """An attribute or element that refers to a module."""

    path: str  # inside the model, empty for the model itself
    module: nn.Module
    assign: Assign | None  # replaces the module; None if the place cannot be changed
    parent: nn.Module | None  # the module that holds it, None for the model itself
    held: str = ""  # if the place cannot be changed, what holds the module


def find_layers(model: nn.Module, assign: Assign) -> list[list[Place]]:
    """Find interaction layers, fusion models and sparse MLPs outside of them, and every place that refers to one.

    Layers are recognised by class name, fusion models also by their structure. A sparse MLP in a fusion model
    follows the fusion model. The search includes attributes and hooks of modules, and what containers,
    functions, methods and other objects refer to. Only attributes of modules, lists and dicts can be changed.
    assign: receives a replacement of the model itself.
    """
    layers: dict[int, list[Place]] = {}
    for place in _places(Place("", model, assign, None), 0, {}):
        if is_layer(place.module) or is_fusion(place.module):
            layers.setdefault(id(place.module), []).append(place)
    return list(layers.values())


def is_fusion(module: nn.Module) -> bool:
    """Whether this is a fusion model by name and structure; other libraries have a Transformer, too."""
    network = getattr(module, "network", None)
    named = any(base.__name__ in FUSION_NAMES for base in type(module).__mro__)
    if not named or not isinstance(network, nn.Sequential | nn.ModuleList) or not network:
        return False
    layer = ("norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "mlp")
    return _has(network[0], *layer) and _has(network[-1], "fc")


def _has(module: nn.Module, *paths: str) -> bool:
    parts = dict(module.named_modules())
    return all(path in parts for path in paths)


def is_layer(module: nn.Module) -> bool:
    names = {base.__name__ for base in type(module).__mro__}
    if isinstance(module, torch.jit.ScriptModule):
        names.add(str(module.original_name))
    return not names.isdisjoint((*LAYER_NAMES, SPARSE_MLP))


def _places(at: Any, depth: int, seen: dict[int, Any]) -> Iterator[Place]:
    """Yield every place at and below `at` that refers to a module, except places inside of a layer.

    at: a Place, whose `module` may be any object here. seen: keeps the objects alive, so that no id occurs twice.
    """
    value = at.module
    is_module = isinstance(value, nn.Module)
    if is_module:
        yield at
    if id(value) in seen or (is_module and is_layer(value)):
        return
    seen[id(value)] = value
    parent = value if is_module else at.parent
    if not isinstance(value, nn.Module | list | dict | tuple | set | frozenset | deque):
        depth += 1
    if depth > MOST_NESTED:
        return
    for name, child, assign, held in _inside(value):
        if not isinstance(child, _LEAVES):
            path = joined(at.path, name) if name else at.path
            yield from _places(Place(path, child, assign, parent, held), depth, seen)


_LEAVES = (
    *(torch.Tensor, torch.dtype, torch.device, type, types.ModuleType, types.BuiltinFunctionType),
    *(str, bytes, int, float, complex, type(None)),
)
_Inside = Iterator[tuple[str, Any, "Assign | None", str]]


def _inside(value: Any) -> _Inside:
    """Yield name, object, function that replaces it, and if there is none, what holds it."""
    if isinstance(value, nn.Module):
        for key, child in list(value._modules.items()):
            yield key, child, partial(value._modules.__setitem__, key), ""
        if isinstance(
            value, torch.jit.ScriptModule
        ):  # its other attributes refer to the original model
            return
        for key, child in list(vars(value).items()):
            if key not in MODULE_STATE:
                yield key, child, partial(value.__dict__.__setitem__, key), ""
            elif "_hooks" in key:
                yield from ((key, hook, None, "held by a hook") for hook in child.values())
    elif isinstance(value, dict):
        for key, child in list(value.items()):
            yield str(key), child, partial(value.__setitem__, key), ""
    elif isinstance(value, list | deque):
        for number, child in enumerate(value):
            yield str(number), child, partial(value.__setitem__, number), ""
    elif isinstance(value, tuple | set | frozenset):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        for name, child in zip(names, value, strict=True):
            yield name, child, None, f"in a {type(value).__name__}"
    elif isinstance(value, types.MethodType):
        yield "", value.__self__, None, f"held by its method {value.__func__.__name__}"
    elif isinstance(value, functools.partial):
        yield "func", value.func, None, "held by a functools.partial"
        yield "args", value.args, None, ""
        yield "keywords", value.keywords, None, ""
    elif isinstance(value, types.FunctionType):
        held = f"held by the function {value.__qualname__}"
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with_content = cell.cell_contents if _is_filled(cell) else None
            yield name, with_content, None, held
        yield "", value.__defaults__, None, ""
        yield "", value.__kwdefaults__, None, ""
    else:
        for name, child in _attributes(value).items():
            yield name, child, None, f"held by a {type(value).__name__}, which is no module"


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


def _attributes(value: Any) -> dict[str, Any]:
    slots = [getattr(base, "__slots__", ()) for base in type(value).__mro__]
    names = [name for names in slots for name in ((names,) if isinstance(names, str) else names)]
    held = {name: getattr(value, name, None) for name in names if not name.startswith("__")}
    own = getattr(value, "__dict__", None)
    return held | (dict(own) if isinstance(own, dict) else {})
