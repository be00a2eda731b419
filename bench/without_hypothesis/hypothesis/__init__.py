"""Stands in for hypothesis on a machine without it: property tests are skipped, the rest of their file runs.

bench/gpu.sh puts this folder on the path there, and only there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.without_hypothesis.hypothesis import strategies


def given(*arguments: Any, **named: Any) -> Callable[[Callable], Callable]:
    def skipped(test: Callable) -> Callable:
        @pytest.mark.skip(reason="hypothesis is not installed")
        def stand_in() -> None: ...

        stand_in.__name__, stand_in.__doc__ = test.__name__, test.__doc__
        return stand_in

    return skipped


def settings(*arguments: Any, **named: Any) -> Callable[[Callable], Callable]:
    return lambda test: test
