"""The published layer out, the fast one in, inside any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import (
    LayerSpec,
    UnsupportedLayer,
    check_state,
    describe,
)
from flmoe_kernels.layers.routed_mlp import structure as sparse
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP

from . import compare_mlp as swap_mlp
from .compare import Case, Comparison, capture, compare
from .copies import check_can_run
from .outputs import Disagreement, first_line
from .report import LAYER_NAMES as LAYER_NAMES
from .report import LeftLayer as LeftLayer
from .report import SwappedLayer as SwappedLayer
from .report import SwappedMLP as SwappedMLP
from .report import SwapReport as SwapReport

ROOT = "(the model)"
MODULE_STATE = frozenset(vars(nn.Module()))


def swap(
    model: nn.Module, *, check: bool = True, inputs: Any = None, masks: Any = None
) -> SwapReport:
    """Replace the interaction layers and sparse MLPs in a model by fast ones that share their parameters.

    Layers are found by class name (InteractionMoE, ReferenceInteractionMoE, FMoETransformerMLP) and
    structure wherever the model, or a list or dict that a module holds, refers to them; one that is
    held in several places is replaced by one object. The fast layer has the same parameter objects,
    so an optimizer made before keeps working, the same train or eval mode, attributes and hooks. A
    layer that is not supported, or on which the two disagree, is left exactly as it was, with the
    reason. Swap before torch.compile. The parts inside the fast layer are the reference's, which
    hold the parameters; the published attention's `last_attn` is not among them: no map is ever
    stored. A FMoETransformerMLP outside of an interaction layer becomes a RoutedMLP; how its gates
    differ from the published ones is told in docs/fastmoe.md.

    Args:
        model: any module; when it is itself the layer, use `report.model` afterwards.
        check: compare each layer with its replacement first (see `swap_check.compare`).
        inputs: what to run the model on, so that each layer is compared on its own inputs: a tuple
            of positional arguments, a dict of keyword arguments, or one argument that is neither. A
            layer that is not reached is compared on random inputs, as all are without this. Where a
            layer runs FastMoE's own code and is not on a CUDA device the model is not run, which
            would end the process: that layer is left, and the others are compared on random inputs.
        masks: passed to the model as `masks=`, when given.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: model is not a module.
        Exception: whatever the model raises on the given inputs; nothing has been replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    holder = [model]
    found: dict[int, list[_Site]] = {}
    for site in _sites(model, "", partial(holder.__setitem__, 0), None, set()):
        if _is_candidate(site.module):
            found.setdefault(id(site.module), []).append(site)
    outcomes: list[SwappedLayer | SwappedMLP | LeftLayer] = []
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        calls = _calls(model, found, inputs, masks) if check and inputs is not None else {}
        for sites in found.values():
            outcomes.append(_replace(sites, check, calls.get(id(sites[0].module))))
    return SwapReport(
        holder[0],
        swapped=tuple(entry for entry in outcomes if isinstance(entry, SwappedLayer)),
        left=tuple(entry for entry in outcomes if isinstance(entry, LeftLayer)),
        swapped_mlps=tuple(entry for entry in outcomes if isinstance(entry, SwappedMLP)),
    )


def _replace(
    sites: list[_Site], check: bool, case: Case | None
) -> SwappedLayer | SwappedMLP | LeftLayer:
    """Put a fast layer in every place of one layer, or nothing in any."""
    layer, name = sites[0].module, ", ".join(site.path or ROOT for site in sites)
    inputs = "-" if not check else "random" if case is None else "given"
    entry: SwappedLayer | SwappedMLP
    fast: nn.Module
    try:
        spec = _supported(sites)
        if isinstance(spec, LayerSpec):
            result = compare(layer, spec, InteractionMoE.adopt, case) if check else None
            fast, entry = InteractionMoE.adopt(layer), _entry(name, spec, result, inputs)
        else:
            found = swap_mlp.compare(layer, spec, RoutedMLP.adopt, case) if check else None
            fast, entry = RoutedMLP.adopt(layer), _mlp_entry(name, spec, found, inputs)
    except (UnsupportedLayer, sparse.UnsupportedMLP, Disagreement) as reason:
        return LeftLayer(name, type(layer).__name__, str(reason))
    except Exception as error:
        # Whatever the layer's own code raises on a copy is a reason to leave it, not to stop.
        return LeftLayer(name, type(layer).__name__, f"the check failed: {first_line(error)}")
    _take_over(layer, fast)
    for site in sites:
        site.assign(fast)
    return entry


