"""Replacement of published layers by fast layers, in models and checkpoints."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flmoe_kernels.layers.interaction_moe.architecture import Architecture
from flmoe_kernels.layers.interaction_moe.variants import variant_of
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .agreement import Disagreement, first_line
from .calls import Case, capture, kept_random_states
from .compare import Comparison, compare
from .convert import adopt, convert_state, make_layer, take_over
from .differences import Difference
from .file import CheckpointError, read, target_of, write
from .infer import in_words, infer, infer_settings
from .layout import listed
from .places import Place, find_layers
from .recognise import check_can_run, recognise
from .report import (
    LeftLayer,
    Swapped,
    SwappedFusion,
    SwappedLayer,
    SwappedMLP,
    SwapReport,
    entry_of,
)
from .source import lost_members, unrecognised

ROOT = "(the model)"


def swap(
    model: nn.Module,
    *,
    check: bool = True,
    strict: bool = True,
    inputs: Any = None,
    masks: Any = None,
) -> SwapReport:
    """Replace interaction layers, fusion models and sparse MLPs by fast ones that share their parameters.

    Layers are recognised by class name (InteractionMoE, InteractionMoERegression, ReferenceInteractionMoE,
    FMoETransformerMLP, and Transformer with the structure of the published fusion model) and structure,
    wherever the model, or a list or dict of a module, refers to them. A layer that is held in several places
    is replaced by a single object; it is not replaced if one of them cannot be changed (a tuple, a set, a
    function, a method, an object that is no module). The fast layer has the same parameter objects, so an
    existing optimizer keeps working; it also has the same mode, attributes and hooks. A layer that is not
    supported, or whose results differ, is not changed, and the report has the reason. Swap before
    torch.compile. The submodules of the fast layer are those of the reference and hold the parameters.
    Attention maps are stored only while `capture_attn` is set. A fusion model outside of an interaction layer
    becomes a FusionTransformer, any other FMoETransformerMLP a RoutedMLP; docs/fastmoe.md lists how its gates
    differ from the published gates.

    Args:
        model: any module; if it is itself the layer, use `report.model` afterwards.
        check: compare each layer with its replacement first, in eval mode (see `compare`).
        strict: do not replace a layer whose source is not the published code, for example because a forward was
            edited. If False, such a layer is replaced, too, if its results in eval mode agree; the replacement
            computes the published code, so an edit that acts in training only is lost. The report's first line
            names such layers.
        inputs: arguments of the model: a tuple of positional arguments, a dict of keyword arguments, or a
            single other argument. The model runs on them, and every layer is compared on the inputs that it
            receives. Without `inputs`, or if a layer is not called, random inputs are used. If a layer runs
            FastMoE's own code and is not on a CUDA device, the model is not run, because that would crash the
            process; that layer is not changed, and the others are compared on random inputs.
        masks: passed to the model as `masks=`, unless None.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: model is not a module.
        Exception: any exception of the model on the given inputs; nothing has been replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    holder = [model]
    layers = find_layers(model, partial(holder.__setitem__, 0))
    variants = [
        LeftLayer(name or ROOT, *found)
        for name, module in model.named_modules()
        if (found := variant_of(module)) is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), kept_random_states():
        calls = _calls(model, layers, inputs, masks) if check and inputs is not None else {}
        outcomes: list[Swapped | LeftLayer] = []
        inside: set[int] = set()  # sparse MLPs of replaced fusion models
        for places in layers:
            module = places[0].module
            if id(module) in inside:
                continue
            outcomes.append(_replace(places, check, strict, calls.get(id(module))))
            if isinstance(outcomes[-1], SwappedFusion):
                inside |= {id(part) for part in module.modules()}
    return SwapReport(
        holder[0],
        swapped_fusions=tuple(entry for entry in outcomes if isinstance(entry, SwappedFusion)),
        swapped=tuple(entry for entry in outcomes if isinstance(entry, SwappedLayer)),
        left=(*(entry for entry in outcomes if isinstance(entry, LeftLayer)), *variants),
        swapped_mlps=tuple(entry for entry in outcomes if isinstance(entry, SwappedMLP)),
    )


