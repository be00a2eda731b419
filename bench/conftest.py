"""Options of the benchmarks; a suite test_OPERATOR.py gets the comparisons of its operator."""

from __future__ import annotations

import pytest

from bench.suite import comparisons, options


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="The large named shapes and slow peers: half an hour."
    )
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comparison" in metafunc.fixturenames:
        operator = metafunc.module.__name__.rpartition("test_")[2]
        found = comparisons(operator, *options(metafunc.config))
        metafunc.parametrize("comparison", list(found), ids=str)


@pytest.fixture
def full(pytestconfig: pytest.Config) -> bool:
    return options(pytestconfig)[1]


@pytest.fixture
def cpu_only(pytestconfig: pytest.Config) -> None:
    """For limits that are stated for the CPU."""
    if options(pytestconfig)[0] != "cpu":
        pytest.skip("a limit on the CPU")
