"""Tests of the digits demo: data, comparison, explanations, a quick run."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples.digits import __main__ as command
from examples.digits import pipeline
from examples.digits.data import (
    EXPERTS,
    TASKS,
    Digits,
    Encoded,
    Pairs,
    Task,
    encode,
    load,
    make_pairs,
)
from examples.digits.report import print_report
from examples.digits.settings import Settings
from examples.digits.token_pairs import evaluate, explain_first, make_layer, train_layer
from examples.digits.train import PairClassifier, accuracy, predict, train

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


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output of `python -m examples.digits --quick`, and its results folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    demo = [sys.executable, "-m", "examples.digits", "--quick", "--out", str(out)]
    done = subprocess.run(demo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


@pytest.fixture
def results(quick_run: tuple[str, Path]) -> dict[str, Any]:
    return json.loads((quick_run[1] / "demo.json").read_text())


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


@pytest.mark.parametrize("fault", ["hook", "results"])
def test_a_layer_that_is_not_swapped_is_an_error(
    fault: str, digits: Digits, encoded: Encoded
) -> None:
    model = PairClassifier(10, TINY)
    batch = draw(TASKS[0], digits, digits.test, 8).batch(encoded, slice(None))
    assert pipeline.swapped(model, batch).swapped[0].losses_error > 0
    if fault == "hook":
        model.layer.interaction_experts[0].register_forward_hook(lambda *_: None)
    else:
        model.layer.reweight.mlp.network[0].weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="hook" if fault == "hook" else "finite"):
        pipeline.swapped(model, batch)


def test_explained_patches_add_up_to_the_logit(digits: Digits, encoded: Encoded) -> None:
    pairs, layer = draw(TASKS[2], digits, digits.test, 30), make_layer(TASKS[2], TINY).eval()
    result = evaluate(layer, pairs, encoded, digits)
    inputs = pairs.batch(encoded, slice(None))
    for x, tokens, index in zip(inputs, encoded.tokens, pairs.index, strict=True):
        assert torch.equal(x, tokens[index])
    with torch.no_grad():
        logits = layer(inputs).logits
        no_patches = layer(
            inputs, [torch.zeros(x.shape[:2], dtype=torch.bool) for x in inputs]
        ).logits
    assert result.accuracy == (logits.argmax(1) == pairs.labels).double().mean().item()
    explanation = layer.explain(inputs, None, pairs.labels)
    assert result.share == tuple(explanation.expert_share().mean(dim=0).tolist())
    assert [result.share[k] for k in result.leading[:1]] == [max(result.share)]
    sample = result.sample
    assert sample["guess"] == int(logits[0].argmax())
    assert sample["label"] == int(pairs.labels[0]) == sample["digits"][0] == sample["digits"][1]
    for image, index in zip(sample["images"], pairs.index, strict=True):
        assert image == digits.images[index[0], 0].tolist()
    gap = float((logits - no_patches)[0, sample["label"]])
    assert sum(map(sum, sample["patches"])) == pytest.approx(gap, abs=1e-5)
    expected = explanation.pair_map()[0].sum(0)
    assert sample["pairs"] == expected.tolist()
    assert not torch.equal(expected, expected.T), "a transposed map would pass"
    assert sample["error"] < 1e-5
    broken = dataclasses.replace(explanation, value=explanation.value + 0.25)
    assert explain_first(broken, pairs, digits)["error"] == pytest.approx(0.25, abs=1e-5)


def test_quick_run(quick_run: tuple[str, Path], results: dict[str, Any]) -> None:
    printed, out = quick_run
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


def test_report_marks_the_expected_and_the_largest_share(results: dict[str, Any]) -> None:
    for name, layer in results["token_pair_layer"].items():
        layer["share"] = dict(zip(EXPERTS, (0.1, 0.1, 0.7, 0.1), strict=True))
        layer["most_relied_on"] = ["synergy", "redundancy"] if name == "redundant" else ["synergy"]
    console = Console(file=io.StringIO(), width=100)
    print_report(results, console)
    lines = console.file.getvalue().splitlines()
    for task, verdict in zip(TASKS, ("no", "no", "tied", "yes"), strict=True):
        [line] = [line for line in lines if task.name in line and "70%" in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[-1] == verdict
        assert cells[4] == ("*[70%]" if verdict == "yes" else "*70%")


def test_a_stopped_run_leaves_no_results_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("demo.json", "demo_synergy.png", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    monkeypatch.setattr(pipeline, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        command.main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("fault", ["extra", "kernels", "folder"])
def test_faults_are_reported_before_training(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / ("file" if fault == "folder" else "out")
    if fault == "extra":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    if fault == "kernels":
        monkeypatch.setattr(command, "backend_status", lambda: {"cpu": (False, "not built")})
    with pytest.raises(typer.Exit) as stopped:
        command.main(out)
    assert stopped.value.exit_code == 2
    message = {
        "extra": "pip install 'flmoe-kernels[demo]'",
        "kernels": "not built",
        "folder": "file",
    }
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message[fault] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_published_layer_learns(digits: Digits) -> None:
    settings = Settings(steps=60, batch_size=16)
    task = TASKS[2]
    features = encode(digits, settings.width, seed=0, steps=100)
    model = train(task, draw(task, digits, digits.train), features, settings)
    held_out = draw(task, digits, digits.test, 300)
    assert accuracy(predict(model, held_out, features), held_out.labels) > 5 * task.chance


@pytest.mark.slow
@BY_NAME
def test_layer_over_token_pairs_learns(task: Task, digits: Digits) -> None:
    """After a fifth of the demo's steps, accuracy is far above chance (10%, or 50% for the parity)."""
    settings = Settings(pair_steps=80)
    features = encode(digits, settings.width, seed=0, steps=150)
    layer = train_layer(task, draw(task, digits, digits.train, 2000), features, settings)
    result = evaluate(layer, draw(task, digits, digits.test, 300), features, digits)
    assert result.accuracy > (0.6 if task.name == "synergy" else 0.85)
