"""The command `swap`: check a checkpoint of the published layer and write it with its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import fail
from .options import GateName, Heads, LayerName, Temperature, TopK


def swap(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the published layer.")],
    heads: Heads = None,
    temperature: Temperature = None,
    layer: LayerName = None,
    gate: GateName = None,
    top_k: TopK = None,
    out: Annotated[
        Path | None, typer.Option(help="Output file; default CHECKPOINT.flmoe.pt.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare the fast layer with a checkpoint's layer, and write the checkpoint with its settings."""
    from flmoe_kernels.published.file import CheckpointError
    from flmoe_kernels.published.swap import swap_checkpoint

    try:
        conversion = swap_checkpoint(
            checkpoint,
            num_heads=heads,
            temperature=temperature,
            layer=layer,
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
