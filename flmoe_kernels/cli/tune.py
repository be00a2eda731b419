"""The commands `tune show` and `tune clear`: saved autotuning results."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import fail

if TYPE_CHECKING:
    from flmoe_kernels.core.triton.tuning.cache import TuningResult

app = typer.Typer(
    name="tune",
    help="Show or remove the saved results of autotune (FLMOE_AUTOTUNE=1).",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Show each kernel's fastest configuration, and its time compared with the launch table's.

    Invalid files are reported on stderr and not changed.
    """
    from flmoe_kernels.core.triton.tuning import cache

    with _warnings_on_stderr():
        results = list(cache.results())
    if as_json:
        saved = [result.as_json() for result in results]
        typer.echo(json.dumps({"folder": str(cache.folder()), "results": saved}, indent=2))
    elif results:
        _print(results)
    else:
        typer.echo(f"no results in {cache.folder()}")


@app.command()
def clear() -> None:
    """Remove all saved results; later calls with autotune measure again."""
    from flmoe_kernels.core.triton.tuning import cache

    with _warnings_on_stderr():
        count = cache.clear()
    typer.echo(f"removed {count} result{'' if count == 1 else 's'} from {cache.folder()}")


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print warnings as lines on stderr; an unusable folder ends the command."""
    from flmoe_kernels.core.triton.tuning import cache

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cache.TuningWarning)
        try:
            yield
        except OSError as error:
            fail(str(error))
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)


def _print(results: list[TuningResult]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("kernel", "class", "sizes", "device", "tiles", "us", "table's us", "gain")
    for result in sorted(results, key=lambda result: result.key):
        key = result.key
        same = result.tiles == result.table
        cells = (
            key.kernel,
            f"{key.kind}, {key.dtype}",
            _numbers(dict(key.sizes)),
            f"{key.device}, triton {key.triton}",
            "the table's" if same else _numbers(result.tiles),
            f"{result.seconds * 1e6:.1f}",
            f"{result.table_seconds * 1e6:.1f}",
            f"{result.table_seconds / result.seconds:.2f}x",
        )
        # Text, so that rich does not interpret the content of a file as markup.
        table.add_row(*map(Text, cells))
    Console().print(table)


def _numbers(values: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in values.items())
