"""The gate: is every operator still as far ahead of its peer as the file of floors expects?

A comparison fails when the whole interval of its median ratio lies below expected * (1 - tolerance), twice: the
second time in a fresh process, because what one process is dealt (where its buffers lie, a burst of other work on
the machine) is not a regression. Both attempts see a real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .floors import DEVICES, Floor, Floors, Here
from .paired import Blocks, Paired, Seconds

if TYPE_CHECKING:
    from rich.table import Table

    from .cases import Case
    from .prepared import Contestant

UPDATE_RUNS = 3
# What `bench` begins the line with that tells of a wrong answer.
WRONG = "WRONG: "
# A floor, and the ratio that it must reach -> what was measured.
Measure = Callable[[Floor, float], Paired]


class Unmeasured(RuntimeError):
    """A comparison cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found of one floor.

    Attributes:
        expected: the ratio, and `source` says whose: a machine's table, or "any machine".
        attempts: what was measured, one or two of them; the last decides.
    """

    floor: Floor
    expected: float
    source: str
    attempts: tuple[Paired, ...]

    @property
    def bound(self) -> float:
        """The ratio that the interval must reach."""
        return bound_of(self.floor, self.expected)

    @property
    def passed(self) -> bool:
        return any(not falls_short(paired, self.bound) for paired in self.attempts)

    def message(self) -> str:
        """One paragraph: operator, pass, shape, what was expected and what was measured, with its spread."""
        measured = "; again in a fresh process ".join(_spread(paired) for paired in self.attempts)
        return (
            f"{'ok' if self.passed else 'SLOWER'}: {self.floor.case}: expected {self.expected:.2f}x "
            f"{self.floor.peer} ({self.source}), at least {self.bound:.2f}x with a tolerance of "
            f"{self.floor.tolerance:.0%}; measured {measured}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return {
            **asdict(self.floor),
            "expected": self.expected,
            "source": self.source,
            "bound": self.bound,
            "passed": self.passed,
            "attempts": [asdict(paired) for paired in self.attempts],
        }


def _spread(paired: Paired) -> str:
    return (
        f"{paired.ratio:.2f}x ({paired.low:.2f} to {paired.high:.2f} for the median of "
        f"{paired.rounds} rounds, {paired.p20:.2f} to {paired.p80:.2f} in single ones)"
    )


def bound_of(floor: Floor, expected: float) -> float:
    """The ratio that the upper end of the interval must reach."""
    return expected * (1 - floor.tolerance)


def falls_short(paired: Paired, bound: float) -> bool:
    """Whether even the upper end of the interval is below the bound."""
    return paired.high < bound


def judge(
    floor: Floor, expected: float, source: str, first: Measure, again: Measure | None
) -> Verdict:
    """Measure one floor, and once more by `again`, if there is one, where it falls short."""
    bound = bound_of(floor, expected)
    verdict = Verdict(floor, expected, source, (first(floor, bound),))
    if verdict.passed or again is None:
        return verdict
    return Verdict(floor, expected, source, (*verdict.attempts, again(floor, bound)))


def run_gate(
    floors: Floors, chosen: Iterable[Floor], here: Here, first: Measure, again: Measure | None
) -> Iterator[Verdict]:
    """Verdicts of the chosen floors, as they come."""
    for floor in chosen:
        yield judge(floor, *floors.expected(floor, here), first, again)


def survey(
    floors: Floors,
    chosen: Sequence[Floor],
    here: Here,
    measure: Measure,
    report: Callable[[Floor, int], None],
) -> Iterator[Verdict]:
    """What `--update` writes: of each floor the median of UPDATE_RUNS measurements, all floors in turn.

    report: called with each floor and the number of its measurement, from 0 on, before that is made.

    What is expected from now on is worth more than one look: a process keeps the places of its buffers, and a
    machine has moods of minutes.
    """
    found: dict[str, list[Paired]] = {floor.key: [] for floor in chosen}
    for run in range(UPDATE_RUNS):
        for floor in chosen:
            report(floor, run)
            expected, source = floors.expected(floor, here)
            measured = found[floor.key]
            measured.append(measure(floor, bound_of(floor, expected)))
            if run == UPDATE_RUNS - 1:
                middle = sorted(measured, key=lambda paired: paired.ratio)[UPDATE_RUNS // 2]
                yield Verdict(floor, expected, source, (middle,))


def gate_table(verdicts: Iterable[Verdict]) -> Table:
    """What the gate found, a line for each floor."""
    from rich.table import Table

    table = Table("case", "peer", "expected", "at least", "measured", "median in", "rounds", "")
    for verdict in verdicts:
        paired = verdict.attempts[-1]
        table.add_row(
            verdict.floor.case,
            verdict.floor.peer,
            f"{verdict.expected:.2f}x",
            f"{verdict.bound:.2f}x",
            f"{paired.ratio:.2f}x",
            f"{paired.low:.2f} to {paired.high:.2f}",
            str(paired.rounds),
            "ok" if verdict.passed else "SLOWER",
        )
    return table


def choose(
    floors: Floors, device: str, case: str | None, op: str | None, full: bool
) -> list[Floor]:
    """Floors on a device of a case or an operator, or all; the quick ones, unless `full` or a case is named.

    Raises:
        LookupError: there are none.
    """
    found = [
        floor
        for floor in floors.floors
        if floor.device == device
        and case in (None, floor.case)
        and op in (None, floor.case.split("/")[0])
        and (full or floor.quick or case is not None)
    ]
    if not found:
        wanted = {"device": device, "case": case, "operator": op}
        words = ", ".join(f"{key} {value}" for key, value in wanted.items() if value)
        raise LookupError(f"no floor of {words}" + ("" if full else "; maybe with --full"))
    return found


def known_cases() -> set[str]:
    """Names of all cases that a floor can be of, on any kind of device."""
    from .cases import DTYPES, cases

    return {c.name for device in DEVICES for c in cases(dtypes=list(DTYPES), device=device)}


def measure_here(floor: Floor, bound: float) -> Paired:
    """Measure a floor in this process: checks that both are right, then times them.

    It goes on for longer where the interval of the ratio has `bound` in it.

    Raises:
        Unmeasured: there is no such case or contestant, or it cannot run here.
        WrongAnswer: one is wrong; nothing is timed then.
    """
    case = find_case(floor.case, floor.device)
    chosen = {name: _contestant(case, name) for name in (floor.ours, floor.peer)}

    def decided(blocks: Blocks) -> bool:
        found = blocks.pair(floor.ours, floor.peer)
        return not found.low <= bound <= found.high

    blocks = measure_case(
        case,
        list(chosen.values()),
        threads=floor.threads,
        rounds=floor.rounds,
        precision=floor.precision,
        seconds=floor.seconds,
        decided=decided,
    )
    return blocks.pair(floor.ours, floor.peer)


def find_case(name: str, device: str) -> Case:
    """The case of this name.

    Raises:
        Unmeasured: there is none on this device.
    """
    from .cases import DTYPES, cases

    for case in cases(dtypes=list(DTYPES), device=device):
        if case.name == name:
            return case
    raise Unmeasured(f"{name}: no such case on {device}")


def measure_case(
    case: Case,
    chosen: Sequence[Contestant],
    *,
    threads: int,
    rounds: int,
    precision: float,
    seconds: float,
    decided: Callable[[Blocks], bool] | None = None,
) -> Blocks:
    """Time contestants of a case in turn, the first against the others, after all were found correct.

    Raises:
        WrongAnswer: one computes something else; nothing is timed then.
    """
    import torch

    from .check import agree
    from .contestants import prepare
    from .paired import clock_for, measure_blocks

    agree(case, *chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_blocks(
            lambda: {contestant.name: prepare(case, contestant).call for contestant in chosen},
            clock_for(case.device, threads),
            rounds=rounds,
            precision=precision,
            seconds=seconds,
            decided=decided,
        )
    finally:
        torch.set_num_threads(before)


def _contestant(case: Case, name: str) -> Contestant:
    from .contestants import contestants

    known = {contestant.name: contestant for contestant in contestants(case)}
    if name not in known:
        raise Unmeasured(f"{case.name}: no contestant {name!r}; there are: {', '.join(known)}")
    if known[name].why_not:
        raise Unmeasured(f"{case.name}: {name} cannot run here: {known[name].why_not}")
    return known[name]


def measure_elsewhere(file: Path, plant: str | None = None) -> Measure:
    """Measure floors of a file in a fresh process of this Python, which finds the bound in the file itself.

    Returns a function that raises WrongAnswer where one of the two is wrong, and Unmeasured where the process
    fails, with its own words.
    """
    from .check import WrongAnswer

    def measure(floor: Floor, bound: float) -> Paired:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "again.json"
            command = [sys.executable, "-m", "flmoe_kernels", "bench", "--gate", str(file)]
            command += ["--device", floor.device, "--only", floor.key]
            command += ["--no-retry", "--json", str(out)]
            command += ["--plant", plant] if plant else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            _, wrong, words = done.stderr.partition(WRONG)
            if done.returncode == 1 and wrong:
                raise WrongAnswer(words.strip())
            if done.returncode not in (0, 1) or not out.is_file():
                raise Unmeasured(
                    f"{floor.case}: a fresh process ended with {done.returncode}: {done.stderr.strip()}"
                )
            (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
        return paired_from(run["gate"][0]["attempts"][0])

    return measure


def paired_from(fields: dict[str, Any]) -> Paired:
    """What `Verdict.as_dict` wrote of one attempt."""
    seconds = {name: Seconds(**fields[name]) for name in ("ours", "peer")}
    return Paired(**{**fields, **seconds})
