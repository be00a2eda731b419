"""`bench` and `bench compare` as commands, and the workflow that calls them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flmoe_kernels.cli.bench import app
from flmoe_kernels.core import files
from flmoe_kernels.profile import bench as running
from flmoe_kernels.profile import gate, suite
from flmoe_kernels.profile.allocator import KEEPS
from flmoe_kernels.profile.floors import Floor, load_floors
from flmoe_kernels.profile.paired import Paired
from flmoe_kernels.profile.results import load_runs
from tests.support.bench_machines import Given

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "bench.yml"
DOCS = ROOT / "docs" / "benchmarks.md"
CASES = [f"routing/routed_small_e{n}/forward/float32" for n in (4, 16)]
FLOORS = "".join(f'[[floor]]\ncase = "{case}"\npeer = "reference"\nratio = 2.0\n' for case in CASES)


@pytest.fixture
def floors(tmp_path: Path) -> Path:
    path = tmp_path / "floors.toml"
    path.write_text(FLOORS)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Ratios that the gate measures, by case; nothing is timed."""
    ratios = dict.fromkeys(CASES, 2.0)

    def measure(floor: Floor, bound: float) -> Paired:
        return Given(ratios[floor.case]).paired()

    monkeypatch.setattr(gate, "measure_here", measure)
    monkeypatch.setattr(gate, "measure_elsewhere", lambda *_: measure)
    return ratios


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_gate_passes_and_writes_what_it_found(
    floors: Path, measured: dict[str, float], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    for count in (1, 2):
        result = run("--gate", floors, "--json", out, "--append")
        assert result.exit_code == 0, result.output
        assert len(load_runs(out)) == count
    assert all(case in result.stdout for case in CASES)
    assert "no [machine] table describes this one" in result.stderr
    (_, last) = load_runs(out)
    assert [row.case for row in last.rows if row.ratio] == CASES
    assert [found["passed"] for found in last.gate] == [True, True]
    assert {"torch", "instruction_set", "commit"} <= set(last.environment)
    assert last.environment["allocator"] == KEEPS


def test_gate_fails_with_the_case_and_its_numbers(
    floors: Path, measured: dict[str, float], tmp_path: Path
) -> None:
    measured[CASES[1]] = 1.5
    result = run("--gate", floors, "--json", tmp_path / "result.json")
    assert result.exit_code == 1
    assert f"SLOWER: {CASES[1]}: expected 2.00x reference (any machine)" in result.stderr
    assert "again in a fresh process 1.50x" in result.stderr
    assert f"ok: {CASES[0]}" in result.stderr
    assert [f["passed"] for f in load_runs(tmp_path / "result.json")[0].gate] == [True, False]
    once = run("--gate", floors, "--no-retry")
    assert once.exit_code == 1
    assert "again" not in once.stderr
    assert run("--gate", floors, "--case", CASES[0]).exit_code == 0


def test_update_writes_what_the_next_gate_expects(
    floors: Path,
    measured: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = tmp_path / "mine.toml"
    measured.update(zip(CASES, (1.0, 5.0), strict=True))  # below a floor is no failure here
    with monkeypatch.context() as patched:
        patched.delattr(gate, "measure_here")  # fresh processes alone are asked
        result = run("--gate", floors, "--update", mine)
    assert result.exit_code == 0, result.output
    assert floors.read_text() == FLOORS
    assert result.stderr.count(f"{CASES[0]}: process ") == gate.UPDATE_RUNS
    (machine,) = load_floors(mine).machines
    assert list(machine.ratio.values()) == [1.0, 5.0]
    assert run("--gate", mine).exit_code == 0
    measured[CASES[1]] = 5.0 / 1.3
    slower = run("--gate", mine)
    assert slower.exit_code == 1
    assert f"expected 5.00x reference ({machine.name})" in slower.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update", "x.toml"], "--update: needs --gate FILE"),
        (["--append"], "--append: needs --json FILE"),
        (["--named", "--full"], "--named: is a set of its own"),
        (["--named", "--case", CASES[0]], "--named: is a set of its own"),
        (["--named", "--gate", "x.toml"], "--named: is a set of its own"),
        (["--markdown", "x.md"], "--markdown: holds the table of --named"),
        (["--markdown", "x.md", "--named", "--op", "routing"], "--markdown: holds the table"),
        (["--named", "--op", "nonsense"], "operator: expected one of"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--gate", "absent.toml"], "absent.toml: cannot be read"),
        (["--case", "nonsense"], "nonsense: no such case on cpu"),
        (["--op", "nonsense"], "operator: expected one of"),
        (["--plant", "nonsense:0.3"], "plant"),
        (["compare", "absent.json", "absent.json"], "absent.json: cannot be read"),
        (["compare", "absent.json", "absent.json", "--by", "mood"], "--by: expected ratio or time"),
    ],
)
def test_requests_that_cannot_be_met(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not result.stdout


def test_a_floor_of_an_unknown_case_is_told(floors: Path) -> None:
    floors.write_text(FLOORS.replace("e16", "e17"))
    result = run("--gate", floors)
    assert result.exit_code == 2
    assert f"unknown case; did you mean '{CASES[1]}'" in result.stderr


def test_a_case_is_timed_against_all_its_peers(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("--case", CASES[0], "--seconds", 0.2, "--threads", 1, "--json", out)
    assert result.exit_code == 0, result.output
    (found,) = load_runs(out)
    ours, *peers = found.rows
    assert (ours.contestant, ours.against) == ("cpu", "")
    assert peers
    assert all(row.against == "cpu" and row.ratio and row.ratio > 0 for row in peers)
    assert all(row.contestant in result.stdout for row in found.rows)
    same = run("compare", out, out)
    assert same.exit_code == 0
    assert "1.00x" in same.stdout


def test_names_are_listed_and_nothing_is_timed(measured: dict[str, float]) -> None:
    result = run("--op", "routing", "--full", "--list")
    assert result.exit_code == 0
    assert set(CASES) <= set(result.stdout.splitlines())
    assert "  reference (peer, " in result.stdout
    assert ": cannot run here: " in result.stdout


def test_compare_ends_with_1_on_a_regression(
    floors: Path, measured: dict[str, float], tmp_path: Path
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    run("--gate", floors, "--json", before)
    measured[CASES[1]] = 1.7
    run("--gate", floors, "--json", after)
    summary = tmp_path / "summary.md"
    summary.write_text("# Before\n")
    result = run("compare", before, after, "--json", "--markdown", summary)
    assert result.exit_code == 1
    changes = json.loads(result.stdout)["changes"]
    assert [change["regression"] for change in changes] == [False, True]
    assert summary.read_text().startswith("# Before\n| case |")
    assert f"**{CASES[1]}**" in summary.read_text()
    assert run("compare", before, after, "--fail-below", 0.8).exit_code == 0
    assert run("compare", after, before).exit_code == 0
    assert run("compare", before, after, "--plot", tmp_path / "x.txt").exit_code == 2


def commands_in(text: str) -> list[list[str]]:
    """Every call of this package's command line in a text, as words; continued lines count as one."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"-m flmoe_kernels (bench\b[^\n`)|;#]*)", joined)
    return [shlex.split(line.split(" ||")[0].split(" > ")[0]) for line in found]


def require_real(words: list[str]) -> None:
    """That the command line knows these words."""
    command: Any = typer.main.get_command(app)
    assert words[0] == "bench"
    rest = words[1:]
    if rest and not rest[0].startswith("-"):
        command = command.commands[rest[0]]
    known = {name for option in command.params for name in option.opts}
    unknown = [word for word in rest if word.startswith("--") and word not in known]
    assert not unknown, f"{' '.join(words)}: no option {unknown}"


@pytest.mark.parametrize("path", [WORKFLOW, DOCS], ids=lambda path: path.name)
def test_commands_that_are_written_down_exist(path: Path) -> None:
    commands = commands_in(path.read_text())
    assert {"compare" in words for words in commands} == {True, False}
    for words in commands:
        require_real(words)
    with pytest.raises(AssertionError, match="no option"):
        require_real(["bench", "--gait", "bench/floors.toml"])


def workflow_steps(text: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(text)
    return [step for job in content["jobs"].values() for step in job["steps"]]


def test_workflow_is_what_it_should_be() -> None:
    text = WORKFLOW.read_text()
    steps = workflow_steps(text)
    scripts = [step["run"] for step in steps if "run" in step]
    for script in scripts:
        plain = re.sub(r"\$\{\{.*?\}\}", "x", script)
        subprocess.run(["bash", "-n"], input=plain, text=True, check=True)
    together = "\n".join(scripts)
    # Base and head in turn, within one loop.
    assert re.search(r"for run in .*\n\s*for side in base head; do", together)
    targets = set(re.findall(r"make -C \w+ (\w+)", together))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert (ROOT / "bench" / "floors.toml").is_file()
    paths = [step["with"]["path"] for step in steps if "checkout" in step.get("uses", "")]
    assert sorted(paths) == ["base", "head"]


def test_workflow_loop_runs_in_turn(tmp_path: Path) -> None:
    """The loop itself, with a command that writes down who called it."""
    text = WORKFLOW.read_text()
    start = text.index("          mkdir -p results\n")
    script = text[start : text.index("      - name: Compare")].replace("\n          ", "\n")
    log = tmp_path / "log"

    def turns(codes: dict[str, int]) -> tuple[int, str]:
        log.write_text("")
        for side, code in codes.items():
            python = tmp_path / side / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text(f'#!/bin/sh\necho "{side} $*" >> {log}\nexit {code}\n')
            python.chmod(0o755)
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            env={"RUNS": "2", "GITHUB_WORKSPACE": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=False,
        )
        sides = [line.split()[0] for line in log.read_text().splitlines()]
        return done.returncode, " ".join(sides)

    in_turn = "base head base head"
    assert turns({"base": 0, "head": 0}) == (0, in_turn)
    assert f"--json {tmp_path}/results/head.json --append" in log.read_text()
    assert turns({"base": 1, "head": 1}) == (0, in_turn)  # below floors: judged later
    assert turns({"base": 2, "head": 0}) == (0, in_turn)
    assert turns({"base": 0, "head": 2}) == (2, "base head")


def test_commands_are_what_the_parser_says() -> None:
    """The hidden options are hidden."""
    command = typer.main.get_command(app)
    hidden = {option.name for option in command.params if getattr(option, "hidden", False)}
    assert hidden == {"only", "plant"}


def test_the_named_set_is_what_the_readme_tells_of() -> None:
    """Every case with exactly its peers: a name that is no longer in the registry would go unseen."""
    found = {entry.case.name: [peer.name for peer in entry.peers] for entry in suite.named()}
    assert len(found) == 16
    for name, peers in found.items():
        assert sorted(peers) == sorted(suite._NAMED[name.split("/")[0]][2]), name
    page = (ROOT / "README.md").read_text().partition(running.MARK)[2].partition(files.END_MARK)[0]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if " ms |" in line]
    told = {(line[0], line[1]): re.findall(r"(?:^|; )([^*]+) \*\*", line[-1]) for line in lines}
    for name, peers in found.items():
        operator, shape, phase, _, *variant = name.split("/")
        words = "training step" if "+" in phase else phase
        assert sorted(told.pop((", ".join([operator, shape, *variant]), words))) == sorted(peers)
    assert not told
    shapes = {"/".join(name.split("/")[:2]) for name in found}
    wanted = {f"{op}/{shape}" for op, (listed, *_) in suite._NAMED.items() for shape in listed}
    assert shapes == wanted


def test_the_named_set_is_measured_in_full_and_written_to_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small operator in place of the set: peaks, ceilings and the table are those of the command."""
    small = [suite.entry_of(gate.find_case(CASES[0], "cpu"), ["reference"])]
    monkeypatch.setitem(running._SETS, running.NAMED, lambda device: small)
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(f"before\n{running.MARK}\n{files.END_MARK}\nafter\n")
    result = run("--named", "--seconds", 0.2, "--markdown", page, "--json", out)
    assert result.exit_code == 0, result.output
    [found] = load_runs(out)
    assert found.ceilings is not None
    assert found.ceilings["bytes_per_second"] > 0
    ours, peer = found.details[0]["contestants"]
    assert peer["name"] == "reference"
    assert ours["share_of_roofline"] > 0
    [line] = [line for line in page.read_text().splitlines() if line.startswith("| routing")]
    assert f"reference **{peer['ratio']:.2f}x**" in line
    assert f"| {ours['peak_bytes'] / 2**20:.0f} MiB |" in line
    assert found.environment["commit"] in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    page.write_text("no marks\n")
    refused = run("--named", "--markdown", page)
    assert refused.exit_code == 2
    assert "to write between" in refused.stderr
