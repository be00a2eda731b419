"""Tests of autotuning of all Triton kernels with launch tables, with invented times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tuning import tuner
from flmoe_kernels.ops.expert_attention.triton import table as attention_table
from flmoe_kernels.ops.pair_moe.triton import table as pair_table
from flmoe_kernels.ops.routed_mlp.triton import table as routed_table
from tests.support import attention_cases, pair_cases, routed_cases
from tests.support.inputs import as_dtype
from tests.support.tuning_trials import choices, refuse

TRITON = "triton"
PAIR = pair_cases.PairCase(20, 18, 10, 12, masks="both", batch=1, reduce="pool")
ATTENTION = attention_cases.Case((33, 18), 1, 20, 0.5, tail=1)
ROUTED = routed_cases.RoutedCase(40, 20, 35, 2, 2, load="dropped", gated=True)


def routed(inputs: list[Tensor], backend: str) -> list[Tensor]:
    return routed_cases.run(ROUTED, inputs, ROUTED.index(), backend)


Run = Callable[[list[Tensor], str], list[Tensor]]
Make = Callable[[torch.dtype], list[Tensor]]
OPERATORS: dict[str, tuple[Run, Make, set[str]]] = {
    "pair_moe": (partial(pair_cases.run, PAIR), PAIR.inputs, {"accumulate", "gradient"}),
    "expert_attention": (
        *(partial(attention_cases.run, ATTENTION), ATTENTION.qkv),
        {"attend", "query_gradient", "key_gradient"},
    ),
    "routed_mlp": (
        *(routed, ROUTED.inputs),
        {"hidden", "rows", "hidden_gradient", "weight_gradient"},
    ),
}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three candidates and the table's tiles, because the interpreter is slow.
    for table in (pair_table, attention_table, routed_table):
        few = {kind: tried[-3:] for kind, tried in table._TRIED.items()}
        monkeypatch.setattr(table, "_TRIED", few)
    tuner.forget()


@dataclasses.dataclass
class TableIsSlowest:
    """Timer with given times, of which the table's is the longest; records what it timed."""

    timed: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, trial: tuning.Trial[Any]) -> float:
        self.timed.append(trial.tiles)
        # Only the table's tiles state their shared memory.
        if any(trial.tiles.shared):
            return 1.0
        return 1.0 / (2 + trial.tiles.rows + trial.tiles.columns / 1e3 + trial.tiles.stages / 1e6)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Record every launch."""
    found: list[Launch] = []
    run = Launch.run

    def record(launch: Launch) -> None:
        found.append(launch)
        run(launch)

    monkeypatch.setattr(Launch, "run", record)
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPERATORS), ("expert_attention", torch.bfloat16)],
    ids=str,
)
def test_the_fastest_tiles_run_are_correct_and_are_reused(
    name: str, dtype: torch.dtype, launched: list[Launch]
) -> None:
    run, make, kernels = OPERATORS[name]
    inputs, clock = make(dtype), TableIsSlowest()
    with tuning.autotune(timer=clock):
        first = run(inputs, TRITON)
        timed = len(clock.timed)
        assert timed > len(kernels), "each kernel has candidates besides the table's tiles"
        assert all(map(torch.equal, first, run(inputs, TRITON)))
    assert len(clock.timed) == timed, "each key is timed once"
    found = choices()
    assert set(found) == {f"{name}.{kernel}" for kernel in kernels}
    assert not any(any(tiles.shared) for tiles in found.values()), "the table's tiles"
    check_budget(run, inputs, first)
    launched.clear()
    with tuning.autotune(timer=refuse):
        again = run(inputs, TRITON)
    assert all(map(torch.equal, first, again))
    chosen = {(tiles.warps, tiles.stages) for tiles in found.values()}
    assert chosen <= {(launch.warps, launch.stages) for launch in launched}


def check_budget(run: Run, inputs: list[Tensor], found: list[Tensor]) -> None:
    low = run(inputs, "reference")
    oracle = run(as_dtype(inputs, torch.float64), "reference")
    size = max(float(x.abs().max()) for x in oracle[1:])
    for i, (got, rough, exact) in enumerate(zip(found, low, oracle, strict=True)):
        vanishes = i > 0 and float(exact.abs().max()) < 0.1 * size
        assert_within_budget(
            *(got, rough, exact, f"result {i}"),
            magnitude=size if i else 0.0,
            may_vanish=vanishes,
        )
    assert_outside_budget(torch.zeros_like(found[0]), low[0], oracle[0], "zeros")
