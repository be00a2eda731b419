"""The command `bench`: time the kernels against their peers, hold them to floors, compare two results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

from .errors import fail, needs_extra

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flmoe_kernels.profile import suite
    from flmoe_kernels.profile.floors import Floor, Floors, Here
    from flmoe_kernels.profile.gate import Verdict
    from flmoe_kernels.profile.results import Row

LOG_WIDTH = 160

app = typer.Typer(help="Time the kernels against their peers; gate; compare two results.")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    gate: Annotated[
        Path | None, typer.Option(help="Floors to hold this machine to; exit code 1 below one.")
    ] = None,
    case: Annotated[
        str | None, typer.Option(help="One case, e.g. pair_moe/pair_base/forward/float32/pool.")
    ] = None,
    op: Annotated[str | None, typer.Option(help="The cases of one operator.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every case or floor, not the quick set alone.")
    ] = False,
    named: Annotated[
        bool,
        typer.Option(
            "--named", help="The README's set: the large named shapes, with memory and ceilings."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[
        float, typer.Option(help="At most so long for a case; a gate's file has its own.")
    ] = 8.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default torch's own; a gate's file has its own.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="As one more run of the --json file.")
    ] = False,
    markdown: Annotated[
        Path | None,
        typer.Option(help="With --named: write the table to this page, between its two marks."),
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="Write this machine's ratios to this file of floors.")
    ] = None,
    no_retry: Annotated[
        bool, typer.Option("--no-retry", help="Below a floor is below: no second process.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="Print names of cases and contestants, time nothing.")
    ] = False,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    plant: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time the kernels against their peers: all cases, one, an operator's, or those of a file of floors.

    Without --gate the quick set is every operator at a small shape, forward and forward+backward.
    """
    if context.invoked_subcommand is not None:
        return
    if device not in ("cpu", "cuda"):
        fail(f"--device: expected cpu or cuda, got {device!r}")
    if update is not None and gate is None:
        fail("--update: needs --gate FILE, which says what is to be measured")
    if append and json_file is None:
        fail("--append: needs --json FILE")
    if named and (full or case is not None or gate is not None):
        fail("--named: is a set of its own, next to --full, --case and --gate")
    if markdown is not None and (not named or op is not None):
        fail("--markdown: holds the table of --named, all of it")
    _plant(plant)
    if listing:
        _list(_Cases(case, op, full, named, device))
        return
    if gate is None:
        how = _How(seconds, threads, json_file, append, markdown)
        _run(_Cases(case, op, full, named, device), how)
        return
    chosen = _Chosen(device, case, op, full, only)
    retry = not no_retry and update is None
    _gate(gate, chosen, retry, plant, json_file, append, update)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A file of bench --json.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    by: Annotated[
        str, typer.Option(help="What counts: ratio (to the peer beside it) or time.")
    ] = "ratio",
    fail_below: Annotated[
        float, typer.Option(help="Exit code 1 where AFTER is surely below this speed of BEFORE.")
    ] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Append the table to this file as Markdown.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .svg or .pdf.")] = None,
) -> None:
    """Compare two results, of two commits or two machines; exit code 1 on a significant regression."""
    from flmoe_kernels.profile import compare as comparing
    from flmoe_kernels.profile.results import ResultError, load_runs

    if by not in comparing.BY:
        fail(f"--by: expected {' or '.join(comparing.BY)}, got {by!r}")
    try:
        comparison = comparing.compare(
            load_runs(before), load_runs(after), by=by, fail_below=fail_below
        )
    except (ResultError, ValueError) as error:
        fail(str(error))
    if as_json:
        import json

        typer.echo(json.dumps(comparison.as_dict(), indent=2))
    else:
        _print(comparing.table(comparison))
        typer.echo(comparison.summary())
    if markdown is not None:
        with markdown.open("a", encoding="utf-8") as file:
            file.write(comparing.markdown(comparison))
    if plot is not None:
        with needs_extra("demo"):
            from flmoe_kernels.profile.compare_plot import save_figure

            try:
                save_figure(comparison, plot)
            except ValueError as error:
                fail(str(error))
    raise typer.Exit(code=1 if comparison.regressions else 0)


