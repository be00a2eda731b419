"""Tests of the regression check: verdicts, messages, attempts, the pytest plugin."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flmoe_kernels.profile import gate
from flmoe_kernels.profile.environment import KEEPS_MEMORY
from flmoe_kernels.profile.floors import Floor, load_floors
from flmoe_kernels.profile.timing import Paired
from tests.support.bench_machines import given

pytest_plugins = ["pytester"]
CASE = "routing/routed_small_e4/forward/float32"
FLOOR = Floor(CASE, "reference", 1.5, tolerance=0.12)
BOUND = 2.5 * 0.88


def never(bound: float) -> Paired:
    raise AssertionError("measured again")


def verdict_of(*ratios: float, half: float = 0.02) -> gate.Verdict:
    """Verdict if the attempts give these ratios; asserts that all of them are used."""
    left = [given(ratio, half) for ratio in ratios]

    def attempt(bound: float) -> Paired:
        assert bound == pytest.approx(BOUND)
        return left.pop(0)

    verdict = gate.judge(FLOOR, 2.5, "big", attempt, attempt)
    assert not left
    return verdict


def test_a_ratio_that_reaches_the_bound_passes_at_once() -> None:
    verdict = gate.judge(FLOOR, 2.5, "big", lambda bound: given(2.4), never)
    assert verdict.passed
    assert verdict.bound == pytest.approx(BOUND)


def test_an_interval_that_reaches_the_bound_is_no_regression() -> None:
    """The median is below the bound, but the true ratio may not be."""
    assert verdict_of(BOUND * 0.95, half=0.06).passed
    assert not verdict_of(BOUND * 0.95, BOUND * 0.95, half=0.04).passed


def test_it_fails_only_if_a_second_attempt_fails_too() -> None:
    assert verdict_of(1.9, 2.4).passed
    assert not verdict_of(1.9, 1.92).passed


def test_the_message_names_case_expectation_and_measurements() -> None:
    message = verdict_of(1.9, 1.92).message()
    for part in (
        *("SLOWER", CASE, "expected 2.50x reference (big)", "at least 2.20x", "tolerance of 12%"),
        "measured 1.90x (1.86 to 1.94 for the median of 30 rounds",
        "again in a fresh process 1.92x (1.88 to 1.96",
    ):
        assert part in message
    assert verdict_of(2.4).message().startswith(f"ok: {CASE}: expected 2.50x")


def test_an_update_uses_the_median_of_its_runs() -> None:
    assert gate.middle(map(given, (2.0, 9.0, 2.5))).ratio.median == 2.5


def test_a_new_process_gets_the_options_without_paths_or_result_files() -> None:
    arguments = ["bench/", "--gate", "bench/floors.toml", "-q", "--benchmark-json", "x.json"]
    arguments += ["--benchmark-columns=median", "--benchmark-only", "bench/test_a.py", "--full"]
    options = gate.carried_options(arguments, ["bench/", "bench/test_a.py"])
    assert options == ["--gate", "bench/floors.toml", "-q", "--full"]
    assert gate.carried_options(["slow", "-k", "slow"], ["slow"]) == ["-k", "slow"]


# The plugin


# The calls advance a clock of their own: a busy machine would disturb real ones.
CLOCK = """
from types import SimpleNamespace
from flmoe_kernels.profile import timing

now = [0.0]
timing.time = SimpleNamespace(process_time=lambda: now[0])
"""
SUITE = """
from conftest import now

def work(seconds):
    def call():
        now[0] += seconds
    return call

def test_ours(benchmark_against):
    benchmark_against(work({ours}), work(0.004), name="spin", peer_name="plain")
