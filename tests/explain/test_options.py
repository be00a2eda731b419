"""Tests of the command `explain`: options, names of targets and tokens."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.explain.report.findings import Findings, targets_of
from flmoe_kernels.explain.report.request import Request
from tests.support.explain_files import full_arrays, write_checkpoint, write_data
from tests.support.refusals import assert_refused


def test_targets() -> None:
    arrays = full_arrays()
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])

    def found(target: str | None, labels: Any) -> list[int]:
        labels = None if labels is None else torch.as_tensor(labels)
        features: Any = types.SimpleNamespace(labels=labels)
        asked = Request(Path("layer.pt"), Path("data.npz"), Path("out"), target=target)
        return targets_of(asked, features, logits).tolist()

    several = [[True, False, True, False], [False] * 4, [False, False, False, True]]
    assert found(None, None) == found("predicted", arrays["labels"]) == [1, 0, 3]
    assert found(None, arrays["labels"]) == found("label", arrays["labels"]) == [0, 3, 1]
    assert found("label", several) == [2, 0, 3]
    assert found("3", None) == [3, 3, 3]
    assert_refused(lambda: found("4", None), "target: expected a class from 0 to 3, got 4")
    assert_refused(lambda: found("label", None), "target: expected labels in the file")


def test_token_names_are_one_short_line() -> None:
    tokens = np.array([["a" * 5000, "x\x00\x1b\n\u202ey", "<b>&"]])
    features = types.SimpleNamespace(tokens=[tokens, None])
    request = types.SimpleNamespace(modality_names=None)
    findings: Any = types.SimpleNamespace(features=features, request=request)
    token_name = functools.partial(Findings.token_name, findings)
    assert token_name(0, 0, 0) == f"0:0 \u201c{'a' * 99}\u2026\u201d"
    assert token_name(0, 0, 1) == "0:1 \u201cx    y\u201d"
    # The table escapes the text.
    assert token_name(0, 0, 2) == "0:2 \u201c<b>&\u201d"
    assert token_name(0, 1, 7) == "1:7"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--samples", "0", "samples: expected an int from 1, got 0"),
        ("--attribution", "guess", "attribution: expected one of attention_rollout"),
        ("--method", "closed_form", "method: expected one of auto, exact, sampling"),
        ("--pairs", "some", "pairs: expected one of across, all"),
        ("--target", "-1", "target: expected label, predicted or a class, got '-1'"),
        ("--target", "4", "target: expected a class from 0 to 3, got 4"),
        ("--fill", "noise", "fill: expected one of zero, mean, drop"),
        ("--seed", "-1", "seed: expected an int from 0"),
        ("--budget", "3", "budget: expected at least"),
        ("--heads", "3", "layer.pt"),
        ("--checkpoint", "none.pt", "none.pt"),
        ("--data", "none.npz", "none.npz: cannot be read: No such file or directory"),
        ("--data", "layer.pt", "layer.pt: "),
        ("--out", "layer.pt", "layer.pt: expected a folder, got a file"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    option: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    write_data(tmp_path, full_arrays())
    monkeypatch.chdir(tmp_path)
    options = {"--checkpoint": "layer.pt", "--data": "data.npz", "--out": str(tmp_path / "out")}
    words = [word for pair in (options | {option: value}).items() for word in pair]
    result = CliRunner().invoke(app, ["explain", *words])
    assert result.exit_code == 2, result.output
    [line] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out" / "index.html").exists()