class _Cases(NamedTuple):
    """Which cases are meant."""

    case: str | None
    op: str | None
    full: bool
    named: bool
    device: str

    def entries(self) -> list[suite.Entry]:
        from flmoe_kernels.profile import bench as running

        which = running.FULL if self.full else running.NAMED if self.named else running.QUICK
        return running.choose(self.case, self.op, which, self.device)


class _How(NamedTuple):
    """How they are timed, and where the result goes."""

    seconds: float
    threads: int | None
    json_file: Path | None
    append: bool
    markdown: Path | None


class _Chosen(NamedTuple):
    """Which floors are meant; only: one, by its key."""

    device: str
    case: str | None
    op: str | None
    full: bool
    only: str | None


def _gate(
    path: Path,
    wanted: _Chosen,
    retry: bool,
    plant: str | None,
    json_file: Path | None,
    append: bool,
    update: Path | None,
) -> None:
    from flmoe_kernels.profile.allocator import keep_freed_memory
    from flmoe_kernels.profile.gate import gate_table

    keep_freed_memory()
    floors = _load(path)
    here = _here(wanted.device)
    if floors.machine(here) is None:
        note = "no [machine] table describes this one: the low floors of any machine apply"
        typer.echo(f"{path}: {note} ({here.device or here.cpu}, {here.isa})", err=True)
    chosen = _choose(floors, wanted)
    verdicts = _verdicts(path, floors, chosen, here, retry, plant, update is not None)
    _print(gate_table(verdicts))
    if json_file is not None:
        _save_gate(json_file, append, wanted.device, verdicts)
    if update is not None:
        _update(update, path, here, verdicts)
    elif not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(code=1)


def _plant(plant: str | None) -> None:
    if plant is None:
        return
    from flmoe_kernels.profile.plant import plant as do_plant

    try:
        do_plant(plant)
    except ValueError as error:
        fail(str(error))


def _load(path: Path) -> Floors:
    from flmoe_kernels.profile.floors import FloorsError, load_floors
    from flmoe_kernels.profile.gate import known_cases

    try:
        return load_floors(path, known_cases())
    except FloorsError as error:
        fail(str(error))


def _here(device: str) -> Here:
    import torch

    from flmoe_kernels.core.backend import instruction_set
    from flmoe_kernels.profile.contestants import device_lack
    from flmoe_kernels.profile.environment import cpu_model, device_name
    from flmoe_kernels.profile.floors import Here

    lack = device_lack(device)
    if lack:
        fail(f"--device {device}: {lack}")
    gpu = "" if device == "cpu" else device_name(device)
    return Here(cpu_model(), instruction_set(), gpu, torch.__version__)


def _choose(floors: Floors, wanted: _Chosen) -> list[Floor]:
    from flmoe_kernels.profile.gate import choose

    if wanted.only is not None:
        return [floor for floor in floors.floors if floor.key == wanted.only]
    try:
        return choose(floors, wanted.device, wanted.case, wanted.op, wanted.full)
    except LookupError as error:
        fail(str(error.args[0]))


def _verdicts(
    path: Path,
    floors: Floors,
    chosen: list[Floor],
    here: Here,
    retry: bool,
    plant: str | None,
    update: bool,
) -> list[Verdict]:
    from flmoe_kernels.profile import gate
    from flmoe_kernels.profile.check import WrongAnswer

    elsewhere = gate.measure_elsewhere(path, plant)
    again = elsewhere if retry else None
    found = []

    def tell(floor: Floor, run: int) -> None:
        typer.echo(f"{floor.case}: process {run + 1} of {gate.UPDATE_RUNS}", err=True)

    try:
        for verdict in (
            gate.survey(floors, chosen, here, elsewhere, tell)
            if update
            else gate.run_gate(floors, chosen, here, gate.measure_here, again)
        ):
            typer.echo(verdict.message(), err=True)
            found.append(verdict)
    except gate.Unmeasured as error:
        fail(str(error))
    except WrongAnswer as error:
        _wrong(error)
    return found


def _wrong(error: Exception) -> NoReturn:
    from flmoe_kernels.profile.gate import WRONG

    typer.echo(f"{WRONG}{error}", err=True)
    raise typer.Exit(code=1)


