"""Steps of the command `profile`: check, measure, print, write."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flmoe_kernels.core.files import unwritable_reason, write_whole

from . import output
from .cases import Case
from .ceilings import Ceilings, measure_ceilings
from .check import agree
from .environment import environment
from .profiles import Profile, Tell, profile_subjects
from .registry import Contestant, prepare, words_of
from .request import EVERY, BadRequest, Request, subjects_of, user_subjects
from .user_layer import PHASES, UserLayer, check_swap

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flmoe_kernels.published.report import SwappedLayer

LOG_WIDTH = 160


@dataclasses.dataclass(frozen=True)
class Files:
    """Output paths; None for files that are not written."""

    trace: Path | None = None
    json: Path | None = None

    def require_writable(self) -> None:
        """Check the paths. Raises BadRequest: a file cannot be written."""
        for name, path in vars(self).items():
            if path is not None and (reason := unwritable_reason(path)):
                raise BadRequest(f"{name}: {path}: {reason}")


def run_case(request: Request, seconds: float, files: Files, *, check: bool, memory: bool) -> None:
    """Profile contestants of a case of the registry.

    Raises:
        BadRequest: the request cannot be run.
        WrongAnswer: results of a contestant are wrong.
    """
    case = request.case()
    chosen = request.contestants(case)
    subjects = subjects_of(case, chosen, memory)
    with _telling() as tell:
        if check:
            tell("checking results against the reference in float64")
            chosen = _checked(case, chosen, EVERY in request.backends, tell)
            subjects = subjects_of(case, chosen, memory)
        tell("measuring this machine's ceilings")
        ceilings = measure_ceilings(case.device, (case.dtype,))
        profiles = profile_subjects(subjects, ceilings, seconds, trace=files.trace, tell=tell)
    facts = environment(case.device)
    _print_tables(profiles, _heading(facts))
    _write(profiles, ceilings, facts, files)


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


def run_layer(
    user: UserLayer,
    phase: str | None,
    seconds: float,
    files: Files,
    *,
    check: bool,
    memory: bool,
) -> None:
    """Profile a user's layer, swapped, and the reference.

    Raises:
        CheckpointError, UnsupportedRequest, BadRequest: the request cannot be run.
        backend.BackendUnavailable: the kernels do not run on the device.
    """
    user = user.checked()
    phases = _phases_of(phase)
    with _telling() as tell:
        swapped = None
        if check:
            tell("checking the swapped layer against the original")
            swapped = check_swap(user)
        subjects = {what: user_subjects(user, what, memory) for what in phases}
        first = subjects[phases[0]][0]
        tell("measuring this machine's ceilings")
        ceilings = measure_ceilings(user.device, (first.dtype,))
    facts = environment(ceilings.device)
    profiles: list[Profile] = []
    for number, what in enumerate(phases):
        with _telling() as tell:
            own = profile_subjects(
                subjects[what],
                ceilings,
                seconds,
                trace=None if number else files.trace,
                tell=tell,
            )
        # At once, because the next phase may take a while.
        _print_tables(own, "" if number else _heading(facts))
        profiles += own
    extra = {"layer": dataclasses.asdict(user), "swapped": _as_dict(swapped)}
    _write(profiles, ceilings, facts, files, **extra)


def _print_tables(profiles: Sequence[Profile], heading: str) -> None:
    if heading:
        _print(heading)
    for table in output.tables(profiles):
        _print(table)


def _write(
    profiles: Sequence[Profile],
    ceilings: Ceilings,
    facts: dict[str, Any],
    files: Files,
    **more: Any,
) -> None:
    if files.json is not None:
        write_whole(
            files.json, output.as_json(facts, profiles, ceilings=ceilings.as_dict(), **more)
        )


def _phases_of(phase: str | None) -> list[str]:
    if phase is None:
        return list(PHASES)
    # "training" and "inference", or their other names for the whole layer.
    for what, name in PHASES.items():
        if phase in (name, what, what.partition(" ")[0]):
            return [what]
    raise BadRequest(f"pass: expected training or inference, got {phase!r}")


def _as_dict(swapped: SwappedLayer | None) -> dict[str, Any] | None:
    return None if swapped is None else dataclasses.asdict(swapped)


def _heading(facts: dict[str, Any]) -> str:
    words = [str(facts["device"]), _threads(facts), str(facts["instruction_set"])]
    words += [f"{name} {facts[name]}" for name in ("flmoe_kernels", "torch", "commit")]
    return ", ".join(words)


def _threads(facts: dict[str, Any]) -> str:
    return f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"


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
