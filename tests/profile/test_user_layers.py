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
from flmoe_kernels.profile import ceilings
from flmoe_kernels.profile.memory import memory_unavailable_reason, peak_bytes
from flmoe_kernels.profile.request import Request
from flmoe_kernels.profile.user_layer import user_shape
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
        (f"interaction_moe/mine, batch 3/{phase}/float32", contestant)
        for phase in ("forward+backward", "forward")
        for contestant in ("cpu", "reference")
    ]
    training, reference, inference, _ = held["profiles"]
    assert training["flop"] > 3 * inference["flop"]
    assert reference["ratio"]["median"] > 0
    stages = [{stage["name"] for stage in x["breakdown"]["stages"]} for x in (training, inference)]
    assert "flmoe::interaction_losses" in stages[0] - stages[1]
    assert "flmoe::interaction_losses_backward" in trace.read_text()
    assert "interaction_moe/mine, batch 3/forward/float32" in result.stdout


def test_one_pass_of_an_own_layer(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    arguments = ("--checkpoint", str(checkpoint), "--tokens", "5,4", "--batch", "2", *QUICK)
    run(*arguments, "--pass", "inference", "--no-check", "--json", str(target))
    [ours, peer] = json.loads(target.read_text())["profiles"]
    assert ours["what"] == peer["what"] == "interaction_moe/mine, batch 2/forward/float32"
    run(*arguments, "--pass", "backward", "--backend", "cpu", "--json", str(target))
    [ours] = json.loads(target.read_text())["profiles"]
    assert ours["contestant"] == "cpu"


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
    arguments = ("--checkpoint", str(path), "--batch", "2", "--heads", "2", *QUICK)
    assert "cpu" in run(*arguments).stdout
    for more, message in (
        (("--tokens", "5,4"), "learned positions fix them to 4,4"),
        (("--valid", "3,4"), "takes no masks"),
    ):
        assert message in run(*arguments, *more, code=2).stderr


def test_a_sparse_layer(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    case = LayerCase(dim=16, gate="NoisyGate", sparse=True)
    torch.save(case.reference().state_dict(), path)
    arguments = ("--checkpoint", str(path), "--tokens", "5,4", "--gate", "NoisyGate", *QUICK)
    assert "cpu" in run(*arguments, "--batch", "2", "--heads", "2").stdout


@pytest.mark.skipif(bool(memory_unavailable_reason("cpu")), reason="peaks need Linux's /proc")
def test_peak_of_an_own_layer_is_that_of_its_batch(checkpoint: Path) -> None:
    case = Request("interaction_moe", user_shape(str(checkpoint), 512, (5, 4))).case()
    peak = peak_bytes(case, "reference")
    assert peak is not None
    # At least one set of float32 rows in every expert and view, which the reference keeps for its backward.
    rows = 512 * 9 * 16 * 4 * 4 * 3
    assert rows < peak < 100 * rows
