"""Report of `swap`: replaced layers with errors, other layers with reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from flmoe_kernels.layers.interaction_moe.architecture import FusionSpec
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP, RoutedSpec

from .compare import Comparison
from .differences import Difference
from .places import LAYER_NAMES
from .recognise import Spec

NOTE = (
    "Errors are the largest absolute differences from the original in float64. The speed-up is only "
    "indicative: it is from a few inference calls on the inputs of the check."
)
DIFFERENCES = (
    "Differences by design, on the inputs of the check (docs/differences.md, docs/fastmoe.md):"
)
# Of the tables, by the field of SwapReport.
_COLUMNS = {
    "swapped": "swapped, variant, experts, inputs, logits, weights, latents, losses, faster",
    "swapped_fusions": "swapped, variant, modalities, inputs, logits, latents, faster",
    "swapped_mlps": "swapped, gate, experts, top k, inputs, output, faster",
    "left": "left, class, reason",
}
MLP_NOTE = (
    f"{SPARSE_MLP} is compared in eval mode without capacity limits, because the original drops different rows "
    "in every run."
)


@dataclasses.dataclass(frozen=True)
class SwappedLayer:
    """A layer that was replaced; name lists every place that held it.

    inputs: the inputs of the comparison: "random", "given", or "-" without comparison. Errors are the largest
    absolute differences from the original run in float64; None without comparison. latents_error is also None if
    the variant returns no latents. speed_up is only indicative; None if nothing was timed. unrecognised: methods
    whose source is not the published code. differences: behaviours that differ by design, measured; empty without
    comparison.
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
    unrecognised: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


@dataclasses.dataclass(frozen=True)
class SwappedFusion:
    """A replaced fusion model outside of interaction layers; the fields are as in SwappedLayer."""

    name: str
    compat: str
    modalities: int
    inputs: str
    logits_error: float | None
    latents_error: float | None
    speed_up: float | None
    unrecognised: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


@dataclasses.dataclass(frozen=True)
class SwappedMLP:
    """A replaced sparse MLP outside of interaction layers.

    gate is the published class name of its gate; the other fields are as in SwappedLayer.
    """

    name: str
    gate: str
    experts: int
    top_k: int
    inputs: str
    output_error: float | None
    speed_up: float | None
    unrecognised: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


Swapped = SwappedLayer | SwappedFusion | SwappedMLP


def entry_of(
    name: str, spec: Spec, inputs: str, result: Comparison, unrecognised: Iterable[str]
) -> Swapped:
    """The report's entry of a replaced layer."""
    errors = result.errors.get
    logits, latents = errors("logits"), errors("latents")
    rest = (result.speed_up, tuple(unrecognised), result.differences)
    if isinstance(spec, RoutedSpec):
        sizes = (spec.gate, spec.num_expert, spec.top_k)
        return SwappedMLP(name, *sizes, inputs, errors("outputs"), *rest)
    if isinstance(spec, FusionSpec):
        return SwappedFusion(name, spec.compat, spec.num_modalities, inputs, logits, latents, *rest)
    values = (logits, errors("weights"), latents, errors("losses"))
    return SwappedLayer(name, spec.compat, spec.num_experts, inputs, *values, *rest)


@dataclasses.dataclass(frozen=True)
class LeftLayer:
    """A module that was recognised but not changed, with the reason."""

    name: str
    class_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """Result of `swap`; prints as a table.

    Attributes:
        model: the model to use from now on: the given model, or the fast layer if the model itself was
            the layer.
        swapped, swapped_fusions, swapped_mlps: the layers that were replaced, by kind.
        left: the modules that were recognised but not changed, with the reason.
    """

    model: nn.Module
    swapped: tuple[SwappedLayer, ...]
    left: tuple[LeftLayer, ...]
    swapped_mlps: tuple[SwappedMLP, ...] = ()
    swapped_fusions: tuple[SwappedFusion, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything except the model as plain values for JSON."""
        return {
            name: [dataclasses.asdict(entry) for entry in getattr(self, name)] for name in _COLUMNS
        }

    def __str__(self) -> str:
        blocks = [self._summary()]
        for name, columns in _COLUMNS.items():
            if entries := getattr(self, name):
                table = [columns.split(", "), *(_cells(entry) for entry in entries)]
                widths = [max(map(len, column)) for column in zip(*table, strict=True)]
                lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
                blocks.append("\n".join(lines))
        differences = [f"{x.name}: {y.text}" for x in self._entries() for y in x.differences]
        if differences:
            blocks.append("\n".join([DIFFERENCES, *differences]))
        if self._entries():
            blocks.append(NOTE)
        if self.swapped_mlps:
            blocks.append(MLP_NOTE)
        return "\n\n".join(blocks)

    def _summary(self) -> str:
        number = len(self._entries())
        if not number and not self.left:
            return (
                f"Nothing to swap: no module named {', '.join(LAYER_NAMES)}, Transformer (with the published "
                f"structure) or {SPARSE_MLP} in this "
                f"{type(self.model).__name__}."
            )
        line = f"{number} layer{'' if number == 1 else 's'} swapped, {len(self.left)} left as is."
        for entry in self._entries():
            if entry.unrecognised:
                how = "not compared" if entry.inputs == "-" else "compared in eval mode only"
                names = ", ".join(entry.unrecognised)
                line += f" {entry.name}: {how}, source unrecognised: {names}."
        return line

    def _entries(self) -> list[Swapped]:
        return [*self.swapped, *self.swapped_fusions, *self.swapped_mlps]


def _cells(entry: Swapped | LeftLayer) -> list[str]:
    """Format the values of an entry as text, in the order of its fields."""
    formats = {"speed_up": "{:.1f}x"} | {
        field.name: "{:.1e}" for field in dataclasses.fields(entry) if "_error" in field.name
    }
    return [
        "-" if value is None else formats.get(name, "{}").format(value)
        for name, value in vars(entry).items()
        if name not in ("unrecognised", "differences")
    ]
