"""Tests of models without finite values or with one class, of integer targets, and of huge counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.explain import (
    Run,
    Sampling,
    attribute,
    faithfulness,
    pair_masking,
    redundancy_gap,
    shapley_interactions,
)
from tests.support.explain_games import interaction_layer
from tests.support.layers import LayerCase
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(3, 2))
INPUTS = CASE.inputs(torch.float64)
SCORES = [torch.tensor([[3.0, 2.0, 1.0]] * 2), torch.tensor([[2.0, 1.0]] * 2)]
PAIRS: Any = [[((0, 0), (1, 1)), ((0, 1), (1, 0))]] * 2
CALLS: dict[str, Callable[..., Any]] = {
    "integrated gradients": partial(attribute, method="integrated_gradients", n_steps=2),
    "faithfulness": partial(faithfulness, masks=None, attributions=SCORES, n_random=1),
    "pair masking": partial(pair_masking, masks=None, pairs=PAIRS, n_random=1, budgets=(2,)),
    "exact pairs": shapley_interactions,
    "sampled pairs": partial(
        shapley_interactions, method="sampling", sampling=Sampling(budget=200)
    ),
    "redundancy gap": redundancy_gap,
}
EVERY = {**CALLS, "rollout": attribute}


class Additive(nn.Module):
    """Logits (B, C) that are sums over the tokens; `change` alters them."""

    def __init__(self, classes: int, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, classes, generator=draw, dtype=torch.float64))
        self.change = change

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        masks = [None] * len(inputs) if masks is None else masks
        parts = [
            x if mask is None else torch.where(mask.bool().unsqueeze(2), x, 0.0)
            for x, mask in zip(inputs, masks, strict=True)
        ]
        logits = sum(part.sum(dim=1) for part in parts).tanh() @ self.weight
        return logits if self.change is None else self.change(logits)


def of_class(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(logits: Tensor) -> Tensor:
        own = logits.clone()
        own[:, place] = own[:, place] * 0 + value
        return own

    return change


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CALLS)
def test_a_model_without_finite_logits_is_refused(
    name: str, value: float, target: int | None
) -> None:
    for change in (lambda z: z * value, of_class(0, value)):
        model = Additive(3, change).eval()
        message = rf"model: expected finite logits, got -?{value} for sample 0"
        assert_refused(partial(CALLS[name], model, INPUTS, target=target), message)


@pytest.mark.parametrize("name", CALLS)
def test_a_class_that_is_ruled_out_is_not_explained(name: str) -> None:
    model = Additive(3, of_class(0, -torch.inf)).eval()
    CALLS[name](model, INPUTS)
    with pytest.raises(ValueError, match=r"(model|game): expected finite .*, got -inf for"):
        CALLS[name](model, INPUTS, target=0)


@pytest.mark.parametrize("name", EVERY)
def test_an_input_that_is_nan_is_refused_with_its_sample(name: str) -> None:
    x = [each.clone() for each in INPUTS]
    x[0][1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model: expected finite logits, got nan for sample 1"):
        EVERY[name](interaction_layer(CASE), x)


@pytest.mark.parametrize("name", ["faithfulness", "pair masking"])
def test_nan_only_for_masked_samples_is_refused(name: str) -> None:
    """A masked token becomes 0, for which this model has no value."""

    def model(inputs: Any, masks: Any) -> Tensor:
        hidden = (inputs[0] == 0).all(dim=2).any(dim=1)
        logits = Additive(3)(inputs, masks)
        return torch.where(hidden[:, None], torch.nan, logits)

    with pytest.raises(ValueError, match=r"model: expected finite values of prob, got nan for"):
        CALLS[name](model, INPUTS)


def test_gradients_that_are_nan_are_refused() -> None:
    def model(inputs: Any, masks: Any) -> Tensor:
        # The gradient of a norm at 0 is NaN by this formula, and at the path's points between it is not.
        size = sum(((x - 1) ** 2).sum(dim=(1, 2)) for x in inputs)
        return torch.stack([size, size * 0], dim=1).clamp_min(0) ** 0.5

    x = [torch.full_like(each, 2.0) for each in INPUTS]
    with pytest.raises(ValueError, match=r"model: expected finite gradients between the baseline"):
        attribute(model, x, method="integrated_gradients", n_steps=3, rule="midpoint", target=0)


def test_padding_may_be_nan() -> None:
    x = [each.clone() for each in INPUTS]
    masks = [torch.tensor([[True, True, False]] * 2), None]
    x[0][:, 2] = torch.nan
    found = attribute(
        Additive(3).eval(), x, masks, method="integrated_gradients", n_steps=3, target=1
    )
    assert found.completeness_error.isfinite().all()
    assert all(values.isfinite().all() for values in found.values)


def test_the_probability_of_one_class_is_refused() -> None:
    model = Additive(1).eval()
    for name in ("faithfulness", "pair masking"):
        for metrics in (("prob",), ("logit", "log_prob"), ("prob", "log_prob", "logit")):
            message = r"metrics: expected \('logit',\) for a model with one"
            assert_refused(partial(CALLS[name], model, INPUTS, metrics=metrics), message)
        assert CALLS[name](model, INPUTS, metrics=["logit"]).identified.any()
        # A binary classifier with a single logit.
        assert CALLS[name](model, INPUTS, multi_label=True).identified.any()
    with pytest.raises(ValueError, match="output: expected 'logit', as a probability of one class"):
        shapley_interactions(model, INPUTS, output="log_prob")
    assert shapley_interactions(model, INPUTS)[0].value != 0


INTEGERS = (
    *(np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.int16)),
    *([2, 2], (2, 2), np.array([2, 2]), np.array([2, 2], dtype=np.uint8), torch.tensor([2, 2])),
    torch.tensor([2, 2], dtype=torch.int32),
)


@pytest.mark.parametrize("name", EVERY)
def test_any_integer_is_a_target(name: str) -> None:
    call, layer = EVERY[name], interaction_layer(CASE)
    expected = call(layer, INPUTS, target=2)
    for target in INTEGERS:
        found = call(layer, INPUTS, target=target)
        if isinstance(found, list):
            assert [x.values.tolist() for x in found] == [x.values.tolist() for x in expected]
            assert {type(x.game["target"]) for x in found} == {int}
        else:
            assert torch.equal(found.targets, expected.targets)


@pytest.mark.parametrize("name", EVERY)
def test_other_values_are_no_targets(name: str) -> None:
    call, layer = EVERY[name], interaction_layer(CASE)
    wrong: list[Any] = [True, np.True_, torch.tensor(True), 2.0, np.float64(2), "2", {0: 1}]
    wrong += [[True, False], torch.tensor([True, False]), np.array([0.0, 1.0]), ["a", "b"]]
    for target in wrong:
        with pytest.raises(TypeError, match=r"target: expected (an int|integers)"):
            call(layer, INPUTS, target=target)
    for target in (3, -1, np.int64(3), [0, 3], np.array([-1, 0]), [0], torch.tensor([[1, 1]])):
        assert_refused(partial(call, layer, INPUTS, target=target), "target: expected")


def test_numbers_of_numpy_can_be_saved(tmp_path: Path) -> None:
    layer = interaction_layer(CASE)
    one: Any = np.int64(1)
    wide = Sampling(np.int64(900), np.float32(1e-4), np.int32(8), np.uint8(3))  # type: ignore[arg-type]
    assert wide == Sampling(900, float(np.float32(1e-4)), 8, 3)
    run = Run(max_batch=np.int64(50), checkpoint=tmp_path / "progress")  # type: ignore[arg-type]
    options: dict[str, Any] = {"n_random": one, "seed": np.int32(3), "exempt": [one], "expert": one}
    results = [
        CALLS["faithfulness"](layer, INPUTS, budgets=np.array([10, 50]), **options),
        CALLS["pair masking"](layer, INPUTS, **{**options, "budgets": np.array([2, 4])}),
        attribute(layer, INPUTS, readout=one),
        attribute(layer, INPUTS, method="integrated_gradients", n_steps=one, max_batch=one),
        *shapley_interactions(layer, INPUTS, scores=SCORES, top=one, expert=one),
        *shapley_interactions(layer, INPUTS, method="sampling", sampling=wide, run=run),
    ]
    for result in results:
        result.save(tmp_path / "result.npz")
        assert repr(type(result).load(tmp_path / "result.npz")) == repr(result)
