"""Tests of `profile --checkpoint`: a user's layer, swapped, against the reference."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from flmoe_kernels.cli.profile import profile
from flmoe_kernels.core.backend import BackendUnavailable
from flmoe_kernels.profile import ceilings, user_layer
from flmoe_kernels.profile import request as profile_request
from flmoe_kernels.profile.memory import memory_unavailable_reason
from flmoe_kernels.profile.user_layer import UserLayer, make_call
from tests.support.layers import LayerCase

app = typer.Typer()
app.command()(profile)
QUICK = ("--seconds", "0.02", "--no-memory")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use ceilings that take milliseconds, on one thread."""
    monkeypatch.setitem(ceilings._SIDE, "cpu", 96)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
    # A garbage collection before every block would take longer than the block.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    torch.set_num_threads(1)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mine.pt"
    torch.save({"ensemble_model": LayerCase(dim=16).reference().state_dict()}, path)
    return path


def test_own_layer_next_to_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    target, trace = tmp_path / "out.json", tmp_path / "trace.json"
    sizes = ("--batch", "3", "--tokens", "5,4", "--valid", "3,4", "--heads", "2")
    arguments = ("--checkpoint", str(checkpoint), *sizes, *QUICK)
    result = run(*arguments, "--json", str(target), "--trace", str(trace))
    held = json.loads(target.read_text())
    names = [(found["what"], found["contestant"]) for found in held["profiles"]]
    assert names == [
        (f"mine, batch 3, {what}", contestant)
        for what in ("training step", "inference")
        for contestant in ("cpu", "reference")
    ]
    assert held["layer"]["tokens"] == [5, 4]
    assert held["swapped"]["logits_error"] < 1e-4
    training, reference, inference, _ = held["profiles"]
    assert training["flop"] > 3 * inference["flop"]
    assert reference["ratio"]["median"] > 0
    stages = [{stage["name"] for stage in x["breakdown"]["stages"]} for x in (training, inference)]
    assert "flmoe::interaction_losses" in stages[0] - stages[1]
    assert "flmoe::interaction_losses_backward" in trace.read_text()
    assert "mine, batch 3, inference" in result.stdout


def test_one_pass_of_an_own_layer(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    arguments = ("--checkpoint", str(checkpoint), "--tokens", "5,4", "--batch", "2", *QUICK)
    run(*arguments, "--pass", "inference", "--no-check", "--json", str(target))
    held = json.loads(target.read_text())
    assert {found["what"] for found in held["profiles"]} == {"mine, batch 2, inference"}
    assert held["swapped"] is None
    result = run(*arguments, "--pass", "backward", code=2)
    assert "pass: expected training or inference, got 'backward'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tokens: expected 2 positive numbers, one per modality, got none"),
        (("--tokens", "5"), "tokens: expected 2 positive numbers, one per modality, got 5"),
        (("--tokens", "5,4", "--batch", "0"), "batch: expected at least 1, got 0"),
        (("--tokens", "5,4", "--valid", "6,4"), "valid: expected 2 numbers from 1 to 5,4, got 6,4"),
        (("--tokens", "5,4", "--dtype", "int4"), "dtype: expected one of float32"),
        (("--tokens", "5,4", "--heads", "3"), "mine.pt: "),
        (("--tokens", "5,4", "--shape", "mmimdb"), "--shape: does not apply to this kind"),
    ],
)
def test_invalid_requests_for_own_layers(
    checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("--checkpoint", str(checkpoint), *arguments, code=2)
    assert message in result.stderr


def test_learned_positions_fix_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "older.pt"
    case = LayerCase(lengths=(4, 4), compat="i2moe", dim=16)
    torch.save(case.reference().state_dict(), path)
    user = UserLayer(str(path), batch=2, num_heads=2)
    assert user.checked().tokens == (4, 4)
    make_call(user.checked(), "cpu", user_layer.TRAINING)()
    with pytest.raises(user_layer.UnsupportedRequest, match="learned positions fix them to 4,4"):
        UserLayer(str(path), batch=2, tokens=(5, 4)).checked()
    with pytest.raises(user_layer.UnsupportedRequest, match="takes no masks"):
        UserLayer(str(path), batch=2, valid=(3, 4)).checked()


def test_own_layer_without_kernels_is_an_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_layer.backends, "choose", lambda *_: "reference")
    with pytest.raises(BackendUnavailable, match="no kernels for float32 on cpu, only"):
        user_layer.contestants_of(UserLayer(str(checkpoint), 2, (5, 4)))


@pytest.mark.skipif(bool(memory_unavailable_reason("cpu")), reason="peaks need Linux's /proc")
def test_peak_of_an_own_layer_is_that_of_its_batch(checkpoint: Path) -> None:
    user = UserLayer(str(checkpoint), 512, (5, 4)).checked()
    [_, reference] = profile_request.user_subjects(user, user_layer.TRAINING)
    assert reference.peak is not None
    peak = reference.peak()
    assert peak is not None
    # At least one set of float32 rows in every expert and view, which the reference keeps for its backward.
    rows = 512 * 9 * 16 * 4 * 4 * 3
    assert rows < peak < 100 * rows
