"""Tests of faithfulness and pair_masking against loops over samples, tokens and budgets."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.explain.attribution.attribute import attribute
from flmoe_kernels.explain.attribution.targets import METRICS, resolve_targets
from flmoe_kernels.explain.estimators.interactions import shapley_interactions
from flmoe_kernels.explain.masking.drops import KINDS
from flmoe_kernels.explain.masking.faithfulness import faithfulness, pair_masking
from tests.support.explain_layers import call_of
from tests.support.explain_masking import (
    BUDGETS,
    CASE,
    TokenBits,
    bits,
    brute_force,
    set_of,
)
from tests.support.inputs import draw, draw_masks
from tests.support.refusals import assert_refused


@pytest.mark.parametrize("fill", ["zero", "mean", "drop"])
@pytest.mark.parametrize("masks", ["partial", "none", "padded_modality", "padded_sample"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_against_loops(fill: str, masks: str, multi_label: bool) -> None:
    layer, inputs, masking = call_of(dataclasses.replace(CASE, masks=masks))
    values = [draw(4, length, dtype=torch.float64, seed=m) for m, length in enumerate((7, 5))]
    values[0] = values[0].round(decimals=0)
    means = [draw(8, dtype=torch.float64, seed=9), draw(5, 8, dtype=torch.float64, seed=8)]
    classes = [[0], [0, 2], [1], [2]] if multi_label else [[0], [2], [1], [2]]
    target: Tensor = torch.tensor([each[0] for each in classes])
    if multi_label:
        target = torch.stack([torch.tensor([c in each for c in range(3)]) for each in classes])
    options: dict[str, Any] = {"target": target, "budgets": BUDGETS, "fill": fill, "n_random": 1}
    options["baseline"] = means if fill == "mean" else None
    for expert, exempt in ((None, ()), (2, (0,))):

        def logits_of(x: Any, m: Any, expert: int | None = expert) -> Tensor:
            own, _, mixture = layer.inference(x, m)
            return mixture if expert is None else own[expert]

        found = faithfulness(
            layer, inputs, masking, values, exempt=exempt, expert=expert, max_batch=7, **options
        )
        how = means if fill == "mean" else fill
        expected = brute_force(
            logits_of, inputs, masking, values, classes, multi_label, how, exempt
        )
        np.testing.assert_allclose(found.identified.numpy(), expected, atol=1e-12)
        assert np.nanmax(np.abs(expected[:, :, :, 0])) > 1e-3
        # A sample without a token that may be masked has no drops and is left out of the means.
        gone = np.isnan(expected[0, 0, :, 0])
        assert gone.any() or masks != "padded_sample"
        assert np.isnan(found.random.numpy()[:, :, 0, gone]).all()
        assert (found.maskable.numpy() == 0).tolist() == gone.tolist()
        np.testing.assert_allclose(found.curve().identified, np.nanmean(expected[0, 0], axis=0))
        assert not np.allclose(found.identified.flip(0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("exempt", [(), (0,), (1, 2)])
def test_which_tokens_are_masked(exempt: tuple[int, ...]) -> None:
    """Sizes, members and nesting of the identified and random sets, derived from the drops."""
    lengths, batch = (20, 9, 1), 5
    masks: Any = draw_masks("partial", batch, lengths)
    masks[1][3] = False
    values = [draw(batch, length, seed=m) for m, length in enumerate(lengths)]
    budgets = (1, 5, 10, 15, 20, 25, 60, 100)
    options: dict[str, Any] = {"metrics": ["logit"], "target": 0, "budgets": budgets}
    call = partial(faithfulness, TokenBits().eval(), bits(batch, lengths), masks, values, **options)
    found = call(exempt=exempt)
    starts = (0, 20, 29)
    for b in range(batch):
        valid = [set(x[b].nonzero().flatten().tolist()) for x in masks]
        for m in exempt:
            valid[m] -= {0} if lengths[m] > 1 else set()
        every = {starts[m] + i for m, mine in enumerate(valid) for i in mine}
        assert found.maskable[b] == len(every)
        before: list[set[int]] = [set() for _ in range(11)]
        for k, percent in enumerate(budgets):
            drops = [found.identified[:, 0, b, k], *found.random[:, 0, :, b, k].T]
            for s, (gone, rest) in enumerate(drops):
                chosen = set_of(gone)
                assert set_of(rest) == every - chosen
                assert before[s] <= chosen <= every
                before[s] = chosen
                for m, mine in enumerate(valid):
                    here = {g - starts[m] for g in chosen if 0 <= g - starts[m] < lengths[m]}
                    assert len(here) == (max(1, -(-len(mine) * percent // 100)) if mine else 0)
                    if s == 0:
                        left = values[m][b, sorted(mine - here)]
                        assert all(values[m][b, i] >= left.max() for i in here if len(left))
            assert found.masked[b, k] == len(before[0])
    # Random sets differ between repeats, samples and seeds.
    first = found.random[0, 0, :, :, 3]
    assert len(first.unique()) > 30
    assert torch.equal(call(exempt=exempt, max_batch=3).random, found.random)
    other = call(exempt=exempt, seed=1)
    assert torch.equal(other.identified, found.identified)
    assert not torch.equal(other.random, found.random)
    assert torch.equal(call(exempt=exempt, n_random=4).random, found.random[:, :, :4])


def test_random_sets_are_uniform() -> None:
    """In every sample, each of the C(5, 2) sets of two tokens occurs equally often."""
    found = faithfulness(
        *(TokenBits().eval(), bits(3, (5,)), None, [torch.zeros(3, 5)]),
        **{
            "budgets": [40],
            "metrics": ["logit"],
            "target": 0,
            "n_random": 2000,
            "max_batch": 10**6,
        },
    )
    for b in range(3):
        counts = Counter(frozenset(set_of(x)) for x in found.random[0, 0, :, b, 0])
        assert len(counts) == 10
        # Chi-squared with 9 degrees of freedom exceeds 45 once in a million.
        assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 45


def attributions() -> list[Tensor]:
    return [draw(4, length, seed=m) for m, length in enumerate((7, 5))]


def test_summaries() -> None:
    layer, inputs, masks = call_of(CASE)
    values = attributions()
    found = faithfulness(layer, inputs, masks, values, budgets=(10, 20, 50), n_random=3)
    for kind, metric in itertools.product(KINDS, METRICS):
        q = (KINDS.index(kind), METRICS.index(metric))
        own, drawn = found.identified[q].numpy(), found.random[q].numpy()
        sign = 1 if kind == "comprehensiveness" else -1
        weights = {"mean": np.full(3, 1 / 3), "auc": np.array([5, 20, 15]) / 40}
        for mode, weight in weights.items():
            expected = [
                (own @ weight).mean(),
                np.nan,  # of four samples, see test_errors_of_means
                (drawn @ weight).mean(),
                (drawn @ weight).mean(axis=1).std(ddof=1),
                sign * ((own @ weight).mean() - (drawn @ weight).mean()),
                np.nan,
            ]
            np.testing.assert_allclose([float(x) for x in found.aopc(kind, metric, mode)], expected)
        curve = found.curve(kind, metric)
        np.testing.assert_allclose(curve.identified, own.mean(axis=0))
        np.testing.assert_allclose(curve.random_std, drawn.mean(axis=1).std(axis=0, ddof=1))
        np.testing.assert_allclose(curve.gap, sign * (own.mean(axis=0) - drawn.mean(axis=(0, 1))))
        torch.testing.assert_close(found.values(kind, metric), found.identified[q])
    rows = found.rows()
    assert len(rows) == 2 * 3 * 4
    assert rows[3]["budget"] is None
    assert rows[3]["gap"] == pytest.approx(float(found.aopc().gap))
    assert found.table().count("AOPC") == 6
    assert found.evaluations == 4 * (1 + 2 * 3 * 4)
    single = faithfulness(layer, inputs, masks, values, budgets=[20], n_random=1)
    assert float(single.aopc(mode="auc").identified) == float(single.curve().identified)
    assert single.aopc().random_std.isnan(), "one seed has no standard deviation"


def test_an_attribution_supplies_values_and_targets() -> None:
    layer, inputs, masks = call_of(CASE)
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    for expert in (None, "synergy"):
        explained = attribute(layer, inputs, masks, target=labels)
        found = faithfulness(layer, inputs, masks, explained, expert=expert, budgets=[30])
        same = faithfulness(
            *(layer, inputs, masks, explained.of(expert)),
            **{"expert": expert, "target": labels, "budgets": [30]},
        )
        assert torch.equal(found.identified, same.identified)
        assert torch.equal(found.targets, explained.targets)
        assert found.settings["by"] == "gradient_rollout"
        assert found.settings["expert"] == expert
        other = faithfulness(layer, inputs, masks, explained, expert=expert, budgets=[30], target=0)
        assert not torch.allclose(other.identified, found.identified)


def test_targets_without_labels() -> None:
    logits = torch.tensor([[0.5, 2.0, 2.0], [-1.0, -3.0, -2.0], [0.0, -1.0, 4.0]])
    predicted = resolve_targets(None, logits)
    assert predicted.weights.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert not predicted.multi_label
    several = resolve_targets(None, logits, multi_label=True)
    third = 1 / 3
    assert several.weights.tolist() == [[third] * 3, [1, 0, 0], [0.5, 0, 0.5]]
    given = resolve_targets(torch.tensor([[False] * 3, [False] * 3, [True, True, False]]), logits)
    assert given.weights.tolist() == [[0, 1, 0], [1, 0, 0], [0.5, 0.5, 0]]
    assert given.multi_label
    infinite = torch.tensor([[1.0, -torch.inf, torch.inf]])
    assert float(resolve_targets(0, infinite).read(infinite, "logit")) == 1.0


def test_missing_modality() -> None:
    layer = PairInteractionMoE((6, 4), num_classes=3, rank=4, value_dim=5).eval()
    inputs = [draw(2, 5, 6), None]
    found = faithfulness(layer, inputs, None, [draw(2, 5), None], fill="drop")
    assert found.maskable.tolist() == [5, 5]
    assert found.identified.isfinite().all()


def test_pairs_fill_a_budget_whole() -> None:
    """Pairs are taken in order; a pair that exceeds the budget is skipped, and later pairs may still fit."""
    pairs = [
        [((0, 1), (1, 0)), ((0, 1), (1, 2)), ((0, 3), (1, 3)), ((0, 2), (1, 2)), ((0, 0), (0, 3))],
        [((1, 3), (0, 0)), ((1, 1), (1, 2))],
        [],
    ]
    masks = [torch.ones(3, 4), torch.tensor([[1, 1, 1, 1]] * 3)]
    call: Any = (TokenBits().eval(), bits(3, (4, 4)), masks)
    options: dict[str, Any] = {"metrics": ["logit"], "target": 0, "budgets": (1, 2, 3, 4, 5, 6)}
    found = pair_masking(*call, pairs, **options)
    sets = [[set_of(x) for x in row] for row in found.values(metric="logit")]
    assert sets[0] == [set(), {1, 4}, {1, 4, 6}, {1, 2, 4, 6}, {1, 3, 4, 6, 7}, {1, 2, 3, 4, 6, 7}]
    assert sets[1] == [set(), {0, 7}, {0, 7}, *[{0, 5, 6, 7}] * 3]
    assert sets[2] == [set()] * 6
    assert found.masked.tolist() == [[len(each) for each in row] for row in sets]
    assert found.unit == "tokens"
    rest = found.identified[1, 0]
    assert set_of(rest[0, 3]) == set(range(8)) - sets[0][3]
    for b, k in itertools.product(range(3), range(6)):
        for drawn in found.random[0, 0, :, b, k]:
            ours = [sum(g < 4 for g in each) for each in (set_of(drawn), sets[b][k])]
            assert ours[0] == ours[1]
            assert len(set_of(drawn)) == len(sets[b][k])
    assert len(found.random[0, 0, :, 0, 3].unique()) > 5
    exempted = pair_masking(*call, pairs, exempt=[1], **options)
    assert set_of(exempted.values(metric="logit")[0, 1]) == {1, 6}
    assert all(4 not in set_of(x) for x in exempted.identified[:, 0].flatten())


def test_pairs_of_an_index() -> None:
    """Exact interactions of a pair layer, in three orders, against listed pairs."""
    torch.manual_seed(0)
    layer = PairInteractionMoE((6, 4), num_classes=3, rank=4, value_dim=5, normalizer=4.0)
    layer = layer.double().eval()
    inputs = [draw(2, 5, 6, dtype=torch.float64), draw(2, 7, 4, dtype=torch.float64, seed=1)]
    masks = draw_masks("partial", 2, (5, 7))
    pairs = shapley_interactions(layer, inputs, masks, target=1, pairs="across")
    options: dict[str, Any] = {"target": 1, "budgets": [2], "fill": "drop", "metrics": ["logit"]}
    drops = {}
    for by in ("largest", "smallest", "magnitude"):
        found = pair_masking(layer, inputs, masks, pairs, by=by, **options)
        assert found.settings["by"] == f"{by} SII"
        top = [each.top(1, by).rows()[0] for each in pairs]
        listed = [[((0, row["token_i"]), (1, row["token_j"]))] for row in top]
        expected = pair_masking(layer, inputs, masks, listed, **options)
        assert torch.equal(found.identified, expected.identified)
        drops[by] = found.identified
    assert not torch.allclose(drops["largest"], drops["smallest"])


def test_errors() -> None:
    layer, inputs, masks = call_of(CASE)
    values = [torch.zeros(4, 7), torch.zeros(4, 5)]
    with_nan = [torch.full((4, 7), torch.nan), values[1]]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"budgets": []}, "budgets: expected a list"),
        ({"budgets": [0]}, "budgets: expected percentages above 0 up to 100, got 0"),
        ({"budgets": [10, 5]}, "budgets: expected increasing numbers"),
        ({"metrics": ["accuracy"]}, "metrics: expected one of prob, log_prob, logit"),
        ({"fill": "noise"}, "fill: expected one of zero, mean, drop"),
        ({"fill": "mean"}, "baseline: expected 2 Tensors"),
        ({"exempt": [2]}, "exempt: expected an int from 0 to 1"),
        ({"expert": 4}, "expert: expected an int from 0 to 3"),
        ({"attributions": values[::-1]}, r"attributions\[0\]: expected \(B, L_m\) = \(4, 7\)"),
        ({"attributions": with_nan}, r"attributions\[0\]: expected finite values"),
    ]
    for options, message in wrong:
        call = {"attributions": values, **options}
        assert_refused(partial(faithfulness, layer, inputs, masks, **call), message)
    assert_refused(lambda: faithfulness(layer.train(), inputs, masks, values), "eval mode")
    layer.eval()
    found = faithfulness(layer, inputs, masks, values, metrics=["logit"], n_random=0)
    assert_refused(lambda: found.curve(), "metric: expected one of logit, got 'prob'")
    assert_refused(
        lambda: found.aopc(metric="logit", mode="sum"), "mode: expected one of mean, auc"
    )
    pair_errors: list[tuple[Any, str]] = [
        ([[]] * 3, "pairs: expected a list for each of 4 samples, got 3"),
        ([[((0, 7), (1, 0))], [], [], []], r"pairs\[0\]: expected valid tokens, got .* \(0, 7\)"),
        ([[((0, 1), (1, 0)), ((0, 1),)], [], [], []], r"pairs\[0\]: expected an array of integers"),
        ([[], [((0, 1), (0, 1))], [], []], r"pairs\[1\]: expected pairs of two .* \(0, 1\) twice"),
    ]
    masking = partial(pair_masking, layer, inputs, masks)
    for pairs, message in pair_errors:
        assert_refused(partial(masking, pairs), message)
    assert_refused(
        lambda: masking([[]] * 4, budgets=[2.5]), "TypeError: budgets: expected an int, got"
    )
    # Logits of a model with another number of classes; a single column would broadcast to all classes.
    explained = attribute(layer, inputs, masks)
    for classes in (5, 1):
        other = dataclasses.replace(explained, targets=torch.ones(4, classes))
        message = rf"logits: expected .* = \(4, {classes}\), got \(4, 3"
        assert_refused(partial(faithfulness, layer, inputs, masks, other), message)
