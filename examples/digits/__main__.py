"""Command line of the example: `python -m examples.digits`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flmoe_kernels.cli.errors import fail, needs_extra
from flmoe_kernels.core.backend import backend_status
from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.core.files import write_whole

from .settings import Settings

EXTRAS = ("sklearn", "matplotlib")
RESULTS = "demo.json"


def main(
    out: Annotated[Path, typer.Option(help="Folder for results; created if missing.")] = Path(
        "demo_out"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Run all stages with few steps.")] = False,
) -> None:
    """Train the published layer on real digits, swap it, compare both, and write the results.

    Writes demo.json, and a checkpoint and a figure (demo_TASK.png) per task. Exit code 2: the example cannot run.
    """
    with needs_extra("demo"):
        for name in EXTRAS:
            importlib.import_module(name)
    # The swap needs the C++ kernels; this is checked before training, which takes minutes.
    available, reason = backend_status()["cpu"]
    if not available:
        fail(reason)
    try:
        _run(out, seed, quick)
    except OSError as error:
        fail(str(error))


def _run(out: Path, seed: int, quick: bool) -> None:
    """Run all stages and write the files. Raises OSError if the folder or a file cannot be written."""
    out.mkdir(parents=True, exist_ok=True)
    # Results of an earlier run must not stand beside the checkpoints of a run that is stopped.
    for path in (out / RESULTS, *out.glob("demo_*.png")):
        path.unlink(missing_ok=True)

    from .data import NUM_TOKENS, TASKS
    from .figure import draw_pairs
    from .pipeline import run
    from .report import print_report

    console = Console()
    results = run(Settings.choose(seed, quick), out, console)
    print_report(results, console)
    write_whole(out / RESULTS, json.dumps(results, indent=2) + "\n")
    for name, layer in results["token_pair_layer"].items():
        write_whole(out / f"demo_{name}.png", png_bytes(draw_pairs(name, layer["first_sample"])))
    print(f"{results['total_seconds']:.0f} s; results, figures and checkpoints are in {out}")
    file, tokens = out / f"{TASKS[-1].name}.pt", f"{NUM_TOKENS},{NUM_TOKENS}"
    print(f"Time and memory: python -m flmoe_kernels profile --checkpoint {file} --tokens {tokens}")


if __name__ == "__main__":
    typer.run(main)
