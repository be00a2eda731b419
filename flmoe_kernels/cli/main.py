"""The command line: `python -m flmoe_kernels COMMAND`.

Each command is a function in its own module. It imports dependencies inside the function, so that `--help` is
fast and a missing extra affects only the commands that need it.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 a check of the results failed, 2 the request
cannot be run, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from flmoe_kernels._version import __version__

from .check import check
from .errors import PACKAGE
from .explain import explain
from .info import info
from .profile import profile
from .swap import swap
from .warmup import warmup

app = typer.Typer(
    name=PACKAGE,
    help="Fast kernels for feature-level interaction mixtures of experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (info, check, swap, explain, profile, warmup):
    app.command()(command)


def main() -> None:
    """Run the command line; help texts always show `python -m flmoe_kernels`.

    If a file or standard output cannot be written (a full disk), it prints one line on stderr; exit code 2.
    """
    # Warnings in one line, without file name and line number.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        try:
            app(prog_name=f"python -m {PACKAGE}")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        message = str(error)
        if error.filename is None and error.strerror:  # not an error of a file
            message = f"standard output: cannot be written: {error.strerror}"
            # Python flushes again at exit, which would fail and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"error: {message}", err=True)
        sys.exit(2)


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
    """Define the options before the command."""
