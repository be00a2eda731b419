"""The demo: its data are what they claim to be, its comparison can fail, its files are whole."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import digits as demo
from examples.digits import memory, pipeline
from examples.digits.data import (
    EXPERTS,
    MAX_PADDED,
    NUM_TOKENS,
    TASKS,
    Digits,
    Encoded,
    Pairs,
    Task,
    encode,
    load,
    make_pairs,
)
from examples.digits.figure import write_figure
from examples.digits.measure import GROUPS, Times, compare, interleaved
from examples.digits.memory import Peak
from examples.digits.report import print_report
from examples.digits.results import Results
from examples.digits.settings import Settings
from examples.digits.train import PairClassifier, Predictions, predict, reliance, train
from tests.support.digits_results import TINY, made_up_results

OUTPUTS = {"demo.json", "demo.png", "demo_pairs.png", *(f"{task.name}.pt" for task in TASKS)}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load(seed=0)


@pytest.fixture(scope="module")
def encoded(digits: Digits) -> Encoded:
    return encode(digits, TINY.width, seed=0, steps=TINY.encoder_steps)


def draw(task: Task, digits: Digits, rows: Tensor, samples: int = 4000) -> Pairs:
    return make_pairs(task, digits, rows, samples, torch.Generator().manual_seed(1))


def best_guess(evidence: Tensor, labels: Tensor) -> float:
    """Accuracy of the best rule from one discrete variable to the label."""
    table = torch.zeros(int(evidence.max()) + 1, int(labels.max()) + 1)
    table.index_put_((evidence, labels), torch.ones(len(labels)), accumulate=True)
    return (table.max(dim=1).values.sum() / len(labels)).item()


def test_no_image_is_in_both_splits(digits: Digits) -> None:
    assert len(digits.labels) == 1797
    assert sorted([*digits.train.tolist(), *digits.test.tolist()]) == list(range(1797))
    seen = {tuple(image.flatten().tolist()) for image in digits.images[digits.train]}
    assert not any(tuple(image.flatten().tolist()) in seen for image in digits.images[digits.test])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_labels_follow_the_construction(task: Task, digits: Digits) -> None:
    pairs = draw(task, digits, digits.test)
    a, b = (digits.labels[index] for index in pairs.index)
    truth = {"unique_a": a, "unique_b": b, "redundant": a, "synergy": (a + b) % 2}[task.name]
    assert torch.equal(pairs.labels, truth)
    assert len(pairs.labels.unique()) == task.num_classes
    for index in pairs.index:
        assert set(index.tolist()) <= set(digits.test.tolist())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_each_image_tells_only_what_its_kind_of_interaction_allows(
    task: Task, digits: Digits
) -> None:
    pairs = draw(task, digits, digits.train)
    a, b = (digits.labels[index] for index in pairs.index)
    sure, guess = 1.0, 1.3 * task.chance
    from_a, from_b = best_guess(a, pairs.labels), best_guess(b, pairs.labels)
    assert from_a == sure if task.name in ("unique_a", "redundant") else from_a < guess
    assert from_b == sure if task.name in ("unique_b", "redundant") else from_b < guess
    assert best_guess(a * 10 + b, pairs.labels) == sure


def test_redundant_pairs_are_two_images_of_one_digit(digits: Digits) -> None:
    pairs = draw(TASKS[2], digits, digits.train)
    a, b = pairs.index
    assert TASKS[2].name == "redundant"
    assert not (a == b).any()
    assert torch.equal(digits.labels[a], digits.labels[b])


def test_masks_cut_the_end_of_one_modality_at_most(digits: Digits, encoded: Encoded) -> None:
    pairs = draw(TASKS[0], digits, digits.train)
    lengths = [mask.sum(dim=1) for mask in pairs.masks]
    for mask, length in zip(pairs.masks, lengths, strict=True):
        assert mask.shape == (len(pairs), NUM_TOKENS)
        assert torch.equal(mask, torch.arange(NUM_TOKENS) < length.unsqueeze(1))
        assert length.min() == NUM_TOKENS - MAX_PADDED
        assert 0.05 < (length < NUM_TOKENS).float().mean() < 0.5
    assert not ((lengths[0] < NUM_TOKENS) & (lengths[1] < NUM_TOKENS)).any()

    inputs, masks = pairs.batch(encoded, slice(0, 64))
    for tokens, x, mask, index in zip(encoded.tokens, inputs, masks, pairs.index, strict=True):
        assert not mask.all()
        assert (x[~mask] == 0).all()
        assert torch.equal(x[mask], tokens[index[:64]][mask])


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


def test_training_repeats_with_its_seed(digits: Digits, encoded: Encoded) -> None:
    pairs = draw(TASKS[0], digits, digits.train, TINY.train_pairs)
    first, again, other = (
        train(TASKS[0], pairs, encoded, dataclasses.replace(TINY, seed=seed)).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.slow
def test_training_learns(digits: Digits) -> None:
    settings = Settings(steps=60, batch_size=16)
    task = TASKS[2]
    features = encode(digits, settings.width, seed=0, steps=100)
    model = train(task, draw(task, digits, digits.train), features, settings)
    held_out = draw(task, digits, digits.test, 300)
    assert predict(model, held_out, features).accuracy(held_out.labels) > 5 * task.chance


def one_batch(digits: Digits, encoded: Encoded) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return pipeline.first_batch(draw(TASKS[0], digits, digits.test, 8), encoded, TINY)


def test_comparison_sees_equal_models_as_equal(digits: Digits, encoded: Encoded) -> None:
    model = PairClassifier(10, TINY)
    found = compare(model, copy.deepcopy(model), one_batch(digits, encoded), TINY)
    assert set(found) == set(GROUPS)
    for difference in found.values():
        assert difference.largest == 0.0
        assert difference.scale > 0.0
        assert difference.rounding_only


@pytest.mark.parametrize(
    ("parameter", "groups"),
    [
        ("interaction_experts.2.fusion_model.network.1.fc.weight", {"logits", "gradients"}),
        ("reweight.mlp.network.3.bias", {"logits", "weights", "gradients"}),
        ("interaction_experts.0.fusion_model.network.0.mlp.network.0.weight", {"losses"}),
    ],
)
def test_comparison_sees_one_changed_parameter(
    parameter: str, groups: set[str], digits: Digits, encoded: Encoded
) -> None:
    torch.manual_seed(0)
    model = PairClassifier(10, TINY)
    with torch.no_grad():
        # Experts start as copies of one another; weights among equals would change nothing.
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.layer.get_parameter(parameter).view(-1)[0] += 0.05
    found = compare(model, changed, one_batch(digits, encoded), TINY)
    wrong = {group for group, difference in found.items() if not difference.rounding_only}
    assert groups <= wrong
    assert "weights" in groups or "weights" not in wrong


def test_comparison_refuses_what_is_not_finite(digits: Digits, encoded: Encoded) -> None:
    model = PairClassifier(10, TINY)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layer.get_parameter("reweight.mlp.network.3.bias")[0] = float("nan")
    with pytest.raises(RuntimeError, match="logits is not finite"):
        compare(model, broken, one_batch(digits, encoded), TINY)


def test_interleaved_alternates_and_warms_up() -> None:
    calls: list[str] = []
    times = interleaved(lambda: calls.append("r"), lambda: calls.append("f"), repeats=3)
    assert calls == ["r", "f"] * 4
    assert times.repeats == 3
    assert Times(6.0, 2.0, 1).speed_up == 3.0


def test_reliance_names_the_expert_that_the_answer_rests_on() -> None:
    labels = torch.arange(10).repeat(5)
    expert_logits = 0.1 * torch.randn(50, 4, 10, generator=torch.Generator().manual_seed(0))
    expert_logits[:, 2] += 8.0 * torch.nn.functional.one_hot(labels, 10)
    # A constant over classes is invisible to a softmax: it must not look like reliance.
    expert_logits[:, 0] += 1000.0
    weights = torch.tensor([0.4, 0.2, 0.2, 0.2]).expand(50, 4)
    logits = (weights.unsqueeze(2) * expert_logits).sum(dim=1)
    found = reliance(Predictions(logits, weights, expert_logits), labels)
    assert found.most == {"share": "synergy", "weight": "unique_a", "accuracy_lost": "synergy"}
    assert found.share[2] > 0.8
    assert sum(found.share) == pytest.approx(1.0)
    assert found.weight == pytest.approx((0.4, 0.2, 0.2, 0.2))
    assert found.alone[2] == 1.0
    assert found.without[2] < 0.5 < found.without[0]


def printed_report(results: Results) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    print_report(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_report_of_the_layer_over_token_pairs() -> None:
    lines = printed_report(made_up_results(0, 1e-7))
    titles = [
        line for line in lines if line.startswith(("What each", "The layer over", "The same"))
    ]
    assert [title.split()[0] for title in titles] == ["What", "The", "The"]
    start, end = lines.index(titles[1]), lines.index(titles[2])
    assert titles[1].startswith("The layer over token pairs")
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines[start:end]
        if line.startswith("│")
    ]
    assert rows == [
        ["unique_a", "91.0%", "*[61%]", "11%", "15%", "13%", "yes"],
        ["unique_b", "92.0%", "12%", "*[52%]", "17%", "19%", "yes"],
        ["redundant", "93.0%", "14%", "*41%", "16%", "[29%]", "no"],
        ["synergy", "94.0%", "*44%", "10%", "[28%]", "18%", "no"],
    ]
    caption = " ".join(" ".join(lines[start:end]).split())
    assert "add up to the logit less that of no patches, but for 4e-07" in caption
    budgets = f"{TINY.pair_steps} steps of {TINY.pair_batch_size} pairs"
    assert f"Trained for {budgets}, the reference layer for {TINY.steps} of 4" in caption


def test_report_tells_when_another_expert_was_relied_on() -> None:
    results = made_up_results(relied_on=EXPERTS.index("synergy"), fast_error=1e-7)
    by_share = [result.as_expected["share"] for result in results.tasks]
    assert by_share == [False, False, False, True]
    lines = printed_report(results)
    for task, verdict in zip(TASKS, ("no", "no", "no", "yes"), strict=True):
        [line] = [line for line in lines if task.name in line and "70%" in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[-1] == verdict
        assert cells[3] == ("*[70%]" if verdict == "yes" else "*70%")


@pytest.mark.parametrize(("load", "told"), [(1.0, False), (3.0, True)])
def test_report_tells_when_the_machine_was_busy(load: float, told: bool) -> None:
    printed = "\n".join(printed_report(made_up_results(0, 1e-7, load)))
    assert ("indicative" in printed) == told


@pytest.mark.parametrize(("fast_error", "code"), [(1e-7, 0), (1e-2, 1)])
def test_exit_code_tells_whether_the_layers_agree(
    fast_error: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = made_up_results(0, fast_error)
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *_: results)
    assert demo.main(tmp_path) == code
    printed = capsys.readouterr()
    assert ("differ by more than rounding" in printed.err) == (code == 1)
    assert ("NO" in printed.out) == (code == 1)
    assert json.loads((tmp_path / "demo.json").read_text())["same_but_for_rounding"] == (code == 0)


def test_figure_is_a_png_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "demo.png"
    target.write_text("old")
    write_figure(made_up_results(0, 1e-7), target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch, encoded: Encoded) -> None:
    """demo.run on the smallest settings, without the processes that measure memory."""
    monkeypatch.setattr(Settings, "choose", lambda seed, quick: TINY)
    monkeypatch.setattr(pipeline, "encode", lambda *_: encoded)
    monkeypatch.setattr(memory, "measure", lambda mode, settings: Peak(1, "not measured"))


@pytest.mark.usefixtures("tiny_run")
def test_interrupt_while_training_keeps_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_one_then_stop(task: Task, *rest: object) -> PairClassifier:
        assert torch.get_num_threads() == 1
        if task is not TASKS[0]:
            raise KeyboardInterrupt
        return train(task, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "train", train_one_then_stop)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert demo.main(tmp_path) == 130
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unique_a.pt"]
    assert pipeline.load_checkpoint(TASKS[0], TINY, tmp_path / "unique_a.pt")


@pytest.mark.usefixtures("tiny_run")
@pytest.mark.parametrize("victim", ["checkpoint", "json", "figure"])
def test_interrupt_while_writing_leaves_no_part_of_a_file(
    victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def half(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    results = made_up_results(0, 1e-7)
    if victim == "checkpoint":
        monkeypatch.setattr(torch, "save", lambda content, path: half(path))
    else:
        monkeypatch.setattr(pipeline, "run_pipeline", lambda *_: results)
        owner, name = (Path, "write_text") if victim == "json" else (Figure, "savefig")
        body = half if victim == "json" else lambda figure, path, **_: half(path)
        monkeypatch.setattr(owner, name, body)
    assert demo.main(tmp_path) == 130
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"demo.json"} if victim == "figure" else set())


def test_missing_extra_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        demo.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_kernels_are_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "backend_status", lambda: {"cpu": (False, "not built here")})
    assert demo.main(tmp_path) == 2
    assert capsys.readouterr().err == "error: not built here\n"


def test_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert demo.main(tmp_path / "file") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_layer_that_is_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PairClassifier(2, TINY)
    model.layer.interaction_experts[0].register_forward_hook(lambda *_: None)
    with pytest.raises(pipeline.DemoError, match="hook"):
        pipeline.swap_layer(model)


def demo_command(out: Path) -> list[str]:
    return [sys.executable, "-m", "examples.digits", "--quick", "--out", str(out)]


@pytest.mark.slow
def test_quick_run_from_end_to_end(tmp_path: Path) -> None:
    done = subprocess.run(
        demo_command(tmp_path / "out"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert set(found["tasks"]) == {task.name for task in TASKS}
    for task in found["tasks"].values():
        assert task["accuracy_before"] == task["accuracy_after"]
        assert task["changed_predictions"] == 0
        assert all(difference["rounding_only"] for difference in task["differences"].values())
        assert sum(task["experts"]["share"].values()) == pytest.approx(1.0, abs=1e-5)
        for measure, expert in task["most_relied_on"].items():
            assert task["as_expected"][measure] == (expert == task["expected_expert"])
    # The two layers are not one and the same code: something rounds differently.
    assert found["largest_difference"]["gradients"] > 0
    for peak in found["peak_memory_of_a_training_step"].values():
        assert peak["bytes"] > 2**20
    for word in ("synergy", "gradients", "peak memory"):
        assert word in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        demo_command(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        assert "handwritten digits" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip() == "interrupted: files already written are whole"
    assert {path.name for path in tmp_path.iterdir()} <= OUTPUTS
