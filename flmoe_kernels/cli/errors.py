"""Errors of commands: one line on stderr, exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

PACKAGE = "flmoe_kernels"


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code=2)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn the error for a missing third-party package into a line with the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # A missing module of this package is a bug or a broken installation, which no extra fixes.
        if not missing or missing.split(".")[0] == PACKAGE:
            raise
        fail(f"{missing} is not installed; run: pip install 'flmoe-kernels[{extra}]'")
