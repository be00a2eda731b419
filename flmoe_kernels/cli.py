"""The command line: `python -m flmoe_kernels COMMAND`.

A command is a function with `@app.command()`. It imports what it needs inside itself, so that
`--help` stays quick and a missing extra stops only the command that wants it:

    @app.command()
    def demo(out: Annotated[Path, typer.Option(help="Folder for results.")]) -> None:
        \"\"\"Train, swap and compare on real data.\"\"\"
        with needs_extra("demo"):
            from flmoe_kernels.demo import run
        run(out)

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 a check of what came
out failed, 2 the request cannot be met, 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flmoe_kernels._version import __version__

PACKAGE = "flmoe_kernels"

app = typer.Typer(
    name=PACKAGE,
    help="Fast kernels for feature-level interaction mixtures of experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Run the command line as `python -m flmoe_kernels`, whichever way it was started."""
    app(prog_name=f"python -m {PACKAGE}")


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code=2)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a missing third-party package into one line that says which extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # A missing module of our own is a bug or a broken install: no extra would mend it.
        if not missing or missing.split(".")[0] == PACKAGE:
            raise
        fail(f"{missing} is not installed; run: pip install 'flmoe-kernels[{extra}]'")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PACKAGE} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options that stand before any command."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Show versions, devices, instruction set, threads, and which backends run here."""
    facts = gather_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_info(facts)


@app.command()
def swap(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the published layer.")],
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, which no checkpoint tells; default 4.")
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
    from flmoe_kernels.checkpoint import CheckpointError, swap_checkpoint

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
        from rich.console import Console

        typer.echo(conversion.summary())
        Console().print(conversion.report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, made if missing.")] = Path(
        "demo_out"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Every stage, hardly trained.")] = False,
) -> None:
    """Train the reference layer on real digits, swap it, compare both, and write the results."""
    from flmoe_kernels.demo import main as run_demo

    with needs_extra("demo"):
        code = run_demo(out, seed=seed, quick=quick)
    raise typer.Exit(code)


@app.command()
def explain(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of the published layer.")],
    data: Annotated[
        Path,
        typer.Option(
            help="An .npz: inputs_0, inputs_1, .. (samples, tokens, width); if known masks_0, .., "
            "tokens_0, .., image_0, .., labels."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results, made if missing.")] = Path(
        "explain_out"
    ),
    samples: Annotated[int | None, typer.Option(help="The first so many; default 4")] = None,
    attribution: Annotated[
        str | None, typer.Option(help="Scores of tokens; default gradient_rollout")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Of pairs: auto, exact or sampling; default auto")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Coalitions evaluated for a sample; default 3072")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(help="Tokens of a modality whose pairs are asked about; default 5"),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Across modalities, or all; default across")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="label, predicted or a class; default label if known, else predicted"),
    ] = None,
    fill: Annotated[
        str | None, typer.Option(help="Absent tokens: zero, mean or drop; default zero")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Random sets next to identified ones; default 10")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of coalitions and random sets; default 0")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="See swap; default 4")] = None,
    temperature: Annotated[float | None, typer.Option(help="See swap; default 1.0")] = None,
    gate: Annotated[str | None, typer.Option(help="See swap.")] = None,
    top_k: Annotated[int | None, typer.Option(help="See swap; default 2; Switch: 1")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One sample, hardly estimated.")] = False,
) -> None:
    """Explain samples: experts, tokens, token pairs, and whether the model needs them; as a page."""
    from flmoe_kernels.explain.report.request import Request

    asked = {"samples": samples, "budget": budget, "top": top, "repeats": repeats, "seed": seed}
    words = {"attribution": attribution, "method": method, "pairs": pairs, "fill": fill}
    try:
        request = Request.choose(quick, target=target, **asked, **words)
    except ValueError as error:
        fail(str(error))
    layer = {"num_heads": heads, "temperature": temperature, "gate": gate, "top_k": top_k}
    with needs_extra("demo"):
        from flmoe_kernels.explain.report.command import main as run_explain

        code = run_explain(checkpoint, data, out, request, **layer)
    raise typer.Exit(code)


def gather_info() -> dict[str, Any]:
    """What `info` shows, as plain values that JSON can hold."""
    import torch

    from flmoe_kernels.backend import backend_status, instruction_set, instruction_sets

    status = backend_status()
    native_runs = status["cpu"][0]
    versions: dict[str, str | None] = {PACKAGE: __version__, "python": platform.python_version()}
    missing: dict[str, str] = {}
    for name in ("torch", "numpy", "triton"):
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except ImportError as error:
            versions[name] = None
            missing[name] = str(error)
    return {
        "versions": versions,
        "missing": missing,
        "devices": {"cpu": cpu_model(), "cuda": cuda_devices()},
        "instruction_set": instruction_set() if native_runs else None,
        "instruction_sets": list(instruction_sets()),
        "threads": torch.get_num_threads(),
        "backends": {name: {"ok": ok, "reason": reason} for name, (ok, reason) in status.items()},
    }


def cpu_model() -> str:
    """The processor's name as the system tells it; on Linux platform.processor() is often empty."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cuda_devices() -> list[str]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB)"
        )
    return devices


def print_info(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    machine = Table(show_header=False, title="This installation", title_justify="left")
    for name, version in facts["versions"].items():
        machine.add_row(name, Text(version or f"not available: {facts['missing'][name]}"))
    machine.add_row("cpu", Text(facts["devices"]["cpu"]))
    machine.add_row("cuda", Text(", ".join(facts["devices"]["cuda"]) or "no device"))
    machine.add_row("instruction set", facts["instruction_set"] or "none: no native module")
    machine.add_row("  of", ", ".join(facts["instruction_sets"]) or "-")
    machine.add_row("threads", str(facts["threads"]))

    backends = Table("backend", "runs here", "reason", title="Backends", title_justify="left")
    for name, state in facts["backends"].items():
        runs = Text("yes", "green") if state["ok"] else Text("no", "red")
        backends.add_row(name, runs, Text(state["reason"]))

    console = Console()
    console.print(machine)
    console.print(backends)