"""
SPIN = '[[floor]]\ncase = "spin"\npeer = "plain"\nratio = {ratio}\nseconds = 0.5\nrounds = 6\n'
PLUGIN = ("-p", "flmoe_gate", "-p", "no:cacheprovider", "-p", "no:xdist")


def run_suite(
    pytester: pytest.Pytester, ours: float, *arguments: str, ratio: float = 1.0
) -> pytest.RunResult:
    pytester.makeconftest(CLOCK)
    pytester.makepyfile(test_spin=SUITE.format(ours=ours))
    floors = pytester.path / "floors.toml"
    if not floors.exists():
        floors.write_text(SPIN.format(ratio=ratio))
    return pytester.runpytest_subprocess(*PLUGIN, *arguments)


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    # pytest-benchmark disables itself if this variable of parallel runs is set.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_an_equal_call_passes_and_is_recorded(pytester: pytest.Pytester) -> None:
    result = run_suite(pytester, 0.004, "--gate", "floors.toml", "--benchmark-json", "out.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["ok: spin: expected 1.00x plain (any machine)*"])
    result.stdout.fnmatch_lines(["*no ?machine? table describes this machine*"])
    written = json.loads((pytester.path / "out.json").read_text())
    facts = written["benchmarks"][0]["extra_info"]
    assert (facts["case"], facts["peer"], facts["clock"]) == ("spin", "plain", "processor")
    assert facts["ratio"]["low"] <= facts["ratio"]["median"] <= facts["ratio"]["high"]
    assert facts["passed"]
    machine = written["machine_info"]["flmoe_kernels"]
    assert {"torch", "instruction_set", "commit"} <= set(machine)
    assert machine["allocator"] == KEEPS_MEMORY


def test_a_slower_call_fails_after_a_second_process(pytester: pytest.Pytester) -> None:
    """Negative control: our call takes 30% longer than the peer."""
    result = run_suite(pytester, 0.0052, "--gate", "floors.toml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["SLOWER: spin: expected 1.00x *; again in a fresh process 0.7*"])


def test_a_floor_that_cannot_be_measured_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "def test_ours(benchmark_against):\n"
        "    benchmark_against.skip('spin', 'plain', 'cpu', 'no kernel runs here')"
    )
    (pytester.path / "floors.toml").write_text(SPIN.format(ratio=1.0))
    result = pytester.runpytest_subprocess(*PLUGIN, "--gate", "floors.toml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["spin vs plain has a floor * measured: no kernel runs here"])
    result.stdout.fnmatch_lines(["floors.toml: not measured in this run: spin vs plain"])
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(skipped=1)


def test_parallel_runs_are_refused(pytester: pytest.Pytester) -> None:
    """Tests that run at the same time would slow each other."""
    (pytester.path / "floors.toml").write_text(SPIN.format(ratio=1.0))
    result = pytester.runpytest_subprocess("-n", "2", "--gate", "floors.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gate: measures time, so run it without -n" in result.stderr.str()


@pytest.mark.slow
def test_an_update_writes_the_ratios_for_the_next_run(pytester: pytest.Pytester) -> None:
    """Takes six processes, each of which imports torch."""
    result = run_suite(pytester, 0.002, "--gate", "floors.toml", "--gate-update")
    result.assert_outcomes(passed=1)
    [machine] = load_floors(pytester.path / "floors.toml").machines
    assert machine.ratio["spin vs plain"] == pytest.approx(2.0, rel=0.1)
    slower = run_suite(pytester, 0.0026, "--gate", "floors.toml")
    slower.assert_outcomes(failed=1)
    slower.stdout.fnmatch_lines([f"*({machine.name})*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gate-update",), "--gate-update: needs --gate FILE"),
        (("--gate", "absent.toml"), "--gate: absent.toml: cannot be read"),
    ],
)
def test_a_wrong_use_is_an_error(
    pytester: pytest.Pytester, arguments: tuple[str, ...], message: str
) -> None:
    result = run_suite(pytester, 0.002, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str()


def test_settings_and_files_that_cannot_be_used_are_an_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pytester.path / "floors.toml").symlink_to("/dev/null")
    result = run_suite(pytester, 0.002, "--gate", "floors.toml", "--gate-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    monkeypatch.setenv("FLMOE_BACKEND", "nope")
    result = run_suite(pytester, 0.002, "--gate", "floors.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "FLMOE_BACKEND: expected one of reference" in result.stderr.str()


def test_an_update_that_cannot_be_written_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> str:
        raise OSError("floors.toml: cannot be written: No space left on device")

    floors = tmp_path / "floors.toml"
    floors.write_text(SPIN.format(ratio=1.0))
    options = {"--gate": str(floors), "--gate-update": True}
    monkeypatch.setattr(gate, "keep_freed_memory", lambda: None)
    state = gate.Gate(SimpleNamespace(getoption=options.get))  # type: ignore[arg-type]
    state.updates["cpu"] = {"spin vs plain": 2.0}
    monkeypatch.setattr(gate, "update_file", full)
    terminal = SimpleNamespace(section=lambda text: None, write_line=lambda text: None)
    with pytest.raises(pytest.exit.Exception, match="cannot be written: No space left") as ended:
        state.finish(terminal)
    assert ended.value.returncode == pytest.ExitCode.USAGE_ERROR
    monkeypatch.setattr(gate, "unwritable_reason", lambda path: "cannot be written")
    with pytest.raises(gate.FloorsError, match=r"floors\.toml: cannot be written"):
        gate.Gate(SimpleNamespace(getoption=options.get))  # type: ignore[arg-type]


def test_a_run_that_does_not_use_the_plugin_imports_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\ndef test_it(): assert not {'torch', 'flmoe_kernels'} & set(sys.modules)"
    )
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(passed=1)
    assert "benchmarks against peers" not in result.stdout.str()


def test_the_wheel_declares_the_plugin() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\nflmoe_gate = "flmoe_gate"' in text
    assert 'py-modules = ["flmoe_gate"]' in text
