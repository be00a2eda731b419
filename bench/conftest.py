"""Options of the benchmarks, and parametrization of bench/test_peers.py by the comparisons."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bench.suite import comparisons, options
from flmoe_kernels.profile.cases import OPERATORS
from flmoe_kernels.profile.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="Large shapes and slow peers; takes half an hour."
    )
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption(
        "--lines", default=os.devnull, help="File for the results of bench/targets.py."
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comparison" in metafunc.fixturenames:
        parameters = [
            pytest.param(x, marks=[pytest.mark.table] if x.table else [], id=str(x))
            for operator in OPERATORS
            for x in comparisons(operator, *options(metafunc.config))
        ]
        metafunc.parametrize("comparison", parameters)


@pytest.fixture
def full(pytestconfig: pytest.Config) -> bool:
    return options(pytestconfig)[1]


@pytest.fixture
def cpu_only(pytestconfig: pytest.Config) -> None:
    """Skip tests of limits that hold only for the CPU."""
    if options(pytestconfig)[0] != "cpu":
        pytest.skip("the limit holds only for the CPU")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["flmoe_kernels"] = environment(options(config)[0])
