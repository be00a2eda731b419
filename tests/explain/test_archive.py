"""Tests of saved results: round trips, and rejection of unsafe or damaged files."""

from __future__ import annotations

import dataclasses
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels.explain import (
    Attribution,
    MaskingDrops,
    PairValues,
    PatternMeasures,
    concentration,
    probe_game,
    specificity,
)
from flmoe_kernels.explain.archive import decode, encode
from tests.support.explain_files import Trap
from tests.support.explain_games import unanimity
from tests.support.explain_results import attribution, masking_drops, pair_values
from tests.support.inputs import draw
from tests.support.refusals import assert_refused

Result = Attribution | MaskingDrops | PairValues | PatternMeasures


def results() -> dict[str, Result]:
    x = [draw(18, 3, length, dtype=torch.float64, seed=length) for length in (5, 4)]
    tokens, ties = attribution(*x), torch.eye(4, 3).bool()
    labelled = {"labels": torch.arange(4), "logits": torch.ones(4, 5), "near_ties": ties}
    return {
        "pairs": pair_values(notes=("a note",), sampling={"seed": 4}),
        "no pairs": probe_game(unanimity({}, 3), [])["SII"],
        "attribution": tokens,
        "path": attribution(*x, completeness_error=draw(18, 3), settings={"n_steps": 2}),
        "concentration": concentration(tokens),
        "specificity": specificity(tokens, top=2),
        "drops": masking_drops(),
        "labelled": dataclasses.replace(masking_drops(), **labelled, settings={"exempt": [1]}),
    }


def assert_same(mine: Any, theirs: Any, name: str) -> None:
    assert type(mine) is type(theirs), name
    if isinstance(mine, tuple):
        assert len(mine) == len(theirs), name
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other, name)
    elif isinstance(mine, np.ndarray | torch.Tensor):
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    else:
        assert mine == theirs, name


def test_saved_results_are_unchanged_when_read(tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    for found in results().values():
        found.save(path)
        loaded = type(found).load(path)
        for field in dataclasses.fields(found):
            assert_same(getattr(loaded, field.name), getattr(found, field.name), field.name)
        assert repr(loaded) == repr(found)
    assert [x.name for x in tmp_path.iterdir()] == ["found.npz"]
    with pytest.raises(FileNotFoundError):
        PairValues.load(tmp_path / "none.npz")


@pytest.mark.parametrize("name", ["pairs", "path", "drops", "concentration"])
def test_unsafe_and_wrong_files_are_refused(name: str, tmp_path: Path) -> None:
    found = results()[name]
    path, sprung = tmp_path / "found.npz", tmp_path / "sprung"
    found.save(path)
    content, kind = path.read_bytes(), f"flmoe_kernels.explain.{type(found).__name__}"
    header, arrays = decode(content, kind, "x")
    header = {key: value for key, value in header.items() if key not in ("kind", "format")}
    first = next(iter(arrays))
    trapped, objects, others = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(trapped, header=np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    np.save(objects, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    np.savez(others, values=np.ones(3))
    # Control: unpickling the object does write a file.
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()
    sprung.unlink()
    damaged = r"found\.npz: not a file of .*damaged"
    parts = r"found\.npz: expected the fields of"
    bad: list[tuple[bytes, str]] = [
        (b"", damaged),
        (content[: len(content) // 2], damaged),
        (content[:-40], damaged),
        (b"PK\x03\x04" + bytes(200), damaged),
        (pickle.dumps(Trap(sprung)), damaged),
        *((file.getvalue(), damaged) for file in (trapped, objects, others)),
        (encode("another", header, arrays), damaged),
        (encode(kind, {**header, "format": 99}, arrays), r"found\.npz: expected format 1, got 99"),
        (encode(kind, {k: v for k, v in header.items() if k != "index"}, arrays), parts),
        (encode(kind, header, {k: v for k, v in arrays.items() if k != first}), parts),
        (encode(kind, header, {**arrays, "more": np.zeros(1)}), parts),
    ]
    if isinstance(found, PairValues):
        bad += [
            (encode(kind, header, arrays | {"values": np.zeros(2)}), r"expected values \(4,\)"),
            (encode(kind, header, arrays | {"pairs": np.array(3)}), r"expected pairs \(2,\)"),
            (encode(kind, header, arrays | {"pairs": arrays["pairs"] + 5}), "pairs of 5"),
        ]
    for wrong, message in bad:
        path.write_bytes(wrong)
        assert_refused(partial(type(found).load, path), message)
    assert not sprung.exists()
