"""Command line of the experiments: options, settings and result files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import rows
from flmoe_kernels.profile.environment import environment

Row = dict[str, Any]


def run(
    doc: str | None,
    measure: Callable[..., list[Row]],
    threads: int = 2,
    packages: Sequence[str] = (),
    paths: Sequence[str] = (),
    **defaults: int,
) -> None:
    """Parse the options, measure, and write the results if `--out FILE` is given.

    Args:
        doc: text for --help.
        measure: called with a value for each of `paths` and `defaults`; returns the rows.
        threads: maximum number of torch threads.
        packages: packages whose versions are saved, in addition to those in every result.
        paths: required arguments, which are not saved.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in paths:
        parser.add_argument(name, type=Path)
    for name, value in defaults.items():
        parser.add_argument(
            f"--{name}", type=_at_least_one, default=value, help="default %(default)s"
        )
    parser.add_argument("--out", type=Path, help="write JSON here")
    settings = vars(parser.parse_args())
    out = settings.pop("out")
    torch.set_num_threads(min(torch.get_num_threads(), threads))
    given = {name: settings.pop(name) for name in paths}
    results = measure(**given, **settings)
    if out:
        versions = {name: metadata.version(name) for name in packages}
        known = environment() | versions
        try:
            rows.save(out, {"environment": known, "settings": settings, "rows": results})
        except OSError as error:
            parser.exit(2, f"error: {error}\n")


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count
