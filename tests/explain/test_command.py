"""Tests of the command `explain`: values of its files, safety of its page, errors."""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from flmoe_kernels import InteractionMoE
from flmoe_kernels.cli.main import app
from flmoe_kernels.explain import (
    Attribution,
    MaskingDrops,
    PairValues,
    Sampling,
    attribute,
    faithfulness,
    pair_masking,
    probe_pairs,
)
from flmoe_kernels.explain.report import command, pictures
from flmoe_kernels.explain.report.request import Request
from flmoe_kernels.published.convert import load_layer
from tests.support.explain_files import (
    EVIL,
    Arrays,
    arrays_of,
    full_arrays,
    write_checkpoint,
    write_data,
)
from tests.support.layers import LayerCase

DROPS = {"faithfulness", "pair_masking_SII", "pair_masking_RG"}
SAMPLES = {f"sample_{s:05d}_{name}" for s in (0, 1) for name in ("SII", "RG")}
RESULTS = {"attribution"} | DROPS | SAMPLES
FIGURES = {"expert_weights"} | DROPS
FIGURES |= {f"{name}_{what}" for name in SAMPLES for what in ("network", "0_1")}
TARGET = torch.tensor([0, 3])
Made = tuple[Path, Path, Path]  # checkpoint, data and output folder of the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    files = write_checkpoint(folder), write_data(folder, full_arrays()), folder / "out"
    assert command.main(request(files)) == 0
    return files


def request(files: Made, out: Path | None = None, **options: Any) -> Request:
    """Request of these tests; the folder and options can be changed."""
    options = {"samples": 2, "budget": 300, "top": 3, "repeats": 2, "seed": 5, **options}
    return Request(files[0], files[1], files[2] if out is None else out, **options)


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "explanation.json").read_text())
    return found


def call_of(checkpoint: Path) -> tuple[Any, list[Any], list[Any]]:
    """Layer, inputs and masks of the first two samples."""
    arrays = full_arrays()
    inputs = [torch.from_numpy(arrays[f"inputs_{m}"][:2]) for m in (0, 1)]
    masks = [torch.from_numpy(arrays["masks_0"][:2] == 1), None]
    return InteractionMoE.adopt(load_layer(checkpoint)), inputs, masks


def test_written_files(made: Made) -> None:
    names = {path.name for path in made[2].iterdir()}
    whole = {f"{name}.npz" for name in RESULTS} | {f"{name}.png" for name in FIGURES}
    assert names == whole | {"explanation.json", "index.html"}


def test_numbers_agree_with_the_library(made: Made) -> None:
    out = made[2]
    call = layer, inputs, masks = call_of(made[0])
    attribution = attribute(*call, target=TARGET)
    options: dict[str, Any] = {
        "fill": "zero",
        "pairs": "across",
        "top": 3,
        "scores": attribution.of(),
    }
    pairs = probe_pairs(*call, target=TARGET, sampling=Sampling(budget=300, seed=5), **options)
    with torch.no_grad():  # with gradients, the last bits differ
        experts, weights, logits = layer.inference(inputs, masks)
    found = report_of(out)
    assert (found["request"]["seed"], found["format"]) == (5, 2)
    assert not {"checkpoint", "data", "out"} & set(found["request"])
    assert found["sources"] == {"checkpoint": "layer.pt", "data": "data.npz"}
    assert set(found["versions"]) == {"python", "flmoe-kernels", "torch", "numpy", "matplotlib"}
    assert found["layer"]["architecture"]["num_classes"] == 4
    assert 0 <= found["layer"]["largest_logit_error_in_check"] < 1e-3
    assert found["data"]["samples_in_file"] == 3
    assert len(found["samples"]) == 2
    for s, sample in enumerate(found["samples"]):
        assert (sample["target"], sample["label"]) == (int(TARGET[s]), int(TARGET[s]))
        assert sample["predicted"] == int(logits[s].argmax())
        assert sample["logits"] == logits[s].tolist()
        assert sample["expert_logits"] == [x[s].tolist() for x in experts]
        assert sample["expert_weights"] == pytest.approx(weights[s].tolist(), rel=1e-5)
        for name, values in pairs[s].items():
            assert PairValues.load(out / f"sample_{s:05d}_{name}.npz").to_dict() == values.to_dict()
    # Control: the pairs' values differ between the samples.
    assert not np.array_equal(pairs[0]["SII"].values, pairs[1]["SII"].values)
    drops = faithfulness(*call, attribution, n_random=2, seed=5)
    assert repr(drops_in(out, "faithfulness").rows()) == repr(drops.rows())
    for name in ("SII", "RG"):
        ranked = [values[name] for values in pairs]
        drops = pair_masking(*call, ranked, target=TARGET, n_random=2, seed=5)
        assert repr(drops_in(out, f"pair_masking_{name}").rows()) == repr(drops.rows())
    saved = Attribution.load(out / "attribution.npz")
    for mine, theirs in ((saved.mixture, attribution.mixture), (saved.values, attribution.values)):
        assert all(map(torch.equal, mine, theirs))


