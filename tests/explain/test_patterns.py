"""Tests of concentration and specificity: values by hand, invariances, intervals, comparisons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import FusionTransformer, InteractionMoE
from flmoe_kernels.explain import attribute, concentration, specificity
from flmoe_kernels.explain.patterns.results import mean_interval
from tests.support.explain_results import attribution
from tests.support.inputs import draw
from tests.support.refusals import Mistake, assert_refused

MEASURES = ("entropy", "normalized_entropy", "gini", "top_share")
LN2 = math.log(2)


def maps(*rows: list[float]) -> Tensor:
    """One sample, (1, E, L)."""
    return torch.tensor([rows], dtype=torch.float64)


def measured(row: list[float], top: int | float = 1) -> list[float]:
    found = concentration(attribution(maps(row)), top=top)
    return [float(found.of(name, "expert 0")) for name in MEASURES]


@pytest.mark.parametrize(
    ("row", "top", "expected"),
    [
        # Shares 1/2, 1/4, 1/8, 1/8. Gini: (-3 * 1 - 1 * 1 + 1 * 2 + 3 * 4) / (4 * 8).
        ([1, 4, 2, 1], 1, [1.75 * LN2, 0.875, 0.3125, 0.5]),
        ([1, -4, 2, -1], 2, [1.75 * LN2, 0.875, 0.3125, 0.75]),
        ([1, 4, 2, 1], 0.5, [1.75 * LN2, 0.875, 0.3125, 0.75]),
        ([1, 4, 2, 1], 0.51, [1.75 * LN2, 0.875, 0.3125, 0.875]),
        ([1, 4, 2, 1], 0.01, [1.75 * LN2, 0.875, 0.3125, 0.5]),
        ([1, 4, 2, 1], 99, [1.75 * LN2, 0.875, 0.3125, 1.0]),
        # Uniform, and one important token.
        ([3] * 5, 1, [math.log(5), 1.0, 0.0, 0.2]),
        ([0, 0, 7, 0, 0], 1, [0.0, 0.0, 0.8, 1.0]),
        ([1e-200, 4e-200, 2e-200, 1e-200], 1, [1.75 * LN2, 0.875, 0.3125, 0.5]),
    ],
)
def test_concentration_by_hand(row: list[float], top: int | float, expected: list[float]) -> None:
    assert measured(row, top) == pytest.approx(expected, abs=1e-12)


def test_specificity_by_hand() -> None:
    first, second, third = [3.0, 2.0, 1.0, 0.0], [0.0, -2.0, 3.0, 1.0], [6.0, 4.0, 2.0, 0.0]
    found = specificity(attribution(maps(first, second, third, [0, 0, 0, 1.0])), top=2)
    expected = {
        "expert 0 / expert 1": (1 / 3, 0.5),
        "expert 0 / expert 2": (1.0, 1.0),
        "expert 1 / expert 2": (1 / 3, 0.5),
        # Of tokens of equal importance, the first ones are chosen.
        "expert 0 / expert 3": (1 / 3, 0.0),
        "expert 1 / expert 3": (0.0, 1 / math.sqrt(14)),
        "expert 2 / expert 3": (1 / 3, 0.0),
    }
    assert set(found.parts) == set(expected)
    for part, values in expected.items():
        ours = [float(found.of(name, part)) for name in ("jaccard", "cosine")]
        assert ours == pytest.approx(values, abs=1e-12), part
    apart = specificity(attribution(maps([1, 2, 0, 0], [0, 0, 2, 1])), top=2)
    assert apart.values.flatten().tolist() == [0.0, 0.0]


def test_scale_sign_and_order_have_no_effect() -> None:
    values = draw(6, 3, 11, dtype=torch.float64)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    for function in (concentration, specificity):
        expected = function(attribution(values))
        for changed in (-values, 1e3 * values, values[:, :, order]):
            found = function(attribution(changed), top=0.1)
            # The mixture, a sum of experts, is scaled and reordered with them.
            torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
        other = function(attribution(values.square()))
        assert (other.values - expected.values).abs().max() > 0.01


def test_padding_is_ignored() -> None:
    values = draw(4, 2, 9, dtype=torch.float64)
    short = values[..., :6]
    valid = (torch.arange(9) < 6).expand(4, 9)
    for function in (concentration, specificity):
        expected = function(attribution(short), top=0.34)
        for garbage in (0.0, 50.0, torch.nan):
            padded = values.masked_fill(~valid.unsqueeze(1), garbage)
            found = function(attribution(padded, valid=[valid]), top=0.34)
            torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
            assert torch.equal(found.tokens, torch.full((1, 4), 6))


def test_scopes_and_mixture() -> None:
    first, second = draw(5, 2, 7, dtype=torch.float64), draw(5, 2, 4, dtype=torch.float64, seed=1)
    found = concentration(attribution(first, second))
    assert found.scopes == ("all", "modality 0", "modality 1")
    assert found.parts == ("expert 0", "expert 1", "mixture")
    assert found.values.shape == (4, 3, 3, 5)
    assert found.tokens.tolist() == [[11] * 5, [7] * 5, [4] * 5]
    alone = concentration(attribution(second.sum(dim=1, keepdim=True)))
    assert alone.parts == ("expert 0",)
    assert torch.equal(
        alone.of("gini", "expert 0"), found.of("gini", "mixture", scope="modality 1")
    )
    whole = concentration(attribution(torch.cat([first, second], dim=2)))
    assert whole.scopes == ("all",)
    assert torch.equal(whole.of("entropy", "mixture"), found.of("entropy", "mixture"))


def test_undefined_values_are_left_out_and_counted() -> None:
    values = draw(20, 2, 6, dtype=torch.float64).abs()
    values[3, 1] = 0.0  # no importance
    valid = torch.ones(20, 6, dtype=torch.bool)
    valid[5] = False  # no token
    valid[7, 1:] = False  # one token
    given = attribution(values, valid=[valid])
    found = concentration(given)
    counts = {
        (row["part"], row["measure"]): row["samples"]
        for row in found.rows()
        if row["part"] != "mixture"
    }
    for e, lost in enumerate((1, 2)):
        expected = [20 - lost, 19 - lost, 20 - lost, 20 - lost]
        assert [counts[f"expert {e}", name] for name in MEASURES] == expected
    defined = [b for b in range(20) if b not in (3, 5)]
    mean = found.of("gini", "expert 1")[defined].mean()
    assert found.summary("gini", "expert 1").mean == pytest.approx(float(mean), abs=1e-12)
    note = "left out of means: of 20 samples 3 in all (importance 0"
    assert any(note in x for x in found.notes)
    overlap = specificity(given)
    assert overlap.values.isnan().nonzero()[:, 3].tolist() == [3, 5] * 2
    assert overlap.summary("cosine", "expert 0 / expert 1").samples == 18
    assert "left out" in repr(overlap)
    assert "left out" not in repr(concentration(attribution(values[8:])))


def test_top_tokens_among_near_ties_are_reported() -> None:
    apart = torch.tensor([[8.0, 4.0, 2.0, 1.0], [1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    near = torch.tensor([[8.0, 7.9, 2.0, 1.0], [1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    found = specificity(attribution(torch.stack([apart, near])), top=1)
    assert found.near_ties.tolist() == [False, True]
    assert "top tokens are nearly tied in 1 of 2 samples" in found.notes[-1]
    assert not specificity(attribution(torch.stack([apart, near])), top=2).near_ties.any()


@pytest.mark.parametrize(("count", "confidence"), [(16, 0.95), (60, 0.8)])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_the_expectation(skewed: bool, count: int, confidence: float) -> None:
    """In 4000 experiments; a binomial deviation of 3.5 standard errors, and 1.5% for the skew."""
    normal = draw(4000, count, dtype=torch.float64, seed=count)
    # The squared normal deviate, limited to 3 like a bounded measure, is skewed.
    values = normal.square().clamp(max=3.0) if skewed else normal
    expectation = 0.0
    if skewed:
        tail = math.erfc(math.sqrt(1.5))
        density = math.exp(-1.5) / math.sqrt(2 * math.pi)
        expectation = 1 - tail - 2 * math.sqrt(3) * density + 3 * tail
    found = [mean_interval(x, confidence) for x in values]
    covered = sum(x.low <= expectation <= x.high for x in found) / len(found)
    room = 3.5 * math.sqrt(confidence * (1 - confidence) / len(found))
    assert abs(covered - confidence) <= room + 0.015 * skewed
    # Control: intervals shorter by a tenth fail.
    narrow = sum(abs(x.mean - expectation) <= 0.9 * (x.high - x.mean) for x in found) / len(found)
    assert abs(narrow - confidence) > room


def test_few_samples_have_no_interval() -> None:
    found = concentration(attribution(draw(15, 1, 6, dtype=torch.float64)))
    summary = found.summary("gini", "expert 0")
    assert math.isfinite(summary.mean)
    assert math.isnan(summary.low)
    assert found.notes == ("no intervals for means of fewer than 16 samples",)
    enough = concentration(attribution(draw(16, 1, 6, dtype=torch.float64)))
    assert not enough.notes
    assert math.isfinite(enough.summary("gini", "expert 0").low)


def test_differences_are_paired() -> None:
    values, dense = draw(30, 2, 8, dtype=torch.float64), draw(30, 1, 8, dtype=torch.float64, seed=1)
    ours, theirs = concentration(attribution(values)), concentration(attribution(dense))
    found = ours.minus(theirs)
    assert found.index == "difference of concentration"
    assert found.parts == ("expert 0", "expert 1", "mixture")
    for part in found.parts:
        expected = ours.of("gini", part) - theirs.of("gini", "expert 0")
        assert torch.equal(found.of("gini", part), expected)
        assert found.summary("gini", part) == mean_interval(expected, 0.95)
    # Samples differ much more than the models: the paired interval is short.
    alike = concentration(attribution(values + 0.01 * draw(30, 2, 8, dtype=torch.float64, seed=2)))
    paired = ours.minus(alike).summary("gini", "expert 0")
    single = ours.summary("gini", "expert 0")
    assert 0 < paired.high - paired.low < 0.1 * (single.high - single.low)


def test_batches_are_joined() -> None:
    values = draw(20, 2, 8, dtype=torch.float64)
    valid = torch.ones(20, 8, dtype=torch.bool)
    valid[12:, 6:] = False
    whole = attribution(values, valid=[valid])
    # The second batch has less padding.
    batches = [attribution(values[:12]), attribution(values[12:, :, :6])]
    dense = [attribution(x.values[0][:, :1] + 1.0, valid=list(x.valid)) for x in (whole, *batches)]
    for found, expected in (
        (concentration(iter(batches)), concentration(whole)),
        (specificity(batches, dense[1:]), specificity(whole, dense[0])),
    ):
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.near_ties, expected.near_ties)
        assert found.parts == expected.parts


@pytest.mark.parametrize("method", ["gradient_rollout", "integrated_gradients"])
def test_layer_against_a_dense_transformer(method: str) -> None:
    torch.manual_seed(0)
    transformer = FusionTransformer(2, hidden_dim=16, output_dim=3, num_layers=1, num_heads=2)
    layer = InteractionMoE(2, transformer, hidden_dim=16).eval()
    with torch.no_grad():
        for parameter in layer.interaction_experts[1].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = [torch.randn(18, 6, 16), torch.randn(18, 4, 16)]
    masks = [torch.arange(6) < torch.randint(2, 7, (18, 1)), None]
    options: dict[str, Any] = {"method": method, "target": 1}
    experts = attribute(layer, inputs, masks, explains="expert", **options)
    dense = attribute(transformer.eval(), inputs, masks, **options)
    difference = concentration(experts).minus(concentration(dense))
    # The experts start as copies of the transformer; unique_1 was changed.
    for part in ("unique_0", "synergy", "redundancy"):
        assert difference.of("entropy", part).abs().max() < 1e-5
    assert difference.of("entropy", "unique_1").abs().max() > 1e-4
    found = specificity(experts, dense)
    assert len(found.parts) == 10
    assert found.summary("cosine", "synergy / dense").low > 1 - 1e-5
    assert found.summary("cosine", "synergy / dense").mean > float(
        found.summary("cosine", "unique_1 / dense").mean
    )


GIVEN = attribution(draw(3, 2, 5, dtype=torch.float64))
ONE = attribution(draw(3, 1, 5, dtype=torch.float64))
OTHER = attribution(draw(3, 2, 6, dtype=torch.float64))
NAN = attribution(torch.full((3, 2, 5), torch.nan))
PATH = attribution(draw(3, 1, 5, dtype=torch.float64), index="integrated_gradients")
MEASURED = concentration(GIVEN)


MISTAKES: list[Mistake] = [
    (lambda: concentration([]), "attributions: expected at least one Attribution"),
    (
        lambda: concentration([GIVEN, ONE]),
        r"attributions\[1\]: expected the experts of attributions\[0\], \('expert 0', ",
    ),
    (
        lambda: concentration([ONE, PATH]),
        r"attributions\[1\]: expected the method of attributions\[0\], 'grad",
    ),
    (lambda: concentration(NAN), r"attributions\[0\]: expected finite values"),
    (lambda: concentration(GIVEN, top=0), "top: expected an int from 1, got 0"),
    (lambda: concentration(GIVEN, top=1.5), "top: expected a share above 0 up to 1"),
    (lambda: concentration(GIVEN, confidence=1.0), "confidence: expected a number between 0"),
    (lambda: specificity(ONE), "attributions: expected at least two experts"),
    (lambda: specificity(GIVEN, OTHER), "dense: expected the tokens and masks of"),
    (lambda: specificity(GIVEN, PATH), "dense: expected the method gradient_rollout"),
    (lambda: MEASURED.minus(specificity(GIVEN)), "other: expected index 'concentration'"),
    (lambda: MEASURED.minus(concentration(OTHER)), "other: expected the same samples"),
    (lambda: MEASURED.minus(concentration(PATH)), "other: expected method 'gradient_rollout'"),
    (lambda: MEASURED.of("gini", "dense"), "part: expected one of expert 0"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes(call: Any, message: str) -> None:
    assert_refused(call, message)
