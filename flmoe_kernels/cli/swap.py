"""The command `swap`: check a checkpoint of the published layer and write it with its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import fail


def swap(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the published layer.")],
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, which no checkpoint shows; default 4.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the softmax over experts; default 1.0.")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="Of sparse MLPs, e.g. SwitchGate; default what it shows, or GShardGate."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts of a token in sparse MLPs; default 2; Switch: 1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default CHECKPOINT.flmoe.pt.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Check the fast layer on a checkpoint, and write the checkpoint with its settings."""
    from flmoe_kernels.published.file import CheckpointError
    from flmoe_kernels.published.swap import swap_checkpoint

    try:
        conversion = swap_checkpoint(
            checkpoint,
            num_heads=heads,
            temperature=temperature,
            gate=gate,
            top_k=top_k,
            out=out,
        )
    except CheckpointError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(conversion.as_dict(), indent=2))
    else:
        typer.echo(f"{conversion.summary()}\n\n{conversion.report}")
