"""Tests of data files for the command `explain`: error messages, no unpickling."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from flmoe_kernels.explain.report.features import FeatureError, load_features
from tests.support.explain_files import Arrays, Trap, full_arrays, write_data

X = np.zeros((3, 5, 8), dtype=np.float32)
BROKEN = X.copy()
BROKEN[1, 4, 0] = np.nan  # padding in sample 1, which the mask allows
WRONG = X.copy()
WRONG[2, 1, 0] = np.inf
NO_TOKENS = {"masks_0": np.zeros((3, 5)), "masks_1": np.eye(3, 9)[[0, 1, 1]] * [[1], [0], [1]]}
# (replaced arrays, None for a missing one; expected message)
BAD_ARRAYS: list[tuple[Arrays, str]] = [
    ({"inputs_1": None}, r"inputs_1: expected \(samples, tokens, 8\), got none"),
    ({"inputs_0": X[:, :, :7]}, r"inputs_0: .* \(samples, tokens, 8\), got float32 \(3, 5, 7\)"),
    ({"inputs_1": X[:2]}, r"inputs_1: expected floats \(3, tokens, 8\), got float32 \(2, 5, 8\)"),
    ({"inputs_0": WRONG}, "inputs_0: expected finite valid tokens, .* in sample 2"),
    ({"inputs_2": X}, "inputs_2: expected inputs_0 .. inputs_1"),
    ({"input_0": X}, "input_0: expected inputs_0 .. inputs_1, .* and labels$"),
    ({"masks_0": np.ones((3, 4))}, r"masks_0: .* 0/1 \(3, 5\), got float64 \(3, 4\)"),
    ({"masks_0": np.full((3, 5), 2)}, "masks_0: expected 0 and 1 only"),
    (NO_TOKENS, r"masks_\*: expected a valid token in sample 1"),
    ({"labels": np.array([0, 4, 1])}, "labels: expected classes from 0 to 3, got 0 to 4"),
    ({"labels": np.ones((3, 5))}, r"labels: expected bool or 0/1 \(3, 4\)"),
    ({"tokens_0": X[:, :, 0]}, r"tokens_0: expected unicode strings \(3, 5\), got float32"),
    ({"image_0": np.zeros((3, 4, 4))}, "image_0: expected a square of patches, got 5 tokens"),
]


def write_changed(folder: Path, arrays: Arrays) -> Path:
    whole = {**full_arrays(), **arrays}
    return write_data(folder, {name: array for name, array in whole.items() if array is not None})


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_bad_arrays_are_named(arrays: Arrays, message: str, tmp_path: Path) -> None:
    path = write_changed(tmp_path, arrays)
    with pytest.raises(FeatureError, match=message) as caught:
        load_features(path, 2, 8, 4, torch.float32)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_the_documented_file_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet of docs/explain.md writes a file for the command; its table lists all names of arrays."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "explain.md").read_text()
    monkeypatch.chdir(tmp_path)
    [snippet] = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "savez" in x]
    exec(snippet, {})
    found = load_features(tmp_path / "features.npz", 2, 64, 5, torch.float32)
    with np.load(tmp_path / "features.npz") as file:
        written = {re.sub(r"\d+", "0", name) for name in file.files} | {"image_0"}
    assert written - {"image_1"} == set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert found.lengths == (12, 49)
    assert found.masks is not None
    assert found.labels is not None
    assert found.tokens[0] is not None
    assert found.images[1] is not None


def test_padding_may_have_any_values(tmp_path: Path) -> None:
    path = write_changed(tmp_path, {"inputs_0": BROKEN.astype(">f8")})
    found = load_features(path, 2, 8, 4, torch.float32)
    assert found.inputs[0].dtype == torch.float32
    # Values that the layer multiplies by 0 are finite.
    assert torch.equal(found.inputs[0][~found.masks[0]], torch.zeros(2, 8))
    assert found.first(2).samples == 2
    assert found.first(9).lengths == (5, 9)


@pytest.mark.parametrize("kind", ["objects", "pickle", "array", "text", "torn"])
def test_other_files_are_refused_and_nothing_is_unpickled(kind: str, tmp_path: Path) -> None:
    path, trap = tmp_path / "data.npz", tmp_path / "unpickled"
    danger = np.array([Trap(trap)], dtype=object)
    if kind == "objects":
        np.savez(path, **{**full_arrays(), "labels": danger})
    elif kind == "pickle":
        danger.dump(path)
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, X)
    elif kind == "text":
        path.write_text("inputs_0")
    else:
        np.savez(path, **full_arrays())
        path.write_bytes(path.read_bytes()[:-200])
    message = "single array; use numpy.savez" if kind == "array" else r"expected|damaged"
    with pytest.raises(FeatureError, match=message) as caught:
        load_features(path, 2, 8, 4, torch.float32)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
