"""Command `python -m bench.aot`: compiles every Triton kernel and checks its resources."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flmoe_kernels.core.triton.target import TARGETS, Architecture, architecture_name

from .cases import ARCHITECTURES, OPERATORS, Case, cases
from .compile import Row, compile_case

# Targets of the report: 90 for sm_90, gfx942.
NAMES = {str(architecture): architecture for architecture in TARGETS}
# Each process takes about one gigabyte.
PROCESSES = 2


def aot(
    arch: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(NAMES)}; repeatable. [default: 80, 90, 100]"),
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="An operator; repeatable.")] = None,
) -> None:
    """Compile the Triton kernels without a GPU and report registers, spills, shared memory, matrix instructions.

    Exit code 1: a kernel does not compile, spills more than is allowed, has fewer matrix instructions than its
    products need, or takes more shared memory than the GPU allows per block or than its launch table states.
    """
    targets = [name.removeprefix("sm_") for name in arch or ()]
    for name, given, known in (("arch", targets, NAMES), ("op", op, OPERATORS)):
        for value in given or ():
            if value not in known:
                expected = ", ".join(map(str, known))
                raise typer.BadParameter(
                    f"expected some of {expected}, got {value}", param_hint=name
                )
    chosen = [case for case in cases() if not op or case.operator in op]
    rows = compile_cases(chosen, [NAMES[name] for name in targets] or ARCHITECTURES)
    console = Console()
    # If the output is not a terminal, a fixed width is used.
    (console if console.is_terminal else Console(width=160)).print(table(rows))
    failed = [(row, failure) for row in rows for failure in row.failures]
    for row, failure in failed:
        typer.echo(f"{row.case} on {architecture_name(row.architecture)}: {failure}", err=True)
    raise typer.Exit(code=1 if failed else 0)


def compile_cases(chosen: Sequence[Case], architectures: Sequence[Architecture]) -> list[Row]:
    """Compile the cases in parallel; a kernel that several cases share comes from Triton's cache."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        futures = [pool.submit(compile_case, case, n) for case in chosen for n in architectures]
        progress = track(futures, "compiling", console=Console(stderr=True), transient=True)
        return [future.result() for future in progress]


def table(rows: Sequence[Row]) -> Table:
    result = Table(
        "kernel", "target", "registers", "spilled", "shared KiB", "warps", "matrix instructions"
    )
    for row in rows:
        cells = ["", "", "", "", "does not compile"]
        if row.report is not None:
            report = row.report
            matrix = ", ".join(f"{name} {count}" for name, count in report.matrix.items())
            numbers = (report.registers, report.spilled or "", f"{report.shared / 1024:.1f}")
            cells = [*map(str, numbers), str(report.warps), matrix]
        style = "red" if row.failures else ""
        result.add_row(row.case, architecture_name(row.architecture), *cells, style=style)
    return result


if __name__ == "__main__":
    typer.run(aot)
