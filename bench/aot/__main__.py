"""`python -m bench.aot`: every Triton kernel compiled without a GPU, and held to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flmoe_kernels.cli.errors import fail, needs_extra

if TYPE_CHECKING:
    from bench.aot.budget import Budget
    from bench.aot.rows import Row
    from bench.aot.run import Request


def aot(
    arch: Annotated[
        str, typer.Option(help="Architectures, with commas between.")
    ] = "sm_80,sm_90,sm_100",
    op: Annotated[list[str] | None, typer.Option(help="An operator; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A shape; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="A dtype; may be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the set that tests compile.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write all that is known to; - is stdout.")
    ] = None,
    budget: Annotated[
        Path | None,
        typer.Option(help="What kernels may take; default bench/aot_budget.json of a checkout."),
    ] = None,
    write_budget: Annotated[
        Path | None, typer.Option(help="Write what kernels take, and keep allowed spills.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write the table to this page, between its two marks; or a new page."),
    ] = None,
    cases: Annotated[
        str, typer.Option(help="The module that lists what is compiled.")
    ] = "bench.aot.cases",
    processes: Annotated[int, typer.Option(min=1, help="That compile side by side.")] = 2,
) -> None:
    """Compile the Triton kernels for GPUs that are not here, and say what limits each.

    Times are bounds by arithmetic, not measurements. Exit code 1: a kernel spills, has a matrix product off the
    matrix units, does not compile, or is over its budget.
    """
    with needs_extra("triton"):
        from bench.aot import architectures, report
        from bench.aot.budget import save
        from bench.aot.run import Request
        from flmoe_kernels.core.files import require_marks, write_marked

    limits = _budget(budget)
    try:
        devices = architectures.parse(arch)
        request = Request(devices, op or (), shape or (), dtype or (), quick, cases)
        if markdown is not None:
            require_marks(markdown, report.MARK)
        rows = _compiled(request, limits, processes)
        if write_budget is not None:
            rows, limits = _rewritten(rows, limits)
            save(write_budget, limits)
        if json_file is not None and str(json_file) != "-":
            json_file.write_text(report.as_json(rows), encoding="utf-8")
        if markdown is not None:
            write_marked(markdown, report.MARK, report.markdown(rows, limits))
    except ModuleNotFoundError as error:
        fail(f"cases: {error}")
    except (ValueError, OSError) as error:
        fail(str(error))
    if str(json_file) == "-":
        typer.echo(report.as_json(rows), nl=False)
    else:
        _print(rows)
    _finish(rows)


def _budget(path: Path | None) -> Budget:
    from bench.aot.budget import DEFAULT, EMPTY, load

    if path is None and not DEFAULT.is_file():
        return EMPTY
    try:
        return load(path or DEFAULT)
    except (ValueError, OSError) as error:
        fail(str(error))


def _compiled(request: Request, limits: Budget, processes: int) -> list[Row]:
    """With a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from bench.aot.run import compile_rows

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("compiling", total=len(request.jobs()))
        return compile_rows(
            request, limits, processes=processes, done=lambda n: progress.advance(task, n)
        )


def _rewritten(rows: list[Row], limits: Budget) -> tuple[list[Row], Budget]:
    """The rows by the budget that holds what they take, and that budget."""
    import triton

    from bench.aot.budget import updated
    from bench.aot.run import judged

    limits = updated(limits, rows, triton.__version__)
    return judged(rows, limits), limits


def _print(rows: list[Row]) -> None:
    from rich.console import Console

    from bench.aot import report

    console = Console()
    if not console.is_terminal:
        # A pipe has no width to fit.
        console = Console(width=200)
    console.print(report.table(rows))
    typer.echo("Bounds are arithmetic, not measurements; a launch is assumed to take 3 us.")


def _finish(rows: list[Row]) -> None:
    """Exit code 1 with a line for each thing that is wrong."""
    wrong = [
        f"{row.case} on sm_{row.architecture}: {each}" for row in rows for each in row.failures
    ]
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(aot)
