"""routed_mlp against a loop over experts, dense and grouped products of others, interleaved, with gates."""

from __future__ import annotations

from typing import Any

from bench.gates import Comparison, hold


def test_against_peers(benchmark: Any, comparison: Comparison) -> None:
    hold(benchmark, comparison)
