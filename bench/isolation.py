"""Pytest plugin that isolates tests: if one hangs or breaks the CUDA context, only that test is lost.

For `pytest -n N -p bench.isolation`: the test's process ends, and pytest-xdist starts another for the tests that
remain.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limit", type=float, default=60.0, help="Seconds of a test.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    worker = hasattr(item.config, "workerinput")
    if worker:
        faulthandler.dump_traceback_later(item.config.getoption("--limit"), exit=True)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if worker and is_broken():
        os._exit(1)
    return result


def is_broken() -> bool:
    """Whether an earlier error, an illegal address or a failed capture, makes later calls of CUDA fail."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.rand(1, device="cuda")  # torch's generator may still belong to the failed capture
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
