"""Options that several commands share: settings that a checkpoint does not store."""

from __future__ import annotations

from typing import Annotated

import typer

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