def _print(table: RenderableType) -> None:
    from rich.console import Console

    # A log has no width of its own, and rich would take 80 columns.
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


def _save_gate(path: Path, append: bool, device: str, verdicts: list[Verdict]) -> None:
    from flmoe_kernels.profile.environment import environment
    from flmoe_kernels.profile.results import rows_of

    rows: list[Row] = []
    for verdict in verdicts:
        floor, paired = verdict.floor, verdict.attempts[-1]
        rows += rows_of(floor.case, floor.ours, floor.peer, floor.threads, paired)
    found = [verdict.as_dict() for verdict in verdicts]
    _save(path, append, environment(device), rows, gate=found)


def _save(
    path: Path, append: bool, environment: dict[str, Any], rows: list[Row], **more: Any
) -> None:
    from flmoe_kernels.profile.results import ResultError, Run, save_run

    try:
        save_run(path, Run(environment, rows, **more), append)
    except (ResultError, OSError) as error:
        fail(str(error))


def _update(path: Path, source: Path, here: Here, verdicts: list[Verdict]) -> None:
    from flmoe_kernels.profile.floors import FloorsError, machine_of, update_file

    ratios = {verdict.floor.key: verdict.attempts[-1].ratio for verdict in verdicts}
    try:
        name = update_file(path, source, machine_of(here, ratios))
    except (FloorsError, OSError) as error:
        fail(str(error))
    typer.echo(f"{path}: [machine.{name}] holds the ratios of this machine now", err=True)


def _list(wanted: _Cases) -> None:
    _here(wanted.device)
    for entry in _entries(wanted):
        typer.echo(entry.case.name)
        for one in (*entry.all, *entry.left_out):
            reason = f": cannot run here: {one.why_not}" if one.why_not else ""
            typer.echo(f"  {one.name} ({one.kind}, {one.version}){reason}")


def _entries(wanted: _Cases) -> list[suite.Entry]:
    from flmoe_kernels.core.backend import BackendUnavailable
    from flmoe_kernels.profile.gate import Unmeasured

    try:
        return wanted.entries()
    except (Unmeasured, BackendUnavailable, ValueError) as error:
        fail(str(error))


def _run(wanted: _Cases, how: _How) -> None:
    import torch

    from flmoe_kernels.profile import bench as running
    from flmoe_kernels.profile.ceilings import measure_ceilings
    from flmoe_kernels.profile.check import WrongAnswer
    from flmoe_kernels.profile.environment import environment

    _here(wanted.device)
    entries = _entries(wanted)
    if how.markdown is not None:
        _require_marks(how.markdown)
    threads = how.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    # Once, and before a file of the checkout is written.
    facts = environment(wanted.device)
    ceilings = measure_ceilings(wanted.device) if wanted.named else None
    rows: list[Row] = []
    details = []
    try:
        for entry in entries:
            typer.echo(f"{entry.case.name} ...", err=True)
            found = running.measure(entry, how.seconds, threads, wanted.named, ceilings)
            for message in found.left_out:
                typer.echo(f"  left out: {message}", err=True)
            rows += found.rows
            details.append(found.details)
    except ValueError as error:
        fail(str(error))
    except WrongAnswer as error:
        _wrong(error)
    _print(running.table(rows))
    if how.json_file is not None:
        more = {"details": details, "ceilings": ceilings.as_dict() if ceilings else None}
        _save(how.json_file, how.append, facts, rows, **more)
    if how.markdown is not None:
        _write_markdown(how.markdown, details, facts)


def _require_marks(path: Path) -> None:
    """Before minutes of timing."""
    from flmoe_kernels.core.files import require_marks
    from flmoe_kernels.profile.bench import MARK

    try:
        require_marks(path, MARK)
    except (OSError, ValueError) as error:
        fail(f"--markdown: {error}")


def _write_markdown(path: Path, details: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    from flmoe_kernels.core.files import write_marked
    from flmoe_kernels.profile import bench as running

    try:
        write_marked(path, running.MARK, running.markdown(details, environment))
    except (OSError, ValueError) as error:
        fail(f"--markdown: {error}")
