"""Tests of the digits demo: data, comparison, explanations, a quick run."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples.digits import __main__ as command
from examples.digits.data import (
    TASKS,
    Digits,
    Encoded,
    Pairs,
    Task,
    encode,
    load,
    make_pairs,
)
from examples.digits.settings import Settings
from examples.digits.token_pairs import evaluate, train_layer
from examples.digits.train import train

TINY = Settings(
    width=16,
    num_layers=1,
    num_heads=2,
    batch_size=4,
    steps=2,
    encoder_steps=2,
    pair_steps=3,
    pair_batch_size=8,
)
BY_NAME = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load(seed=0)


@pytest.fixture(scope="module")
def encoded(digits: Digits) -> Encoded:
    return encode(digits, TINY.width, seed=0, steps=TINY.encoder_steps)


def draw(task: Task, digits: Digits, rows: Tensor, samples: int = 4000) -> Pairs:
    return make_pairs(task, digits, rows, samples, torch.Generator().manual_seed(1))


def test_no_image_is_in_both_splits(digits: Digits) -> None:
    assert len(digits.labels) == 1797
    assert sorted([*digits.train.tolist(), *digits.test.tolist()]) == list(range(1797))
    seen = {tuple(image.flatten().tolist()) for image in digits.images[digits.train]}
    assert not any(tuple(image.flatten().tolist()) in seen for image in digits.images[digits.test])


@BY_NAME
def test_labels_follow_the_construction(task: Task, digits: Digits) -> None:
    pairs = draw(task, digits, digits.test)
    a, b = (digits.labels[index] for index in pairs.index)
    truth = {"unique_a": a, "unique_b": b, "redundant": a, "synergy": (a + b) % 2}[task.name]
    assert torch.equal(pairs.labels, truth)
    assert len(pairs.labels.unique()) == task.num_classes
    for index in pairs.index:
        assert set(index.tolist()) <= set(digits.test.tolist())
    if task.name == "redundant":
        assert not (pairs.index[0] == pairs.index[1]).any()
        assert torch.equal(a, b)


def test_encoders_learn_nothing_from_test_images(digits: Digits, encoded: Encoded) -> None:
    images, labels = digits.images.clone(), digits.labels.clone()
    images[digits.test] = 1.0 - images[digits.test]
    labels[digits.test] = 9 - labels[digits.test]
    spoilt = Digits(images, labels, digits.train, digits.test)
    other = encode(spoilt, TINY.width, seed=0, steps=TINY.encoder_steps)
    for ours, theirs in zip(encoded.tokens, other.tokens, strict=True):
        assert torch.equal(ours[digits.train], theirs[digits.train])
        assert not torch.equal(ours[digits.test], theirs[digits.test])
        known = ours[digits.train]
        torch.testing.assert_close(
            known.mean(dim=(0, 1)), torch.zeros(TINY.width), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(known.std(dim=(0, 1)), torch.ones(TINY.width), atol=1e-3, rtol=0)


@pytest.mark.parametrize("trained", [train, train_layer])
def test_training_repeats_with_its_seed(trained: Any, digits: Digits, encoded: Encoded) -> None:
    pairs = draw(TASKS[0], digits, digits.train, 32)
    first, again, other = (
        trained(TASKS[0], pairs, encoded, dataclasses.replace(TINY, seed=seed)).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_quick_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tiny = dataclasses.replace(TINY, train_pairs=64, test_pairs=32)
    monkeypatch.setattr(Settings, "choose", lambda seed, quick: tiny)
    command.main(out, quick=True)
    printed = capsys.readouterr().out
    results = json.loads((out / "demo.json").read_text())
    checkpoints = {f"{task.name}.pt" for task in TASKS}
    figures = {f"demo_{task.name}.png" for task in TASKS}
    assert {path.name for path in out.iterdir()} == checkpoints | figures | {"demo.json"}
    assert (out / "demo_synergy.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert set(results["tasks"]) == {task.name for task in TASKS}
    for task in results["tasks"].values():
        assert task["accuracy_before"] == task["accuracy_after"]
        assert task["changed_predictions"] == 0
        assert "1 layer swapped" in task["swap"]
    for layer in results["token_pair_layer"].values():
        assert sum(layer["share"].values()) == pytest.approx(1.0, abs=1e-5)
        assert max(layer["share"], key=layer["share"].get) == layer["most_relied_on"][0]
    for word in ("synergy", "latents", "faster", "profile --checkpoint"):
        assert word in printed


def test_a_missing_extra_is_reported_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(typer.Exit) as stopped:
        command.main(tmp_path / "out")
    assert stopped.value.exit_code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "pip install 'flmoe-kernels[demo]'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@BY_NAME
def test_layer_over_token_pairs_learns(task: Task, digits: Digits) -> None:
    """After a fifth of the demo's steps, accuracy is far above chance (10%, or 50% for the parity)."""
    settings = Settings(pair_steps=80)
    features = encode(digits, settings.width, seed=0, steps=150)
    layer = train_layer(task, draw(task, digits, digits.train, 2000), features, settings)
    result = evaluate(layer, draw(task, digits, digits.test, 300), features, digits)
    assert result.accuracy > (0.6 if task.name == "synergy" else 0.85)
