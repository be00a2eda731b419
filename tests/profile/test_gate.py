"""Tests of the regression check: verdicts, messages, attempts, the pytest plugin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flmoe_gate import gate
from flmoe_gate.floors import Floor, load_floors
from tests.support.bench_machines import given

pytest_plugins = ["pytester"]
CASE = "routing/routed_small_e4/forward/float32"
FLOOR = Floor(CASE, "reference", 1.5, tolerance=0.12)
BOUND = 2.5 * 0.88


def verdict_of(ratio: float, half: float = 0.02) -> gate.Verdict:
    return gate.Verdict(FLOOR, 2.5, "big", given(ratio, half))


def test_only_a_whole_interval_below_the_bound_fails() -> None:
    """The median may be below the bound if the true ratio may not be."""
    assert verdict_of(2.4).passed
    assert verdict_of(2.4).bound == pytest.approx(BOUND)
    assert verdict_of(BOUND * 0.95, half=0.06).passed
    assert not verdict_of(BOUND * 0.95, half=0.04).passed


# The plugin


# The calls advance a clock of their own: a busy machine would disturb real ones.
CLOCK = """
from types import SimpleNamespace
from flmoe_gate import timing

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
SPIN = '[[floor]]\ncase = "spin"\npeer = "plain"\nratio = 1.0\nseconds = 0.5\nrounds = 6\n'
PLUGIN = ("-p", "flmoe_gate", "-p", "no:cacheprovider", "-p", "no:xdist")


def run_suite(pytester: pytest.Pytester, ours: float, *arguments: str) -> pytest.RunResult:
    pytester.makeconftest(CLOCK)
    pytester.makepyfile(test_spin=SUITE.format(ours=ours))
    floors = pytester.path / "floors.toml"
    if not floors.exists():
        floors.write_text(SPIN)
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


def test_a_slower_call_fails(pytester: pytest.Pytester) -> None:
    """Negative control: our call takes 30% longer than the peer."""
    result = run_suite(pytester, 0.0052, "--gate", "floors.toml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["SLOWER: spin: expected 1.00x *; measured 0.7*"])


def test_a_floor_that_cannot_be_measured_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "def test_ours(benchmark_against):\n"
        "    benchmark_against.skip('spin', 'plain', 'cpu', 'no kernel runs here')"
    )
    (pytester.path / "floors.toml").write_text(SPIN)
    result = pytester.runpytest_subprocess(*PLUGIN, "--gate", "floors.toml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["spin vs plain has a floor * measured: no kernel runs here"])
    result.stdout.fnmatch_lines(["floors.toml: not measured in this run: spin vs plain"])
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(skipped=1)
    # Another comparison than the floor's, skipped by a marker: the run measures nothing.
    pytester.makepyfile(
        "import pytest\n@pytest.mark.skip\ndef test_ours(benchmark_against):\n    pass"
    )
    result = pytester.runpytest_subprocess(*PLUGIN, "--gate", "floors.toml")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["floors.toml: nothing was measured, so the check fails"])


def test_parallel_runs_are_refused(pytester: pytest.Pytester) -> None:
    """Tests that run at the same time would slow each other."""
    (pytester.path / "floors.toml").write_text(SPIN)
    result = pytester.runpytest_subprocess("-n", "2", "--gate", "floors.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gate: measures time, so run it without -n" in result.stderr.str()


def test_an_update_writes_the_ratios_for_the_next_run(pytester: pytest.Pytester) -> None:
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


def test_the_plugin_imports_neither_torch_nor_the_package(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import sys\n"
        "def pytest_unconfigure(): assert not {'torch', 'flmoe_kernels'} & set(sys.modules)"
    )
    pytester.makepyfile(
        test_used="def test_it(benchmark_against): benchmark_against(list, dict, seconds=0.1)",
        test_unused="def test_it(): pass",
    )
    for file, shown in (("test_unused.py", False), ("test_used.py", True)):
        result = pytester.runpytest_subprocess(*PLUGIN, file)
        result.assert_outcomes(passed=1)
        assert result.ret == 0
        assert ("test_it vs peer: " in result.stdout.str()) == shown
