"""What a run hands back: tables, maps, files that are read without pickle, and other packages' types."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels.core.files import write_whole
from flmoe_kernels.explain import PairValues, Sampling, probe_game, probe_pairs
from flmoe_kernels.explain.archive import decode, encode
from flmoe_kernels.explain.estimators import results as results_module
from tests.support.explain_games import first_of, interaction_layer, random_terms, unanimity
from tests.support.layers import LayerCase

CASE = LayerCase(lengths=(4, 3))


@pytest.fixture(scope="module")
def sampled() -> PairValues:
    """One sample of which a token is padded, so that players and positions differ."""
    x = first_of(CASE.inputs(torch.float64), 1)
    masks = [torch.tensor([[True, False, True, True]]), None]
    sampling = Sampling(budget=3000, seed=4)
    [found] = probe_pairs(
        interaction_layer(CASE), x, masks, pairs="across", method="sampling", sampling=sampling
    )
    return found["SII"]


def made_up(values: list[float]) -> PairValues:
    pairs = np.array([[0, 1], [0, 2], [1, 2]])[: len(values)]
    tokens = np.array([[0, 0], [1, 0], [1, 3]])
    return PairValues(
        index="SII",
        values=np.array(values),
        standard_errors=np.array([0.5, 0.25, 0.125])[: len(values)],
        pairs=pairs,
        tokens=tokens,
        lengths=(1, 4),
        value=2.0,
        baseline=-1.0,
        method="exact",
        stopped_by="exact",
        draws=0,
        evaluations=8,
        batch_size=4,
        candidates="all pairs",
    )


def test_maps() -> None:
    found = made_up([3.0, -4.0, 1.0])
    matrix = found.matrix()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.isnan(np.diag(matrix)).all()
    assert matrix[0].tolist()[1:] == [3.0, -4.0]
    assert found.matrix(errors=True)[2, 1] == 0.125
    across = found.between(0, 1)
    assert across.shape == (1, 4)
    np.testing.assert_array_equal(across, [[3.0, np.nan, np.nan, -4.0]])
    np.testing.assert_array_equal(found.between(1, 0), across.T)
    np.testing.assert_array_equal(found.between(1, 1)[[0, 3], [3, 0]], [1.0, 1.0])
    np.testing.assert_array_equal(found.between(0, 1, errors=True)[0, [0, 3]], [0.5, 0.25])
    for call, message in (
        (lambda: found.between(0, 2), r"n: expected an int from 0 to 1, got 2"),
        (lambda: found.top(0), r"count: expected an int from 1, got 0"),
        (lambda: found.ranked(by="best"), r"by: expected one of largest, smallest, magnitude"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ranks_and_rows() -> None:
    found = made_up([3.0, -4.0, 3.0])
    assert found.ranked().tolist() == [0, 2, 1], "ties in the order of the pairs"
    assert found.ranked(by="smallest").tolist() == [1, 0, 2]
    assert found.ranked(2, by="magnitude").tolist() == [1, 0]
    best = found.top(2, by="magnitude")
    assert best.rows() == [
        {
            "modality_i": 0,
            "token_i": 0,
            "modality_j": 1,
            "token_j": 3,
            "value": -4.0,
            "standard_error": 0.25,
        },
        {
            "modality_i": 0,
            "token_i": 0,
            "modality_j": 1,
            "token_j": 0,
            "value": 3.0,
            "standard_error": 0.5,
        },
    ]
    text = found.table(2, by="magnitude").splitlines()
    assert text[0] == "PairValues(SII of 3 pairs (all pairs) of 3 tokens; exact; 8 evaluations)"
    assert text[1].split() == ["i", "j", "SII", "std.", "error"]
    assert text[2].split() == ["0:0", "1:3", "-4", "0.25"]
    assert len(text) == 4


def test_it_tells_how_it_was_found(sampled: PairValues) -> None:
    assert sampled.index == "SII"
    assert not sampled.exact
    assert sampled.tokens.tolist() == [[0, 0], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]
    assert sampled.lengths == (4, 3)
    assert len(sampled) == 9
    assert repr(sampled) == (
        "PairValues(SII of 9 pairs (pairs across modalities) of 6 tokens; sampling of "
        f"{sampled.draws} draws, stopped by budget; {sampled.evaluations} evaluations)"
    )
    assert sampled.sampling == {
        "budget": 3000,
        "tolerance": None,
        "min_draws": 64,
        "seed": 4,
        "antithetic": True,
    }
    assert sampled.game["of"] == "InteractionMoE"
    assert sampled.game["fill"] == "drop"
    assert (sampled.standard_errors > 0).all()
    assert np.isnan(sampled.between(0, 1)[1]).all(), "padding"
    assert not np.isnan(sampled.between(0, 1)[[0, 2, 3]]).any()
    written = json.loads(json.dumps(sampled.to_dict()))
    assert written["values"] == sampled.values.tolist()
    assert written["lengths"] == [4, 3]


def test_saved_and_loaded(sampled: PairValues, tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    for original in (sampled, made_up([1.0, 2.0, 3.0]), made_up([])):
        original.save(path)
        loaded = PairValues.load(path)
        assert loaded.to_dict() == original.to_dict()
        for name in ("values", "standard_errors", "pairs", "tokens"):
            mine, other = getattr(loaded, name), getattr(original, name)
            assert mine.dtype == other.dtype
            assert mine.tobytes() == other.tobytes()
        assert loaded.lengths == original.lengths
    assert [each.name for each in tmp_path.iterdir()] == ["found.npz"]


class Trap:
    """Unpickling it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_file_runs_code_or_passes_for_another(sampled: PairValues, tmp_path: Path) -> None:
    path, sprung = tmp_path / "found.npz", tmp_path / "sprung"
    sampled.save(path)
    content = path.read_bytes()
    header, arrays = decode(content, "flmoe_kernels.explain.PairValues", "x")
    header = {key: value for key, value in header.items() if key not in ("kind", "format")}
    trapped = io.BytesIO()
    np.savez(trapped, header=np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    objects = io.BytesIO()
    np.save(objects, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    kind = "flmoe_kernels.explain.PairValues"
    less = {key: value for key, value in header.items() if key != "draws"}
    # The trap is one.
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()
    sprung.unlink()
    for bad, message in (
        (b"", r"not a file of .*damaged"),
        (content[: len(content) // 2], r"not a file of"),
        (b"PK\x03\x04" + bytes(200), r"not a file of"),
        (pickle.dumps(Trap(sprung)), r"not a file of"),
        (trapped.getvalue(), r"not a file of"),
        (objects.getvalue(), r"not a file of"),
        (encode("another", header, arrays), r"not a file of"),
        (encode(kind, {**header, "format": 99}, arrays), r"expected format 1, got 99"),
        (encode(kind, less, arrays), r"expected the parts of"),
        (encode(kind, header, {**arrays, "more": np.zeros(1)}), r"expected the parts of"),
        (encode(kind, header, {**arrays, "values": np.zeros(2)}), r"expected values \(9,\)"),
        (encode(kind, header, {**arrays, "pairs": arrays["pairs"] + 5}), r"expected pairs of 6"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            PairValues.load(path)
    assert not sprung.exists()
    with pytest.raises(FileNotFoundError):
        PairValues.load(tmp_path / "none.npz")


def test_two_that_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks that do not know of one another, in containers where each has the same process number."""
    target, replace = tmp_path / "found", os.replace

    def second(source: Path, destination: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_whole(target, b"the other's")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", second)
    write_whole(target, b"mine")
    assert target.read_bytes() == b"mine"
    assert [each.name for each in tmp_path.iterdir()] == ["found"]


def test_no_damage_passes_unnamed() -> None:
    """Bytes of a file exchanged: it is refused by name, or what is read is whole all the same."""
    content = encode("kind", {"a": 1}, {"x": np.arange(30.0), "y": np.arange(5)})
    draw, refused = np.random.default_rng(0), 0
    # First the mark of an encrypted part, for which zipfile has an error of its own.
    places = [content.rindex(b"PK\x01\x02") + 8, *draw.integers(0, len(content), 3000).tolist()]
    for k, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] = 1 if not k else int(draw.integers(256))
        problem = ""
        try:
            header, arrays = decode(bytes(damaged), "kind", "file")
        except ValueError as error:
            problem = str(error)
        else:
            assert header["a"] == 1
            # A part may be lost with its entry; what is read of one is what was written.
            np.testing.assert_array_equal(arrays.get("x", np.arange(30.0)), np.arange(30.0))
        assert problem.startswith("file: ") or (k and not problem)
        refused += bool(problem)
    assert refused > 1000


def test_shapiq_takes_it(sampled: PairValues) -> None:
    shapiq = pytest.importorskip("shapiq")
    terms = random_terms(6, 25, 4, seed=9)
    game = unanimity(terms, 6)
    mine = probe_game(game, method="exact")
    theirs = mine["SII"].to_shapiq()
    assert isinstance(theirs, shapiq.InteractionValues)
    expected = shapiq.ExactComputer(game, n_players=6)("SII", order=2)
    for i in range(6):
        for j in range(i + 1, 6):
            assert theirs[(i, j)] == pytest.approx(expected[(i, j)], abs=1e-9)
    assert (theirs.index, theirs.min_order, theirs.max_order, theirs.n_players) == ("SII", 2, 2, 6)
    assert (theirs.estimated, theirs.estimation_budget) == (False, 64)
    assert theirs.baseline_value == pytest.approx(0.7)
    part = sampled.to_shapiq()
    assert part.estimated
    for (i, j), value in zip(sampled.pairs.tolist(), sampled.values, strict=True):
        assert part[(i, j)] == value
    assert part[(0, 1)] == 0.0, "no candidate"
    with pytest.raises(ValueError, match=r"to_shapiq: expected the index SII.* got RG"):
        mine["RG"].to_shapiq()


def test_pandas_takes_it(sampled: PairValues, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame = sampled.to_dataframe()
    assert frame.to_dict("records") == sampled.rows()
    assert frame.attrs["evaluations"] == sampled.evaluations
    assert list(made_up([]).to_dataframe().columns) == list(frame.columns)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(results_module.importlib, "import_module", missing)
    for call, package in ((sampled.to_dataframe, "pandas"), (sampled.to_shapiq, "shapiq")):
        with pytest.raises(ModuleNotFoundError, match=f"needs a package: pip install {package}"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget: expected an int from 1, got 0"),
        ({"min_draws": 1}, r"min_draws: expected an int from 2, got 1"),
        ({"seed": -1}, r"seed: expected an int from 0, got -1"),
        ({"tolerance": 0.0}, r"tolerance: expected a positive number"),
    ],
)
def test_settings_of_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
    with pytest.raises(TypeError, match=r"antithetic: expected a bool, got int"):
        Sampling(antithetic=1)  # type: ignore[arg-type]
