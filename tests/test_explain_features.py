"""Files of samples for the command `explain`: what is wrong is named, and nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explain_files import Arrays, full_arrays, write_data

from flmoe_kernels.explain.report.features import FeatureError, load_features


def changed(**more: Any) -> Callable[[], Arrays]:
    """The full arrays with others; None takes one out."""
    return lambda: {k: v for k, v in {**full_arrays(), **more}.items() if v is not None}


X = np.zeros((3, 5, 8), dtype=np.float32)
BROKEN = X.copy()
BROKEN[1, 4, 0] = np.nan  # padding in sample 1, which the mask allows
WRONG = X.copy()
WRONG[2, 1, 0] = np.inf
BAD_ARRAYS: list[tuple[Callable[[], Arrays], str]] = [
    (changed(inputs_1=None), r"inputs_1: expected \(samples, tokens, 8\), got none"),
    (
        changed(inputs_0=X[:, :, :7]),
        r"inputs_0: expected floats \(samples, tokens, 8\), got float32 \(3, 5, 7\)",
    ),
    (
        changed(inputs_1=X[:2]),
        r"inputs_1: expected floats \(3, tokens, 8\), got float32 \(2, 5, 8\)",
    ),
    (changed(inputs_0=X.astype(int)), "inputs_0: expected floats .* got int64"),
    (changed(inputs_0=WRONG), "inputs_0: expected finite valid tokens, .* in sample 2"),
    (
        changed(inputs_2=X),
        "inputs_2: expected inputs_0 .. inputs_1, .* as the layer has 2 modalities",
    ),
    (changed(input_0=X), "input_0: expected inputs_0 .. inputs_1, .* and labels$"),
    (
        changed(masks_0=np.ones((3, 4))),
        r"masks_0: expected bool or 0/1 \(3, 5\), got float64 \(3, 4\)",
    ),
    (changed(masks_0=np.full((3, 5), 2)), "masks_0: expected 0 and 1 only"),
    (
        changed(masks_0=np.zeros((3, 5)), masks_1=np.eye(3, 9)[[0, 1, 1]] * [[1], [0], [1]]),
        r"masks_\*: expected a valid token in sample 1",
    ),
    (changed(labels=np.array([0, 4, 1])), "labels: expected classes from 0 to 3, got 0 to 4"),
    (changed(labels=np.array([0.0, 1, 1])), "labels: expected integers .* got float64"),
    (changed(labels=np.ones((3, 5))), r"labels: expected bool or 0/1 \(3, 4\)"),
    (
        changed(tokens_0=np.zeros((3, 5))),
        r"tokens_0: expected unicode strings \(3, 5\), got float64",
    ),
    (
        changed(tokens_0=np.array([["\ud800"] * 5] * 3)),
        "tokens_0: expected text, got half of a character",
    ),
    (changed(image_1=np.zeros((2, 4, 4))), r"image_1: expected \(3, H, W\) or"),
    (changed(image_1=np.full((3, 4, 4), 7.0)), "image_1: image: expected floats from 0 to 1"),
    (changed(image_0=np.zeros((3, 4, 4))), "image_0: expected a square of patches, got 5 tokens"),
    (
        changed(tokens_0=np.array([[None] * 5] * 3)),
        "tokens_0: expected a plain array, got Python objects",
    ),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_bad_arrays_are_named(arrays: Callable[[], Arrays], message: str, tmp_path: Path) -> None:
    path = write_data(tmp_path, arrays())
    with pytest.raises(FeatureError, match=message) as caught:
        load_features(path, 2, 8, 4, torch.float32)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_padding_may_hold_anything(tmp_path: Path) -> None:
    path = write_data(tmp_path, changed(inputs_0=BROKEN.astype(">f8"))())
    found = load_features(path, 2, 8, 4, torch.float32)
    assert found.inputs[0].dtype == torch.float32
    assert found.first(2).samples == 2
    assert found.first(9).lengths == (5, 9)


class Danger:
    """Unpickling it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["objects", "pickle", "array", "text", "torn"])
def test_other_files_are_refused_and_nothing_is_unpickled(kind: str, tmp_path: Path) -> None:
    path, trap = tmp_path / "data.npz", tmp_path / "unpickled"
    danger = np.array([Danger(trap)], dtype=object)
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
    with pytest.raises(FeatureError, match=r"expected|damaged") as caught:
        load_features(path, 2, 8, 4, torch.float32)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
