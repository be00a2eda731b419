"""Pytest plugin: benchmarks against a peer in the same run, checked against a file of floors.

Where flmoe_kernels is installed, pytest loads this plugin in every run. It needs only
pytest-benchmark and imports neither flmoe_kernels nor torch.
"""

from __future__ import annotations

from typing import Any

import pytest

from .gate import Against, Gate

__all__ = [
    "benchmark_against",
    "pytest_addoption",
    "pytest_configure",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
]
_GATE = "_flmoe_gate"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate", "benchmarks against a peer in the same run (flmoe_kernels)")
    group.addoption(
        "--gate",
        metavar="FILE",
        help="Fail if the whole interval of a ratio is below its floor in this TOML file.",
    )
    group.addoption(
        "--gate-update",
        action="store_true",
        help="Write this machine's ratios to the --gate file instead.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gate"):
        if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
            raise pytest.UsageError("--gate: measures time, so run it without -n")
        _gate(config)
    elif config.getoption("--gate-update"):
        raise pytest.UsageError("--gate-update: needs --gate FILE")


def _gate(config: pytest.Config) -> Gate:
    if not hasattr(config, _GATE):
        try:
            setattr(config, _GATE, Gate(config))
        except ValueError as error:  # FloorsError
            raise pytest.UsageError(f"--gate: {error}") from error
    gate: Gate = getattr(config, _GATE)
    return gate


@pytest.fixture
def benchmark_against(request: pytest.FixtureRequest, benchmark: Any) -> Against:
    """Time a callable and its peer in turn: `benchmark_against(ours, peer, name=..., peer_name=...)`.

    The ratio and its interval are stored in `extra_info` of the benchmark; with --gate, a ratio below its floor
    fails the test. See `flmoe_gate.gate.Against`.
    """
    return Against(_gate(request.config), request, benchmark)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With --gate, a run fails if it selects comparisons and measures none."""
    gate: Gate | None = getattr(session.config, _GATE, None)
    passed = exitstatus == pytest.ExitCode.OK and not session.config.option.collectonly
    selected = any("benchmark_against" in getattr(x, "fixturenames", ()) for x in session.items)
    if gate is not None and gate.path and passed and selected and not gate.measured:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        gate.lines.append(f"{gate.path}: nothing was measured, so the check fails")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    gate: Gate | None = getattr(config, _GATE, None)
    if gate is not None:
        gate.finish(terminalreporter)
