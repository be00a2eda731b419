"""The demo's second act: it learns, its numbers are those of the layer, its picture is whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from flmoe_kernels.demo.data import EXPERTS, TASKS, Digits, Encoded, Pairs, encode, load, make_pairs
from flmoe_kernels.demo.pair_figure import write_pair_figure
from flmoe_kernels.demo.settings import Settings
from flmoe_kernels.demo.token_pairs import as_dict, examine, make_layer, run_task, train_layer

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


def test_experts_are_those_of_the_first_act() -> None:
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


def test_examination_says_what_the_layer_does(digits: Digits, encoded: Encoded) -> None:
    pairs, layer = draw(digits, 2, 30, test=True), make_layer(TASKS[2], TINY).eval()
    found = examine(TASKS[2], layer, pairs, encoded, digits)
    inputs, masks = pairs.batch(encoded, slice(None))
    with torch.no_grad():
        logits = layer(inputs, masks).logits
    assert logits is not None
    assert found.accuracy == (logits.argmax(1) == pairs.labels).double().mean().item()
    picture = found.picture
    assert picture.guess == int(logits[0].argmax())
    assert picture.label == int(pairs.labels[0]) == picture.digits[0] == picture.digits[1]
    assert sum(found.share) == pytest.approx(1.0, abs=1e-5)
    # The patches' values add up to the logit less what the layer says of no patch at all.
    with torch.no_grad():
        alone = layer(inputs, [torch.zeros_like(mask) for mask in masks]).logits
    gap = float((logits - alone)[0, picture.label])
    assert sum(map(sum, picture.patches)) == pytest.approx(gap, abs=1e-5)
    assert picture.error < 1e-5
    assert torch.tensor(picture.pairs).shape == (16, 16)
    assert not torch.tensor(picture.pairs)[~masks[0][0]].any()
    assert "images" not in as_dict(found)["first_sample"]  # type: ignore[operator]


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
