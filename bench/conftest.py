"""What a run of these suites compares: the quick set of the registry, or with --full all of it."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gates import comparisons
from flmoe_kernels.profile.allocator import keep_freed_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="every case and peer of the registry: an hour or more"
    )


def pytest_configure() -> None:
    """Before the first comparison, and as `bench --gate` does it, whose floors these are."""
    keep_freed_memory()


def pytest_generate_tests(metafunc: Any) -> None:
    """A test file test_OPERATOR.py gets the comparisons of its operator."""
    if "comparison" in metafunc.fixturenames:
        operator = metafunc.module.__name__.rpartition("test_")[2]
        found = comparisons(operator, metafunc.config.getoption("--full"))
        metafunc.parametrize("comparison", found, ids=str)
