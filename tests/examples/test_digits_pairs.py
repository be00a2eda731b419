"""The demo's layer over token pairs: it learns, its numbers are the layer's, its figure shows them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples.digits.data import EXPERTS, TASKS, Digits, Encoded, Pairs, encode, load, make_pairs
from examples.digits.pair_figure import draw_pair_figure, write_pair_figure
from examples.digits.settings import Settings
from examples.digits.token_pairs import (
    PairResult,
    SampleExplanation,
    as_dict,
    evaluate,
    explain_first,
    make_layer,
    run_task,
    train_layer,
)

TINY = Settings(width=16, train_pairs=64, pair_steps=3, pair_batch_size=8)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load(seed=0)


@pytest.fixture(scope="module")
def encoded(digits: Digits) -> Encoded:
    return encode(digits, TINY.width, seed=0, steps=20)


def draw(digits: Digits, task: int, samples: int, test: bool = False) -> Pairs:
    rows = digits.test if test else digits.train
    return make_pairs(TASKS[task], digits, rows, samples, torch.Generator().manual_seed(1))


def test_experts_are_those_of_the_reference_layer() -> None:
    names = make_layer(TASKS[0], TINY).experts
    assert tuple(names) == ("unique_0", "unique_1", *EXPERTS[2:])


def test_training_repeats_with_its_seed(digits: Digits, encoded: Encoded) -> None:
    pairs = draw(digits, 0, TINY.train_pairs)
    first, again, other = (
        train_layer(TASKS[0], pairs, encoded, dataclasses.replace(TINY, seed=seed)).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_evaluation_says_what_the_layer_does(digits: Digits, encoded: Encoded) -> None:
    pairs, layer = draw(digits, 2, 30, test=True), make_layer(TASKS[2], TINY).eval()
    found = evaluate(TASKS[2], layer, pairs, encoded, digits)
    inputs, masks = pairs.batch(encoded, slice(None))
    with torch.no_grad():
        logits = layer(inputs, masks).logits
        # The patches' values add up to the logit less what the layer says of no patch at all.
        alone = layer(inputs, [torch.zeros_like(mask) for mask in masks]).logits
    assert found.accuracy == (logits.argmax(1) == pairs.labels).double().mean().item()
    explanation = layer.explain(inputs, masks, pairs.labels)
    assert found.share == tuple(explanation.expert_share().mean(dim=0).tolist())
    assert len(set(found.share)) == len(EXPERTS)
    sample = found.sample
    assert sample.guess == int(logits[0].argmax())
    assert sample.label == int(pairs.labels[0]) == sample.digits[0] == sample.digits[1]
    for image, index in zip(sample.images, pairs.index, strict=True):
        assert image == digits.images[index[0], 0].tolist()
    assert sample.valid == tuple(mask[0].tolist() for mask in masks)
    assert sample.patches == tuple(x[0].tolist() for x in explanation.shapley_values())
    gap = float((logits - alone)[0, sample.label])
    assert sum(map(sum, sample.patches)) == pytest.approx(gap, abs=1e-5)
    assert sample.error < 1e-5
    expected = explanation.pair_map()[0].sum(0)
    assert sample.pairs == expected.tolist()
    assert len(sample.pairs) == len(sample.pairs[0]) == 16
    assert not torch.equal(expected, expected.T), "a transposed map would pass"
    kept = as_dict(found)["first_sample"]
    assert set(kept) == set(dataclasses.asdict(sample)) - {"images"}  # type: ignore[call-overload]


def test_error_is_that_of_the_sum(digits: Digits, encoded: Encoded) -> None:
    pairs, layer = draw(digits, 0, 3, test=True), make_layer(TASKS[0], TINY).eval()
    explanation = layer.explain(*pairs.batch(encoded, slice(None)), pairs.labels)
    broken = dataclasses.replace(explanation, value=explanation.value + 0.25)
    assert explain_first(explanation, pairs, digits).error < 1e-5
    assert explain_first(broken, pairs, digits).error == pytest.approx(0.25, abs=1e-5)


def made_up_result() -> PairResult:
    """Patches worth 1 to 16 of A, one of them against the class, and nothing of B; two patches of B padded."""
    image = [[0.0] * 8] * 8
    values = [float(place + 1) for place in range(16)]
    values[1] = -2.0
    pairs = [[0.01 * (i - 5) * (j + 1) if j < 14 else 0.0 for j in range(16)] for i in range(16)]
    sample = SampleExplanation(
        digits=(3, 4),
        images=(image, [[1.0] * 8] * 8),
        label=3,
        guess=7,
        valid=([True] * 16, [True] * 14 + [False] * 2),
        patches=(values, [0.0] * 16),
        pairs=pairs,
        error=0.0,
    )
    return PairResult(TASKS[0], 0.9, (0.1, 0.2, 0.4, 0.3), sample)


def test_figure_shows_the_values() -> None:
    result = made_up_result()
    sample = result.sample
    figure = draw_pair_figure([result])
    left, middle, right = figure.axes[:3]
    for axes, image in ((left, sample.images[0]), (middle, sample.images[1])):
        assert axes.images[0].get_array().tolist() == image
    # Percent of the sum of |values|, 136, by rows from the top left.
    assert [text.get_text() for text in left.texts] == [
        *("1", "-1", "2", "3", "4", "4", "5", "6", "7", "7", "8", "9", "10", "10", "11", "12")
    ]
    places = [text.get_position() for text in left.texts]
    assert places[:2] == [(0.5, 0.5), (2.5, 0.5)]
    assert places[4] == (0.5, 2.5)
    assert [text.get_text() for text in middle.texts] == ["0"] * 14 + ["-"] * 2
    assert left.get_title() == "label 3, answer 7; A shows 3"
    assert middle.get_title() == "B shows 4"

    shown = right.images[0]
    torch.testing.assert_close(torch.tensor(shown.get_array().tolist()), torch.tensor(sample.pairs))
    low, high = shown.get_clim()
    assert -low == high == pytest.approx(1.4)
    black, grey, white = (sum(shown.to_rgba(value)[:3]) for value in (high, 0.0, low))
    assert black < grey - 1 < white - 2, "negative values are told from 0"
    assert right.get_title() == "pairs of patches, all experts"
    assert list(right.get_xticks()) == list(right.get_yticks()) == [0, 5, 10, 15]


def test_figure_hatches_padding() -> None:
    left, middle, right = draw_pair_figure([made_up_result()]).axes[:3]
    assert not left.patches
    assert [patch.get_xy() for patch in middle.patches] == [(3.5, 5.5), (5.5, 5.5)]
    assert [patch.get_xy() for patch in right.patches] == [(13.5, -0.5), (14.5, -0.5)]
    assert all(patch.get_hatch() for patch in (*middle.patches, *right.patches))


def test_figure_is_a_png(digits: Digits, encoded: Encoded, tmp_path: Path) -> None:
    train, test = draw(digits, 0, 64), draw(digits, 0, 20, test=True)
    results = [run_task(TASKS[0], train, test, encoded, digits, TINY)]
    write_pair_figure(results, tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.png"]


@pytest.mark.slow
def test_every_task_is_learned(digits: Digits) -> None:
    """A fifth of the demo's steps: far above chance."""
    settings = Settings(pair_steps=80)
    features = encode(digits, settings.width, seed=0, steps=150)
    for number, task in enumerate(TASKS):
        train, test = draw(digits, number, 2000), draw(digits, number, 300, test=True)
        found = run_task(task, train, test, features, digits, settings)
        # Chance is 10%, and 50% for the parity.
        assert found.accuracy > (0.6 if task.name == "synergy" else 0.85), task.name
