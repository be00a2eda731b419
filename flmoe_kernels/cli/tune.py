"""The commands `tune show` and `tune clear`: what autotune found on this machine, and away with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import fail

if TYPE_CHECKING:
    from flmoe_kernels.core.triton.tuning.finding import Finding

app = typer.Typer(
    name="tune",
    help="Launch configurations that autotune (FLMOE_AUTOTUNE=1) found fastest on this machine.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Show what was found: each kernel's configuration, and its time against the launch table's.

    Files that are no findings are named on stderr and left alone.
    """
    from flmoe_kernels.core.triton.tuning import cache
    from flmoe_kernels.core.triton.tuning.finding import as_json_value

    with _complaints():
        found = list(cache.findings())
    if as_json:
        content = {"folder": str(cache.folder()), "findings": list(map(as_json_value, found))}
        typer.echo(json.dumps(content, indent=2))
    elif found:
        _print(found)
    else:
        typer.echo(f"nothing found yet in {cache.folder()}")


@app.command()
def clear() -> None:
    """Remove every finding; later calls with autotune look anew."""
    from flmoe_kernels.core.triton.tuning import cache

    with _complaints():
        count = cache.clear()
    typer.echo(f"removed {count} finding{'' if count == 1 else 's'} from {cache.folder()}")


@contextmanager
def _complaints() -> Iterator[None]:
    """Warnings as lines on stderr; a folder that cannot be used ends the command."""
    from flmoe_kernels.core.triton.tuning import cache

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cache.TuningWarning)
        try:
            yield
        except OSError as error:
            fail(str(error))
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)


def _print(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("kernel", "class", "sizes", "device", "tiles", "us", "table's us", "gain")
    for finding in sorted(found, key=lambda one: (one.question.kernel, one.question)):
        asked = finding.question
        same = finding.tiles == finding.table
        cells = (
            asked.kernel,
            f"{asked.kind}, {asked.dtype}",
            _numbers(dict(asked.sizes)),
            f"{asked.device}, triton {asked.triton}",
            "the table's" if same else _numbers(finding.tiles),
            f"{finding.seconds * 1e6:.1f}",
            f"{finding.table_seconds * 1e6:.1f}",
            f"{finding.table_seconds / finding.seconds:.2f}x",
        )
        # Text: what a file holds is never read as markup.
        table.add_row(*map(Text, cells))
    Console().print(table)


def _numbers(values: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in values.items())