def _calls(model: nn.Module, layers: list[list[Place]], inputs: Any, masks: Any) -> dict[int, Case]:
    """Run the model on the inputs; return the first call of every supported layer. {} if it must not run."""
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
    places: list[Place], check: bool, strict: bool, case: Case | None
) -> Swapped | LeftLayer:
    """Replace a layer in all of its places, or in none of them."""
    layer, name = places[0].module, ", ".join(place.path or ROOT for place in places)
    inputs = "-" if not check else "random" if case is None else "given"
    try:
        spec = recognise(places)
        unknown = unrecognised(layer, None if isinstance(spec, RoutedSpec) else spec.compat)
        if strict and unknown:
            raise UnsupportedLayer(
                f"source unrecognised: {', '.join(unknown)}, which the fast layer would replace by the published "
                "code; strict=False permits this"
            )
        fast = adopt(layer, spec)
        result = compare(layer, spec, case) if check else Comparison({}, None)
        if lost := lost_members(layer, fast):
            text = f"attributes and methods that are not kept: {listed(lost)}"
            more = (*result.differences, Difference(text, len(lost)))
            result = dataclasses.replace(result, differences=more)
        entry = entry_of(name, spec, inputs, result, unknown)
    except (UnsupportedLayer, Disagreement) as reason:
        return LeftLayer(name, type(layer).__name__, str(reason))
    except Exception as error:
        # Any exception of the layer's code on a copy is a reason to keep the layer, not to stop.
        return LeftLayer(name, type(layer).__name__, f"the check failed: {first_line(error)}")
    take_over(layer, fast)
    for place in places:
        assert place.assign is not None, "recognise() refuses other places"
        place.assign(fast)
    return entry


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of `swap_checkpoint`: the written file, the settings, and the report of the check."""

    source: Path
    out: Path
    architecture: Architecture
    num_heads: int
    temperature: float
    report: SwapReport

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "architecture": dataclasses.asdict(self.architecture),
            "num_heads": self.num_heads,
            "temperature": self.temperature,
            **self.report.as_dict(),
        }

    def summary(self) -> str:
        """Describe the input file, the settings that parameters do not determine, and the output file."""
        settings = f"{self.num_heads} heads, temperature {self.temperature:g}"
        sparse = self.architecture.sparse
        if sparse is not None:
            settings += f", top {sparse.top_k} of a {sparse.gate}"
        return (
            f"Read {self.source}: {in_words(self.architecture)}.\n"
            f"Settings that the parameters do not determine: {settings}.\n"
            "The class is not stored either; the layer is read as an InteractionMoE with noise replacements.\n"
            f"Wrote {self.out}."
        )


def swap_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    temperature: float | None = None,
    layer: str | None = None,
    gate: str | None = None,
    top_k: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Check that the fast layer reproduces a checkpoint's layer, and write the checkpoint with its settings.

    The written file has the layout and all entries of the checkpoint, and the settings as "flmoe_config", so what
    could load the checkpoint can load it, too. If the checkpoint is a single state_dict, the written file is
    {"ensemble_model": state_dict, "flmoe_config": settings}. It is written atomically.

    Args:
        path, layer, gate, top_k: see `load_checkpoint`.
        num_heads, temperature: see `load_layer`.
        out: file to write, .safetensors or torch.save's format; default: beside the checkpoint, with
            the suffix .flmoe.pt.

    Raises:
        CheckpointError: as load_layer, the layers differ, or the file cannot be written.
    """
    file = read(Path(path), layer)
    architecture = infer(file, gate, top_k)
    state = convert_state(file, architecture)
    heads, scale = infer_settings(file, num_heads, temperature)
    target = target_of(file, out)
    report = swap(make_layer(file.path, state, architecture, heads, scale))
    if report.left:
        raise CheckpointError(path, f"not converted: {report.left[0].reason}")
    config = {**dataclasses.asdict(architecture), "num_heads": heads, "temperature": scale}
    write(target, file, state, config)
    return Conversion(file.path, target, architecture, heads, scale, report)
