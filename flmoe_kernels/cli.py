"""The command line: `python -m flmoe_kernels COMMAND`.

Each command is a typer-annotated function in a module of `commands`, which imports what it needs inside
itself, so that `--help` stays quick and a missing extra stops only the command that wants it:

    def demo(out: Annotated[Path, typer.Option(help="Folder for results.")]) -> None:
        \"\"\"Train, swap and compare on real data.\"\"\"
        with needs_extra("demo"):
            from flmoe_kernels.demo import run
        run(out)

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 a check of what came
out failed, 2 the request cannot be met, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flmoe_kernels._version import __version__
from flmoe_kernels.commands import bench, tune
from flmoe_kernels.commands.aot import aot
from flmoe_kernels.commands.demo import demo
from flmoe_kernels.commands.errors import PACKAGE
from flmoe_kernels.commands.explain import explain
from flmoe_kernels.commands.info import info
from flmoe_kernels.commands.profile import profile
from flmoe_kernels.commands.swap import swap

app = typer.Typer(
    name=PACKAGE,
    help="Fast kernels for feature-level interaction mixtures of experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (info, swap, demo, explain, profile, aot):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(tune.app, name="tune")


def main() -> None:
    """Run the command line as `python -m flmoe_kernels`, whichever way it was started."""
    app(prog_name=f"python -m {PACKAGE}")


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
