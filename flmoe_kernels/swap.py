"""The published layer out, the fast one in, inside any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .interaction_moe.module import InteractionMoE
from .interaction_moe.reference import ReferenceInteractionMoE
from .interaction_moe.structure import (
    SPARSE_MLP,
    LayerSpec,
    UnsupportedLayer,
    check_state,
    describe,
)
from .swap_check import Case, Comparison, capture, compare
from .swap_outputs import Disagreement, first_line

if TYPE_CHECKING:
    from rich.console import RenderableType

LAYER_NAMES = (InteractionMoE.__name__, ReferenceInteractionMoE.__name__)
ROOT = "(the model)"
MODULE_STATE = frozenset(vars(nn.Module()))
NOTE = (
    "Errors are the largest absolute differences from the original in float64. How much faster is "
    "indicative: a few inference calls on the inputs of the check."
)


@dataclasses.dataclass(frozen=True)
class SwappedLayer:
    """One layer that was replaced; name lists every place that held it.

    inputs says what the two were compared on: "random", "given", or "-" for nothing. Errors are the
    largest absolute differences from the original run in float64; None where
    nothing was checked, and latents_error where the variant returns no latents. speed_up is
    indicative, None where nothing was timed.
    """

    name: str
    compat: str
    experts: int
    inputs: str
    logits_error: float | None
    weights_error: float | None
    latents_error: float | None
    losses_error: float | None
    speed_up: float | None


@dataclasses.dataclass(frozen=True)
class LeftLayer:
    """One module that was recognised and left exactly as it was."""

    name: str
    class_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What `swap` did.

    Attributes:
        model: what to use from now on: the given model, or the fast layer when the model was itself
            the layer.
        swapped: the layers that were replaced.
        left: the modules that were recognised and left, with the reason.
    """

    model: nn.Module
    swapped: tuple[SwappedLayer, ...]
    left: tuple[LeftLayer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain values for JSON."""
        return {
            "swapped": [dataclasses.asdict(entry) for entry in self.swapped],
            "left": [dataclasses.asdict(entry) for entry in self.left],
        }

    def __str__(self) -> str:
        blocks = [self._summary()]
        for columns, rows in self._tables():
            table = [columns, *rows]
            widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
            lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
            blocks.append("\n".join(lines))
        return "\n\n".join([*blocks, NOTE] if self.swapped else blocks)

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [Text(self._summary())]
        for columns, rows in self._tables():
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for i, column in enumerate(columns):
                table.add_column(column, overflow="fold", no_wrap=0 < i < len(columns) - 1)
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            parts.append(table)
        if self.swapped:
            parts.append(Text(NOTE, style="dim"))
        return Group(*parts)

    def _summary(self) -> str:
        if not self.swapped and not self.left:
            return (
                f"Nothing to swap: no module named {' or '.join(LAYER_NAMES)} in this "
                f"{type(self.model).__name__}."
            )
        number = len(self.swapped)
        return f"{number} layer{'' if number == 1 else 's'} swapped, {len(self.left)} left as is."

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        if self.swapped:
            columns = ["swapped", "variant", "experts", "inputs"]
            columns += ["logits", "weights", "latents", "losses", "faster"]
            yield columns, [_cells(entry) for entry in self.swapped]
        if self.left:
            yield (
                ["left", "class", "reason"],
                [[entry.name, entry.class_name, entry.reason] for entry in self.left],
            )


def _cells(entry: SwappedLayer) -> list[str]:
    errors = (
        entry.logits_error,
        entry.weights_error,
        entry.latents_error,
        entry.losses_error,
    )
    return [
        entry.name,
        entry.compat,
        str(entry.experts),
        entry.inputs,
        *("-" if error is None else f"{error:.1e}" for error in errors),
        "-" if entry.speed_up is None else f"{entry.speed_up:.1f}x",
    ]


def swap(
    model: nn.Module, *, check: bool = True, inputs: Any = None, masks: Any = None
) -> SwapReport:
    """Replace the interaction layers in a model by fast ones that share their parameters.

    Layers are found by class name (InteractionMoE, ReferenceInteractionMoE) and structure wherever
    the model, or a list or dict that a module holds, refers to them; one that is held in several
    places is replaced by one object. The fast layer has the same parameter objects, so an optimizer
    made before keeps working, the same train or eval mode, attributes and hooks. A layer that is
    not supported, or on which the two disagree, is left exactly as it was, with the reason. Swap
    before torch.compile. The parts inside the fast layer are the reference's, which hold the
    parameters; the published attention's `last_attn` is not among them: no map is ever stored.

    Args:
        model: any module; when it is itself the layer, use `report.model` afterwards.
        check: compare each layer with its replacement first (see `swap_check.compare`).
        inputs: what to run the model on, so that each layer is compared on its own inputs: a tuple
            of positional arguments, a dict of keyword arguments, or one argument that is neither. A
            layer that is not reached is compared on random inputs, as all are without this.
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
    swapped: list[SwappedLayer] = []
    left: list[LeftLayer] = []
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        calls = _calls(model, found, inputs, masks) if check and inputs is not None else {}
        for sites in found.values():
            outcome = _replace(sites, check, calls.get(id(sites[0].module)))
            if isinstance(outcome, SwappedLayer):
                swapped.append(outcome)
            else:
                left.append(outcome)
    return SwapReport(holder[0], tuple(swapped), tuple(left))


def _replace(sites: list[_Site], check: bool, case: Case | None) -> SwappedLayer | LeftLayer:
    """Put a fast layer in every place of one layer, or nothing in any."""
    layer, name = sites[0].module, ", ".join(site.path or ROOT for site in sites)
    try:
        spec = _supported(sites)
        result = compare(layer, spec, InteractionMoE.adopt, case) if check else None
        fast = InteractionMoE.adopt(layer)
    except (UnsupportedLayer, Disagreement) as reason:
        return LeftLayer(name, type(layer).__name__, str(reason))
    except Exception as error:
        # Whatever the layer's own code raises on a copy is a reason to leave it, not to stop.
        return LeftLayer(name, type(layer).__name__, f"the check failed: {first_line(error)}")
    _take_over(layer, fast)
    for site in sites:
        site.assign(fast)
    return _entry(name, spec, result, case)


def _entry(
    name: str, spec: LayerSpec, result: Comparison | None, case: Case | None
) -> SwappedLayer:
    errors = {} if result is None else result.errors
    inputs = "-" if result is None else "random" if case is None else "given"
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
    return not names.isdisjoint((*LAYER_NAMES, SPARSE_MLP))


def _supported(sites: list[_Site]) -> LayerSpec:
    """The description of a layer that may be replaced; UnsupportedLayer with the reason if not."""
    layer = sites[0].module
    if isinstance(layer, InteractionMoE):
        raise UnsupportedLayer("already fast")
    name = type(layer).__name__
    if any(base.__name__ == SPARSE_MLP for base in type(layer).__mro__):
        raise UnsupportedLayer(f"a sparse MLP; the fast {SPARSE_MLP} is not part of this version")
    if name not in LAYER_NAMES:
        raise UnsupportedLayer("a subclass of the layer, whose own methods would be lost")
    if any(type(site.parent).__name__ == "OptimizedModule" for site in sites):
        raise UnsupportedLayer("the layer is compiled: swap first, then compile")
    spec = describe(layer)
    check_state(layer)
    return spec


def _calls(
    model: nn.Module, found: dict[int, list[_Site]], inputs: Any, masks: Any
) -> dict[int, Case]:
    """The first call of every supported layer when the model runs on the given inputs."""
    layers = []
    for sites in found.values():
        try:
            _supported(sites)
        except UnsupportedLayer:
            continue
        layers.append(sites[0].module)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, dict) else {}
    if masks is not None:
        kwargs["masks"] = masks
    return capture(model, layers, args, kwargs) if layers else {}


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
