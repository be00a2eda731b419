"""The command `info`: installed versions, devices, and the backends that run here."""

from __future__ import annotations

import importlib
import json
import platform
from typing import Annotated, Any

import typer

from flmoe_kernels._version import __version__

from .errors import PACKAGE


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Show versions, devices, instruction set, threads, and which backends run here."""
    facts = gather_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_info(facts)


def gather_info() -> dict[str, Any]:
    """Collect the values that `info` shows, JSON serializable."""
    import torch

    from flmoe_gate.machine import cpu_model
    from flmoe_kernels.core.backend import backend_status, instruction_set, instruction_sets

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


def cuda_devices() -> list[str]:
    import torch

    from flmoe_kernels.core.triton.tables import architecture_of
    from flmoe_kernels.core.triton.target import architecture_name

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = architecture_name(architecture_of(torch.device("cuda", index)) or 0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices.append(f"{properties.name} ({architecture}, {memory})")
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
    reason = f"none: {facts['backends']['cpu']['reason']}"
    machine.add_row("instruction set", Text(facts["instruction_set"] or reason))
    machine.add_row("  of", ", ".join(facts["instruction_sets"]) or "-")
    machine.add_row("threads", str(facts["threads"]))

    backends = Table("backend", "runs here", "reason", title="Backends", title_justify="left")
    for name, state in facts["backends"].items():
        runs = Text("yes", "green") if state["ok"] else Text("no", "red")
        backends.add_row(name, runs, Text(state["reason"]))

    console = Console()
    console.print(machine)
    console.print(backends)