def drops_in(out: Path, name: str) -> MaskingDrops:
    return MaskingDrops.load(out / f"{name}.npz")


def test_page_is_complete_safe_and_self_contained(made: Made) -> None:
    out = made[2]
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text
    # A browser would load nothing even if an escape were missing.
    assert "default-src 'none'; img-src data:;" in text
    assert not re.search(r"(?:src|href)=\"https?:|url\(|@import", text)
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', text)
    assert len(images) == text.count("<img") == len(FIGURES)
    on_disk = {(out / f"{name}.png").read_bytes() for name in FIGURES}
    assert {base64.b64decode(content, validate=True) for content, _ in images} == on_disk
    files = {path.name for path in out.iterdir()} - {"index.html"}
    assert set(re.findall(r'href="([^"]+)"', text)) == files
    # The untrusted tokens are present as text.
    assert html.escape(EVIL) in text
    assert html.escape("' onload='") in text


def one_line(errors: str) -> str:
    [line] = [x for x in errors.splitlines() if x.startswith("error: ")]
    return line


def test_a_missing_extra_is_reported_before_any_work(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--checkpoint", str(made[0]), "--data", str(made[1]), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["explain", *options])
    assert result.exit_code == 2
    assert "pip install 'flmoe-kernels[demo]'" in one_line(result.stderr)
    assert not (tmp_path / "out").exists()


def test_quick_command(made: Made, tmp_path: Path) -> None:
    options = ["--checkpoint", made[0], "--data", made[1], "--out", tmp_path / "out", "--quick"]
    options += ["--modality-names", "text, image", "--class-names", "a,b,grey dog,d", "--force"]
    with pytest.warns(UserWarning, match="does not store num_heads and temperature"):
        done = CliRunner().invoke(app, ["explain", *map(str, options), "--target", "2"])
    assert done.exit_code == 0, done.stderr
    assert not done.stderr, "there is no bar where standard error is no terminal"
    assert "index.html" in done.stdout
    found = report_of(tmp_path / "out")
    assert found["request"]["budget"] == 256
    assert found["request"]["modality_names"] == ["text", "image"]
    assert found["request"]["class_names"] == ["a", "b", "grey dog", "d"]
    assert [sample["target"] for sample in found["samples"]] == [2]


VARIANTS: dict[str, tuple[LayerCase, Arrays, dict[str, Any]]] = {
    "learned positions": (
        LayerCase((4, 4), batch=2, dim=8, heads=4, layers=2, classes=3, compat="i2moe"),
        {"image_0": np.full((2, 6, 6), 0.5), "image_1": np.zeros((2, 8, 4, 3), np.uint8)},
        {"fill": "mean", "method": "exact", "samples": 1},
    ),
    "three modalities, all pairs": (
        LayerCase((3, 4, 2), batch=2, dim=8, heads=4, layers=1, classes=3),
        {"labels": np.array([[1, 0, 1], [0, 0, 0]])},
        {"fill": "drop", "pairs": "all", "attribution": "integrated_gradients", "samples": 1},
    ),
    "routed MLPs, a padded modality": (
        LayerCase((4, 3), batch=2, dim=8, heads=4, layers=2, classes=3, gate="GShardGate"),
        {"masks_1": np.array([[False] * 3, [True] * 3])},
        {"attribution": "attention_rollout", "repeats": 0},
    ),
    "one class, screened pairs": (
        LayerCase((9, 8), batch=1, dim=8, heads=4, layers=1, classes=1),
        {},
        {"pairs": "screened", "samples": 1},
    ),
    "one label": (
        LayerCase((3, 2), batch=2, dim=8, heads=4, layers=1, classes=1),
        {"labels": np.array([[1], [0]])},
        {"exempt": (0,), "samples": 1},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_layers_and_data(name: str, tmp_path: Path) -> None:
    case, more, options = VARIANTS[name]
    data, out = write_data(tmp_path, {**arrays_of(case), **more}), tmp_path / "out"
    options = {"budget": 512, "top": 2, "repeats": 1, **options}
    command.run(request((write_checkpoint(tmp_path, case), data, out), **options))
    found, drops = report_of(out), drops_in(out, "faithfulness")
    pairs = [PairValues.load(path).values for path in sorted(out.glob("sample_*_SII.npz"))]
    assert np.isfinite(np.concatenate(pairs)).all()
    assert len(Attribution.load(out / "attribution.npz").mixture) == len(case.lengths)
    text = html.unescape((out / "index.html").read_text(encoding="utf-8"))
    assert text.count("<img") == len(list(out.glob("*.png")))
    assert found["request"]["exempt"] == drops.settings["exempt"] == [*options.get("exempt", ())]
    if "image_0" in more:
        # Each image is shown once; its patches are columns.
        names = {path.name for path in out.glob("sample_00000_*_[01]_[01].png")}
        assert names == {f"sample_00000_{x}.png" for x in ("SII_0_1", "SII_1_0", "RG_0_1")}
    if "labels" in more:
        assert drops.multi_label
        assert found["samples"][0]["target"] in (0, 2)
        assert (out / "sample_00000_SII_1_2.png").exists() == (len(case.lengths) == 3)
    if "masks_1" in more:
        # The first sample has no pair across modalities; the page says so, and this is not an error.
        assert [len(x) > 0 for x in pairs] == [False, True]
        assert drops.curve().random.isnan().all()
        assert drops.notes[-1].endswith("at least 16 samples with maskable tokens, got 2")
    # The probability of a single class is always 1, except for several labels per sample.
    logit = name == "one class, screened pairs"
    assert drops.metrics == (("logit",) if logit else ("prob", "log_prob", "logit"))
    shown = "logit" if logit else "probability"
    assert f"attribution changes the {shown} of the explained class" in text


def test_figures_show_scores_as_they_are(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled to 0..1, nearly equal scores would fill the scale, and the most negative one would be 0."""
    shown: list[tuple[Any, str, Any]] = []

    def seen(*given: Any, **options: Any) -> Any:
        shown.append(tuple(options[name] for name in ("weights", "weights_label", "errors")))
        return draw_map(*given, **options)

    draw_map = pictures.token_patch_map
    monkeypatch.setattr(pictures, "token_patch_map", seen)
    options: dict[str, Any] = {"samples": 1, "budget": 700, "top": 2, "repeats": 0}
    options["attribution"] = "integrated_gradients"
    found = command.run(request(made, tmp_path, **options))
    own = found.attribution.of()[1][0]
    [(weights, label, _)] = [x for x in shown if x[0] is not None]
    assert torch.equal(weights, own)
    assert float(own.min()) < 0 < float(own.max())
    assert label == "integrated_gradients (logit)"
    for name, (_, _, errors) in zip(("SII", "RG"), shown, strict=True):
        expected = found.pairs[0][name].between(0, 1, errors=True)
        np.testing.assert_array_equal(errors, expected)
        assert np.nanmax(errors) > 0
