"""What `swap` reports: what was replaced, how far it is from the original, what was left and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.routed_mlp.structure import SPARSE_MLP

if TYPE_CHECKING:
    from rich.console import RenderableType

LAYER_NAMES = (InteractionMoE.__name__, ReferenceInteractionMoE.__name__)
NOTE = (
    "Errors are the largest absolute differences from the original in float64. How much faster is "
    "indicative: a few inference calls on the inputs of the check."
)
MLP_NOTE = (
    f"{SPARSE_MLP} is compared in eval mode with the experts' capacities lifted: which rows the original drops "
    "is not the same twice."
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
class SwappedMLP:
    """One sparse MLP that was replaced where it stands outside of any interaction layer.

    gate is its gate's published class name; the rest is as in SwappedLayer. The error is that of the output
    in eval mode with capacities lifted, see `swap_mlp.compare`.
    """

    name: str
    gate: str
    experts: int
    top_k: int
    inputs: str
    output_error: float | None
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
        swapped: the interaction layers that were replaced.
        swapped_mlps: the sparse MLPs that were.
        left: the modules that were recognised and left, with the reason.
    """

    model: nn.Module
    swapped: tuple[SwappedLayer, ...]
    left: tuple[LeftLayer, ...]
    swapped_mlps: tuple[SwappedMLP, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain values for JSON."""
        return {
            "swapped": [dataclasses.asdict(entry) for entry in self.swapped],
            "swapped_mlps": [dataclasses.asdict(entry) for entry in self.swapped_mlps],
            "left": [dataclasses.asdict(entry) for entry in self.left],
        }

    def __str__(self) -> str:
        blocks = [self._summary()]
        for columns, rows in self._tables():
            table = [columns, *rows]
            widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
            lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
            blocks.append("\n".join(lines))
        return "\n\n".join([*blocks, *self._notes()])

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
        parts += [Text(note, style="dim") for note in self._notes()]
        return Group(*parts)

    def _summary(self) -> str:
        number = len(self.swapped) + len(self.swapped_mlps)
        if not number and not self.left:
            return (
                f"Nothing to swap: no module named {', '.join(LAYER_NAMES)} or {SPARSE_MLP} in this "
                f"{type(self.model).__name__}."
            )
        return f"{number} layer{'' if number == 1 else 's'} swapped, {len(self.left)} left as is."

    def _notes(self) -> list[str]:
        notes = [NOTE] if self.swapped or self.swapped_mlps else []
        return [*notes, MLP_NOTE] if self.swapped_mlps else notes

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        if self.swapped:
            columns = ["swapped", "variant", "experts", "inputs"]
            columns += ["logits", "weights", "latents", "losses", "faster"]
            yield columns, [_cells(entry) for entry in self.swapped]
        if self.swapped_mlps:
            columns = ["swapped", "gate", "experts", "top k", "inputs", "output", "faster"]
            yield columns, [_mlp_cells(entry) for entry in self.swapped_mlps]
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
        *map(_error, errors),
        _faster(entry.speed_up),
    ]


def _mlp_cells(entry: SwappedMLP) -> list[str]:
    return [
        entry.name,
        entry.gate,
        str(entry.experts),
        str(entry.top_k),
        entry.inputs,
        _error(entry.output_error),
        _faster(entry.speed_up),
    ]


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _faster(speed_up: float | None) -> str:
    return "-" if speed_up is None else f"{speed_up:.1f}x"
