"""Tests of the evaluation of games: packed coalitions, batches, memory."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels.core import memory as core_memory
from flmoe_kernels.explain import (
    Run,
    Sampling,
    attribute,
    faithfulness,
    pair_masking,
    probe_game,
    redundancy_gap,
    shapley_interactions,
)
from flmoe_kernels.explain.estimators.evaluator import Evaluator
from flmoe_kernels.explain.games import memory
from flmoe_kernels.explain.games.coalitions import pack
from tests.support.explain_games import (
    Planted,
    first_of,
    interaction_layer,
    random_terms,
    unanimity,
)
from tests.support.layers import LayerCase
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(5, 4))


def test_a_game_with_invalid_values() -> None:
    for answer, message in (
        (lambda inside: inside.astype(float), r"game: expected values \(1,\) .* got \(1, 3\)"),
        (
            lambda inside: np.where(inside.all(axis=1), np.nan, 1.0),
            r"game: expected finite values, got nan for a coalition of 3 of 3 tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator(Planted(3, answer), 1)(pack(np.ones((2, 3), dtype=np.bool_)))
    # The published layer returns NaN if no token is left.
    layer, x = interaction_layer(CASE, backend="reference"), CASE.inputs(torch.float64)
    assert_refused(lambda: shapley_interactions(layer, x), r"nan for a coalition of 0 of 9 tokens")
    assert len(shapley_interactions(layer, x, fill="zero")) == 2


def test_batches_follow_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    file = tmp_path / "meminfo"
    monkeypatch.setattr(core_memory, "MEMINFO", file)
    monkeypatch.setattr(core_memory, "OWN_GROUPS", tmp_path / "none")
    file.write_text("MemAvailable:     1048576 kB\n")
    sizes_found = [memory.batch_size(each, cpu) for each in (1, 2**16, 2**20, 2**40)]
    assert sizes_found == [256, 32, 2, 1]
    # Small changes of the memory do not change the batch.
    file.write_text("MemAvailable:     1048999 kB\n")
    assert memory.batch_size(2**16, cpu) == 32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**28)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**28)
    assert memory.batch_size(2**16, torch.device("cuda")) == 32
    file.write_text("MemAvailable: 0 kB\n")
    assert memory.batch_size(2**20, cpu) == 1
    # Inputs that are not expanded are limited by the memory, not by the caches.
    file.write_text("MemAvailable:     67108864 kB\n")
    assert memory.batch_size(2**19, cpu) == 32
    assert memory.batch_size(2**19, cpu, expanded=False) == 256


def test_a_game_gets_batches_of_its_batch_size() -> None:
    game: Any = unanimity(random_terms(7, 20, 3, seed=1), 7)
    game.batch_size = 10
    found = probe_game(game, run=Run(max_batch=50))["SII"]
    assert max(game.batches) == found.batch_size == 10
    assert probe_game(game, run=Run(max_batch=3))["SII"].batch_size == 3
    for wrong, kind in ((0, ValueError), (2.5, TypeError)):
        game.batch_size = wrong
        with pytest.raises(kind, match=r"game\.batch_size: expected an int"):
            probe_game(game)


def test_memory_does_not_grow_with_the_budget(tmp_path: Path) -> None:
    """Ten times the coalitions need the same memory; a checkpoint adds their values; control: kept coalitions."""
    pairs = [(i, i + 1) for i in range(0, 40, 2)]

    def peak(budget: int, run: Run, kept: list[Any] | None = None) -> tuple[int, int]:
        def formula(inside: Any) -> Any:
            if kept is not None:
                kept.append(inside)
            return inside.sum(axis=1) * 1.0

        game = Planted(40, formula)
        tracemalloc.start()
        try:
            probe_game(game, pairs, sampling=Sampling(budget=budget, design="toggling"), run=run)
            return tracemalloc.get_traced_memory()[1], game.asked
        finally:
            tracemalloc.stop()

    run = Run(max_batch=512)
    peak(6000, run)  # warm-up: imports and caches
    (small, few), (large, many) = peak(12_000, run), peak(120_000, run)
    assert many > 8 * few
    assert large < 1.1 * small
    saved = peak(120_000, Run(max_batch=512, checkpoint=tmp_path))[0]
    assert saved < small + 24 * many
    assert peak(120_000, run, [])[0] > small + 24 * many, "the control"


@pytest.mark.parametrize(
    ("shown", "terminal"), [(None, True), (None, False), (True, False), (False, True)]
)
def test_every_long_call_has_a_bar(
    shown: bool | None,
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = interaction_layer(CASE), first_of(CASE.inputs(torch.float64))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    tokens = attribute(layer, x)
    pairs = shapley_interactions(layer, x, run=Run(progress=False))
    capsys.readouterr()
    sampled: Any = {"method": "sampling", "sampling": Sampling(budget=3000, design="toggling")}
    calls: list[tuple[Callable[[], object], int]] = [
        # Every coalition of the plan is counted, also those that units share.
        (lambda: shapley_interactions(layer, x, run=Run(progress=shown), **sampled), 64 * 46),
        (lambda: redundancy_gap(layer, x, run=Run(progress=shown)), 512),
        (lambda: probe_game(unanimity({(0, 1): 1.0}, 5), run=Run(progress=shown)), 32),
        (lambda: faithfulness(layer, x, None, tokens, n_random=2, progress=shown), 1 + 2 * 5 * 3),
        (lambda: pair_masking(layer, x, None, pairs, n_random=1, progress=shown), 1 + 2 * 3 * 2),
        (
            lambda: attribute(layer, x, method="integrated_gradients", n_steps=3, progress=shown),
            4 * 3,
        ),
    ]
    for call, count in calls:
        call()
        bar = f"{count:,} / {count:,} evaluations" in capsys.readouterr().err
        assert bar == (terminal if shown is None else shown)
