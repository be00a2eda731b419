"""Steps of the command `profile`: check, measure, print, write."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flmoe_kernels.core.files import unwritable_reason, write_whole

from . import output
from .cases import BadRequest, Case
from .ceilings import measure_ceilings
from .check import agree
from .environment import environment
from .profiles import Profile, Tell, profile_case
from .registry import Contestant, prepare, words_of
from .request import EVERY, Request
from .roofline import write_roofline

if TYPE_CHECKING:
    from rich.console import RenderableType

LOG_WIDTH = 160
SCHEMA = "flmoe_kernels.profile/4"


@dataclasses.dataclass(frozen=True)
class Files:
    """Output paths; None for files that are not written."""

    trace: Path | None = None
    json: Path | None = None
    roofline: Path | None = None

    def require_writable(self) -> None:
        """Check the paths. Raises BadRequest: a file cannot be written."""
        for name, path in vars(self).items():
            if path is not None and (reason := unwritable_reason(path)):
                raise BadRequest(f"{name}: {path}: {reason}")


def run(
    requests: Sequence[Request], seconds: float, files: Files, *, check: bool, memory: bool
) -> None:
    """Profile contestants of cases on one device and in one dtype, one case after the other.

    Raises:
        BadRequest: a request cannot be run.
        WrongAnswer: results of a contestant are wrong.
        ModuleNotFoundError: a roofline is requested and matplotlib is not installed.
    """
    if files.roofline is not None:
        importlib.import_module("matplotlib")  # before minutes of timing
    cases = [request.case() for request in requests]
    chosen = [request.contestants(case) for request, case in zip(requests, cases, strict=True)]
    device = cases[0].device
    facts = environment(device)
    profiles: list[Profile] = []
    with _telling() as tell:
        if check:
            tell("checking results against the reference in float64")
            chosen = [
                _checked(case, own, EVERY in request.backends, tell)
                for request, case, own in zip(requests, cases, chosen, strict=True)
            ]
        tell("measuring this machine's ceilings")
        ceilings = measure_ceilings(device, (cases[0].dtype,))
    for case, own in zip(cases, chosen, strict=True):
        trace = None if profiles else files.trace
        with _telling() as tell:
            found = profile_case(
                case, own, ceilings, seconds, memory=memory, trace=trace, tell=tell
            )
        # At once, because the next case may take a while.
        if not profiles:
            heading = [_heading(facts), output.attainable_text(ceilings)]
            _print("\n".join(heading))
        for table in output.tables(found):
            _print(table)
        profiles += found
    if files.json is not None:
        held = {
            "schema": SCHEMA,
            "environment": facts,
            "ceilings": dataclasses.asdict(ceilings),
            "profiles": [profile.as_dict() for profile in profiles],
        }
        write_whole(files.json, json.dumps(held, indent=2, allow_nan=False) + "\n")
    if files.roofline is not None:
        write_roofline(files.roofline, heading, profiles)


def _checked(case: Case, chosen: list[Contestant], every: bool, tell: Tell) -> list[Contestant]:
    """Check contestants. If all were requested, those that fail are left out, except the first.

    Raises:
        WrongAnswer: results of a contestant are wrong.
    """
    agree(case, chosen[0])
    kept = [chosen[0]]
    for contestant in chosen[1:]:
        try:
            agree(case, contestant)
            prepare(case, contestant).call()
        except Exception as error:  # out of memory, a missing compiler
            if not every:
                raise
            tell(f"left out: {contestant.name}: {words_of(error)}")
        else:
            kept.append(contestant)
    return kept


def _heading(facts: dict[str, Any]) -> str:
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    words = [str(facts["device"]), threads, str(facts["instruction_set"])]
    words += [f"{name} {facts[name]}" for name in ("flmoe_kernels", "torch", "commit")]
    return ", ".join(words)


def _print(what: RenderableType) -> None:
    from rich.console import Console

    # rich would use 80 columns if the output is not a terminal.
    width = None if sys.stdout.isatty() else LOG_WIDTH
    Console(width=width).print(what, markup=False, highlight=False)


@contextmanager
def _telling() -> Iterator[Tell]:
    """Report the current step on stderr: as a status on a terminal, else as lines."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: console.print(Text(message), soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda message: status.update(Text(message))
