"""Benchmarks of every operator against its peers."""

from __future__ import annotations

from bench.suite import Comparison, compare
from flmoe_gate.gate import Against


def test_against_peers(benchmark_against: Against, comparison: Comparison, full: bool) -> None:
    compare(benchmark_against, comparison, full)