def _entry(name: str, spec: LayerSpec, result: Comparison | None, inputs: str) -> SwappedLayer:
    errors = {} if result is None else result.errors
    return SwappedLayer(
        name=name,
        compat=spec.compat,
        experts=spec.num_experts,
        inputs=inputs,
        logits_error=errors.get("logits"),
        weights_error=errors.get("weights"),
        latents_error=errors.get("latents"),
        losses_error=errors.get("losses"),
        speed_up=None if result is None else result.speed_up,
    )


def _mlp_entry(
    name: str, spec: sparse.RoutedSpec, result: Comparison | None, inputs: str
) -> SwappedMLP:
    return SwappedMLP(
        name=name,
        gate=spec.gate,
        experts=spec.num_expert,
        top_k=spec.top_k,
        inputs=inputs,
        output_error=None if result is None else result.errors["outputs"],
        speed_up=None if result is None else result.speed_up,
    )


@dataclasses.dataclass(frozen=True)
class _Site:
    """One place that refers to a module, with what puts another module there."""

    path: str
    module: nn.Module
    assign: Callable[[nn.Module], None]
    parent: nn.Module | None


def _sites(
    value: Any,
    path: str,
    assign: Callable[[Any], None],
    parent: nn.Module | None,
    seen: set[int],
) -> Iterator[_Site]:
    """Every place at and below value that refers to a module, but for those inside a candidate."""
    if isinstance(value, nn.Module):
        yield _Site(path, value, assign, parent)
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        if _is_candidate(value):
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
    for key, child, held_by in inside:
        if not isinstance(child, nn.Module | list | dict):
            continue
        below = f"{path}.{key}" if path else str(key)
        yield from _sites(child, below, partial(held_by.__setitem__, key), parent, seen)


def _is_candidate(module: nn.Module) -> bool:
    names = {base.__name__ for base in type(module).__mro__}
    return not names.isdisjoint((*LAYER_NAMES, sparse.SPARSE_MLP))


def _supported(sites: list[_Site]) -> LayerSpec | sparse.RoutedSpec:
    """The description of a layer that may be replaced; UnsupportedLayer or -MLP with the reason if not."""
    layer = sites[0].module
    if isinstance(layer, InteractionMoE):
        raise UnsupportedLayer("already fast")
    name = type(layer).__name__
    if name not in (*LAYER_NAMES, sparse.SPARSE_MLP):
        raise UnsupportedLayer("a subclass of the layer, whose own methods would be lost")
    if any(type(site.parent).__name__ == "OptimizedModule" for site in sites):
        raise UnsupportedLayer("the layer is compiled: swap first, then compile")
    if name == sparse.SPARSE_MLP:
        sparse.check_state(layer)
        return sparse.describe(layer)
    spec = describe(layer)
    check_state(layer)
    return spec


def _calls(
    model: nn.Module, found: dict[int, list[_Site]], inputs: Any, masks: Any
) -> dict[int, Case]:
    """The first call of every supported layer when the model runs on the given inputs; none if it must not."""
    layers = []
    for sites in found.values():
        if not _can_run(sites[0].module):
            return {}
        try:
            _supported(sites)
        except (UnsupportedLayer, sparse.UnsupportedMLP):
            continue
        layers.append(sites[0].module)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, dict) else {}
    if masks is not None:
        kwargs["masks"] = masks
    return capture(model, layers, args, kwargs) if layers else {}


def _can_run(layer: nn.Module) -> bool:
    if next(layer.parameters(), None) is None:
        return True
    try:
        check_can_run(layer)
    except sparse.UnsupportedMLP:
        return False
    return True


def _take_over(layer: nn.Module, fast: nn.Module) -> None:
    """Give the fast layer the hooks and plain attributes of the layer.

    The dictionaries of hooks move as they are, so that handles made before the swap still remove
    their hooks. Hooks that torch bound to the layer are bound to the fast one.
    """
    for name in MODULE_STATE:
        hooks = layer.__dict__[name]
        if name.endswith("_hook"):
            fast.__dict__[name] = hooks
        elif "_hooks" in name:
            hooks.update(fast.__dict__[name])
            fast.__dict__[name] = hooks
    bound = fast.__dict__["_load_state_dict_pre_hooks"]
    for key, hook in bound.items():
        if getattr(hook, "with_module", False):
            bound[key] = type(hook)(hook.hook, fast)
    for name, value in vars(layer).items():
        if not name.startswith("_") and not hasattr(fast, name):
            fast.__dict__[name] = value
