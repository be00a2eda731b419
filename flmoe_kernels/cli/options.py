"""Options that several commands share: settings and sizes that a checkpoint does not store."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import fail

Heads = Annotated[
    int | None,
    typer.Option(help="Number of attention heads; a checkpoint does not store it. Default 4."),
]
Temperature = Annotated[
    float | None, typer.Option(help="Temperature of the expert weights; default 1.0.")
]
LayerName = Annotated[
    str | None,
    typer.Option(help="Name of the layer if the checkpoint holds several; the error lists them."),
]
GateName = Annotated[
    str | None,
    typer.Option(
        help="Gate of sparse layers, SwitchGate for example; default: as in the checkpoint, else GShardGate."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Experts per token in sparse layers; default 2, with SwitchGate 1."),
]
Batch = Annotated[int | None, typer.Option(help="With --checkpoint: batch size; default 32.")]
Tokens = Annotated[
    str | None,
    typer.Option(help="With --checkpoint: tokens per modality, for example 320,196."),
]
Valid = Annotated[
    str | None,
    typer.Option(help="With --checkpoint: tokens per modality that are not padding; default: all."),
]


def numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        fail(f"--{name}: expected numbers separated by commas, got {text!r}")


def refuse(**given: object) -> None:
    """Reject options that do not apply to the kind of request."""
    for name, value in given.items():
        if value not in (None, []):
            fail(f"--{name.replace('_', '-')}: does not apply to this kind of request; remove it")
