"""The demo on real data: `python -m examples.digits`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flmoe_kernels.cli.errors import needs_extra


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, made if missing.")] = Path(
        "demo_out"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Every stage, hardly trained.")] = False,
) -> None:
    """Train the reference layer on real digits, swap it, compare both, and write the results."""
    from . import main as run_demo

    with needs_extra("demo"):
        code = run_demo(out, seed=seed, quick=quick)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(demo)
