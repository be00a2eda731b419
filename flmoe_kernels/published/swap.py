"""Published layers replaced by fast ones, inside any model or in a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flmoe_kernels.layers.interaction_moe.architecture import Architecture, LayerSpec
from flmoe_kernels.layers.parts import UnsupportedLayer

from .agreement import Disagreement, first_line
from .calls import Case, capture
from .compare import Comparison, compare
from .convert import adopt, convert_state, make_layer, take_over
from .file import CheckpointError, read, target_of, write
from .infer import in_words, infer, infer_settings
from .recognise import Place, check_can_run, find_layers, recognise
from .report import LeftLayer, SwappedLayer, SwappedMLP, SwapReport

ROOT = "(the model)"


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
    stored. A FMoETransformerMLP outside of an interaction layer becomes a RoutedMLP; docs/fastmoe.md
    states how its gates differ from the published ones.

    Args:
        model: any module; when it is itself the layer, use `report.model` afterwards.
        check: compare each layer with its replacement first (see `compare`).
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
    layers = find_layers(model, partial(holder.__setitem__, 0))
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        calls = _calls(model, layers, inputs, masks) if check and inputs is not None else {}
        outcomes = [_replace(places, check, calls.get(id(places[0].module))) for places in layers]
    return SwapReport(
        holder[0],
        swapped=tuple(entry for entry in outcomes if isinstance(entry, SwappedLayer)),
        left=tuple(entry for entry in outcomes if isinstance(entry, LeftLayer)),
        swapped_mlps=tuple(entry for entry in outcomes if isinstance(entry, SwappedMLP)),
    )


def _calls(model: nn.Module, layers: list[list[Place]], inputs: Any, masks: Any) -> dict[int, Case]:
    """The first call of every supported layer when the model runs on the inputs; none if it must not run."""
    supported = []
    for places in layers:
        try:
            check_can_run(places[0].module)
        except UnsupportedLayer:
            return {}
        try:
            recognise(places)
        except UnsupportedLayer:
            continue
        supported.append(places[0].module)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, dict) else {}
    if masks is not None:
        kwargs["masks"] = masks
    return capture(model, supported, args, kwargs) if supported else {}


def _replace(
    places: list[Place], check: bool, case: Case | None
) -> SwappedLayer | SwappedMLP | LeftLayer:
    """Put a fast layer in every place of one layer, or nothing in any."""
    layer, name = places[0].module, ", ".join(place.path or ROOT for place in places)
    inputs = "-" if not check else "random" if case is None else "given"
    entry: SwappedLayer | SwappedMLP
    try:
        spec = recognise(places)
        result = compare(layer, spec, case) if check else Comparison({}, None)
        if isinstance(spec, LayerSpec):
            entry = SwappedLayer.of(name, spec, inputs, result)
        else:
            entry = SwappedMLP.of(name, spec, inputs, result)
        fast = adopt(layer, spec)
    except (UnsupportedLayer, Disagreement) as reason:
        return LeftLayer(name, type(layer).__name__, str(reason))
    except Exception as error:
        # Whatever the layer's own code raises on a copy is a reason to leave it, not to stop.
        return LeftLayer(name, type(layer).__name__, f"the check failed: {first_line(error)}")
    take_over(layer, fast)
    for place in places:
        place.assign(fast)
    return entry


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `swap_checkpoint` did: the written file, the settings, and the report of the check."""

    source: Path
    out: Path
    architecture: Architecture
    num_heads: int
    temperature: float
    report: SwapReport

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "architecture": dataclasses.asdict(self.architecture),
            "num_heads": self.num_heads,
            "temperature": self.temperature,
            **self.report.as_dict(),
        }

    def summary(self) -> str:
        """What was read, the settings that no checkpoint holds, and what was written."""
        settings = f"{self.num_heads} heads, temperature {self.temperature:g}"
        sparse = self.architecture.sparse
        if sparse is not None:
            settings += f", top {sparse.top_k} of a {sparse.gate}"
        return (
            f"Read {self.source}: {in_words(self.architecture)}.\n"
            f"Settings, which parameters may not show: {settings}.\nWrote {self.out}."
        )


def swap_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    temperature: float | None = None,
    gate: str | None = None,
    top_k: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Check that the fast layer computes the same as a checkpoint's; write it with its settings.

    The written file holds {"ensemble_model": state_dict, "flmoe_config": settings} and what else
    the checkpoint held; it loads in the published layer as well. It appears whole or not at all.

    Args:
        path, gate, top_k: see `load_checkpoint`.
        num_heads, temperature: see `load_layer`.
        out: file to write, .safetensors or torch.save's format; default beside the checkpoint, with
            the suffix .flmoe.pt.

    Raises:
        CheckpointError: as load_layer, the two layers disagree, or the file cannot be written.
    """
    file = read(Path(path))
    architecture = infer(file, gate, top_k)
    state = convert_state(file, architecture)
    heads, scale = infer_settings(file, num_heads, temperature)
    target = target_of(file, out)
    report = swap(make_layer(file.path, state, architecture, heads, scale))
    if report.left:
        raise CheckpointError(path, f"not converted: {report.left[0].reason}")
    config = {**dataclasses.asdict(architecture), "num_heads": heads, "temperature": scale}
    write(target, dataclasses.replace(file, state_dict=state), config)
    return Conversion(file.path, target, architecture, heads, scale, report)
