"""routing against the reference, interleaved, with gates."""

from __future__ import annotations

from typing import Any

from bench.gates import Comparison, hold


def test_against_peers(benchmark: Any, comparison: Comparison) -> None:
    hold(benchmark, comparison)
