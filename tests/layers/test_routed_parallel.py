"""Tests of experts on 2 ranks, and in the slow tests on 4, against a single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.routed_mlp.collectives import sum_over_ranks
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.parallel import parallel_routed_mlp
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import limit
from tests.support import parallel_ranks as ranked
from tests.support.parallel_ranks import CASES, LOCAL, NAMES
from tests.support.ranks import start_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=str)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of each rank; processes are started once per number of ranks."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    return start_ranks(request.param, folder, ranked.every_result)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max())
    return error / scale if scale else error


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_with_one_process(results: Results, name: str) -> None:
    case, ranks = CASES[name], len(results)
    oracle = ranked.whole(case, ranks, torch.float64)
    low = ranked.whole(case, ranks, case.dtype)
    for rank, result in enumerate(results):
        found = result[name]
        assert sorted(found) == sorted(("out", *(case.needs(rank) or ())))
        if case.dtype == torch.float64:
            errors = {
                n: difference(x, case.slice(n, oracle[n], rank, ranks)) for n, x in found.items()
            }
            assert max(errors.values()) < 1e-12, (rank, errors)
    if case.dtype != torch.float64:
        for n in ("out", *NAMES):
            together = torch.cat([result[name][n] for result in results])
            assert_within_budget(together, low[n], oracle[n], f"{n} of {name}")


def test_the_comparison_can_fail(results: Results) -> None:
    """Swapped rows, experts or ranks exceed the tolerance."""
    oracle = ranked.whole(CASES["even"], len(results), torch.float64)
    for n, expected in oracle.items():
        found = torch.cat([result["even"][n] for result in results])
        assert difference(found.roll(1, dims=0), expected) > 1e-3, n
        swapped = torch.cat([result["even"][n][:3] for result in reversed(results)])
        right = torch.cat([result["even"][n][:3] for result in results])
        assert difference(swapped, right) > 1e-3, n


def test_capacity_is_shared(results: Results) -> None:
    ranks = len(results)
    whole = ranked.expected_limits(ranks)
    for n, expected in enumerate(whole):
        assert torch.equal(torch.cat([result["limits"][n] for result in results]), expected)
    index = ranked.limited(ranks)[0]
    parts = [ranked.LIMITED.slice("index", index, rank, ranks) for rank in range(ranks)]
    alone = torch.cat([limit(part, LOCAL * ranks, capacity=1) for part in parts])
    assert not torch.equal(alone, whole[2]), "control: each rank alone"


def test_balance_under_autocast(results: Results) -> None:
    """Loss of all ranks' tokens by its formula in float64, from a router's logits in half precision."""
    logits = torch.cat([result["balance"]["logits"] for result in results])
    assert logits.dtype == torch.bfloat16
    experts = logits.shape[1]
    shares = torch.nn.functional.one_hot(logits.argmax(dim=1), experts).double().mean(dim=0)
    exact = experts * (shares * logits.double().softmax(dim=1).mean(dim=0)).sum()
    own = experts * (shares.float() * logits.float().softmax(dim=1).mean(dim=0)).sum()
    for result in results:
        found = result["balance"]["loss"]
        assert_within_budget(found, own, exact, "balance")
        assert_outside_budget(found.bfloat16(), own, exact, "a loss of half precision")


@pytest.mark.parametrize("name", ranked.GATES)
def test_training_under_ddp_agrees_with_one_process(results: Results, name: str) -> None:
    ranks = len(results)
    start = dict(ranked.network(name, ranks).named_parameters())
    for n, expected in ranked.train_whole(name, ranks).items():
        assert difference(start[n].detach(), expected) > 1e-5, f"{n} does not move"
        parts = [result[f"train {name}"][n] for result in results]
        if ".experts." in n:
            assert difference(torch.cat(parts), expected) < 1e-12, n
        else:
            assert all(difference(part, expected) < 1e-12 for part in parts), n


def test_errors_are_raised_on_every_rank(results: Results) -> None:
    ranks = len(results)
    for result in results:
        found = result["mistakes"]
        assert f"expected -1 or experts from 0 to {LOCAL * ranks - 1}" in found["range"]
        assert f"world_size: expected {ranks}" in found["module"]
        assert "x: expected the same width on all ranks, got [5, 10" in found["width"]
        assert "x: expected the same dtype on all ranks, got torch.float" in found["dtype"]
        without = list(range(1, ranks))
        assert f"on all ranks or on none, but not on ranks {without}" in found["recording"]


def test_no_group() -> None:
    case = CASES["even"]
    x, weight, *parameters = case.inputs(1).values()
    with pytest.raises(ValueError, match=r"group: expected torch.distributed to be initialised"):
        parallel_routed_mlp(x, case.index(1), weight, *parameters)
    with pytest.raises(ValueError, match=r"group: expected torch.distributed to be initialised"):
        sum_over_ranks(x)
    with pytest.raises(ValueError, match="world_size: expected 1, got 2"):
        RoutedMLP(3, 5, 7, world_size=2)
    # A single process needs no group.
    assert routed_mlp(x, case.index(1), weight, *parameters).shape == x.shape
