"""Tests of cases, contestants, and the check of results before timing."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.core.backend import CAPABILITIES, REFERENCE
from flmoe_kernels.profile import shapes
from flmoe_kernels.profile.cases import BOTH, FORWARD, OPERATORS, Case, cases
from flmoe_kernels.profile.check import WrongAnswer, agree, checked_case, compare
from flmoe_kernels.profile.prepared import Prepared
from flmoe_kernels.profile.registry import OURS, contestants, default_ours, find, prepare
from tests.support.profile_shapes import LAYER, PAIR, ROUTED, SPARSE

POOL = Case("pair_moe", PAIR, BOTH, variant="pool")


@pytest.mark.parametrize(
    ("key", "factor"), [("y", 0.999), ("gradient of k", 1.001), ("y", float("nan"))]
)
def test_a_wrong_result_is_caught(key: str, factor: float) -> None:
    right = prepare(POOL, "cpu").outputs()
    compare(POOL, "cpu", right)
    with pytest.raises(WrongAnswer, match=rf"^made up on {re.escape(POOL.name)} \(.*\): {key}"):
        compare(POOL, "made up", {**right, key: right[key] * factor})


@pytest.mark.parametrize(
    ("case", "key"),
    [
        (Case("expert_attention", LAYER, BOTH, variant="dropout"), "gradient of v with dropout"),
        (Case("routed_mlp", ROUTED, BOTH, variant="swiglu"), "gradient of w_gate"),
        (Case("interaction_moe", SPARSE, BOTH), "gate_losses"),
        (Case("interaction_moe", LAYER, FORWARD, torch.bfloat16), "logits"),
    ],
    ids=str,
)
def test_a_wrong_result_of_any_operator_is_caught(case: Case, key: str) -> None:
    case = checked_case(case)
    right = prepare(case, "cpu").outputs()
    compare(case, "cpu", right)
    with pytest.raises(WrongAnswer, match=key):
        compare(case, "made up", {**right, key: right[key] * 1.1})


def test_wrong_integers_are_caught() -> None:
    case = Case("routing", ROUTED, FORWARD)
    right = prepare(case, "cpu").outputs()
    with pytest.raises(WrongAnswer, match="permutation: the integers differ"):
        compare(case, "made up", {**right, "permutation": right["permutation"].flip(0)})


def test_a_wrong_contestant_is_named() -> None:
    def wrong(case: Case, name: str, dtype: torch.dtype) -> Prepared:
        ready = prepare(case, "cpu")
        return Prepared(ready.call, lambda: {**ready.outputs(), "y": torch.zeros(2, 4, 6)})

    peer = dataclasses.replace(find(POOL, "reference"), name="made up", make=wrong)
    with pytest.raises(WrongAnswer, match=f"^made up on {re.escape(POOL.name)}"):
        agree(POOL, "reference", peer)


def test_every_operator_has_cases_and_every_backend_is_a_contestant() -> None:
    assert set(OPERATORS) == set(CAPABILITIES)
    for name in OPERATORS:
        case = cases([name])[0]
        ours = {x.name for x in contestants(case) if x.kind == OURS}
        assert ours == set(CAPABILITIES[name]) - {REFERENCE}
        assert default_ours(case).name == "cpu"


def test_unavailable_contestants_have_a_reason() -> None:
    long = Case("pair_moe", shapes.PAIR_LONG, BOTH, variant="none")
    with pytest.raises(BackendUnavailable, match="maps of all pairs"):
        prepare(long, "reference")
    with pytest.raises(ValueError, match=r"expected one of cpu, .*, got 'nobody'"):
        prepare(POOL, "nobody")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operators": ["pair"]}, "operator: expected one of pair_moe"),
        ({"shapes": ["pair_512"]}, r"shape: expected one of mmimdb, .* on cpu, got 'pair_512'"),
    ],
    ids=str,
)
def test_an_unknown_name_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases(**arguments)
