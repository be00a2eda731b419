"""Checkpoints: what is read from them, what is refused and how, and the conversion."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.layers.interaction_moe.architecture import build
from flmoe_kernels.published.convert import load_checkpoint, load_layer
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap, swap_checkpoint
from tests.support.lineage import fl, i2, make_layer

State = dict[str, Tensor]
EXPERT = "interaction_experts.1.fusion_model."


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def problem(path: Path) -> str:
    """The one line that a bad file gets."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("modalities", [2, 3, 5])
@pytest.mark.parametrize("variant", [fl, i2])
def test_reads_the_architecture(tmp_path: Path, variant: Any, modalities: int, layers: int) -> None:
    layer = make_layer(variant, modalities=modalities, layers=layers, reweight_layers=layers)
    path = save(tmp_path / "a.pt", {"ensemble_model": layer.state_dict(), "epoch": 3})
    state, found = load_checkpoint(path)
    torch.testing.assert_close(state, dict(layer.state_dict()), rtol=0, atol=0)
    assert (found.num_modalities, found.num_layers) == (modalities, layers)
    assert (found.hidden_dim, found.num_classes) == (16, 3)
    assert found.reweight_layers == layers
    assert found.reweight_hidden == (None if layers == 1 else 20)
    assert (found.compat, found.num_patches) == (
        ("i2moe", 5) if variant is i2 else ("fl_i2moe", None)
    )
    module = build(found, num_heads=2)
    module.load_state_dict(state, strict=True)


def test_reads_a_bare_state_dict_and_one_of_data_parallel(tmp_path: Path) -> None:
    state = make_layer().state_dict()
    bare = load_checkpoint(save(tmp_path / "bare.pt", state))
    wrapped = nn.DataParallel(make_layer()).state_dict()
    assert all(key.startswith("module.") for key in wrapped)
    parallel = load_checkpoint(save(tmp_path / "parallel.pth", {"ensemble_model": wrapped}))
    assert parallel[0].keys() == bare[0].keys() == state.keys()
    assert parallel[1] == bare[1]


def test_reads_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = make_layer(i2).state_dict()
    path = tmp_path / "a.safetensors"
    safetensors.save_file(state, path)
    found, architecture = load_checkpoint(path)
    torch.testing.assert_close(found, dict(state), rtol=0, atol=0)
    assert architecture.compat == "i2moe"
    path.write_bytes(path.read_bytes()[:100])
    assert "not a .safetensors file, or a truncated one" in problem(path)


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def pickled(protocol: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.write_bytes(pickle.dumps({"ensemble_model": Code()}, protocol=protocol))

    return write


def truncated(path: Path, share: float, legacy: bool = False) -> None:
    torch.save(make_layer().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


BAD_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda path: None, "no such file"),
    ("folder", lambda path: path.mkdir(), "is a folder"),
    ("empty", lambda path: path.touch(), "not a PyTorch checkpoint, or a truncated one"),
    ("text", lambda path: path.write_text("epoch: 3\n"), "not a PyTorch checkpoint"),
    ("truncated", lambda path: truncated(path, 0.6), "or a truncated one"),
    ("almost whole", lambda path: truncated(path, 0.999), "or a truncated one"),
    ("truncated old format", lambda path: truncated(path, 0.6, legacy=True), "truncated one"),
    (
        "code",
        lambda path: save(path, {"ensemble_model": Code()}),
        r"more than tensors \(\w+.system",
    ),
    ("code in a bare pickle", pickled(2), r"more than tensors \(\w+.system\); not loaded"),
    ("a whole model", lambda path: save(path, make_layer()), "more than tensors"),
    ("a list", lambda path: save(path, [1]), "holds a list, expected a state_dict"),
    ("a tensor", lambda path: save(path, torch.ones(2)), "holds a Tensor"),
    ("no tensors", lambda path: save(path, {"epoch": 3}), "'epoch' holds a value of type int"),
    ("empty state", lambda path: save(path, {"ensemble_model": {}}), "empty or no state_dict"),
    ("no state", lambda path: save(path, {"ensemble_model": 3}), "empty or no state_dict"),
    (
        "other keys",
        lambda path: save(path, nn.Linear(2, 2).state_dict()),
        "it has 'weight', 'bias'",
    ),
]


@pytest.mark.parametrize(("write", "message"), [pytest.param(w, m, id=i) for i, w, m in BAD_FILES])
def test_bad_files_get_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    write(path)
    assert re.search(message, problem(path))
    result = CliRunner().invoke(app, ["swap", str(path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
    assert [entry.name for entry in tmp_path.iterdir()] == (["bad.pt"] if path.exists() else [])


def without(key: str) -> Callable[[State], object]:
    return lambda state: state.pop(key)


def with_value(key: str, value: Any) -> Callable[[State], object]:
    return lambda state: state.__setitem__(key, value)


BAD_KEYS: list[tuple[str, Callable[[State], object], list[str]]] = [
    (
        "missing",
        lambda state: (
            state.pop(EXPERT + "network.1.attn.q.weight"),
            state.pop("reweight.mlp.network.3.bias"),
        ),
        [f"missing: reweight.mlp.network.3.bias, {EXPERT}network.1.attn.q.weight"],
    ),
    ("unknown", with_value("extra.weight", torch.ones(1)), ["unknown: extra.weight"]),
    ("key of two lines", with_value("extra\nline", torch.ones(1)), ["unknown: extra line"]),
    (
        "shape",
        with_value(EXPERT + "network.0.norm1.weight", torch.ones(3)),
        [f"wrong shape: {EXPERT}network.0.norm1.weight is (3,), expected (16,)"],
    ),
    (
        "all kinds at once",
        lambda state: state.update(
            {
                EXPERT + "network.0.attn.q.bias": torch.ones(16),
                EXPERT + "network.2.fc.bias": state.pop(EXPERT + "network.2.fc.bias")[:2],
            },
            a=state.pop(EXPERT + "network.0.norm2.bias"),
        ),
        [
            f"missing: {EXPERT}network.0.norm2.bias",
            f"unknown: {EXPERT}network.0.attn.q.bias, a",
            f"wrong shape: {EXPERT}network.2.fc.bias is (2,), expected (3,)",
        ],
    ),
    (
        "an expert lacks",
        lambda state: [state.pop(key) for key in list(state) if key.startswith(EXPERT)],
        [f"missing: {EXPERT}network.0.norm1.weight", "and 6 more"],
    ),
    (
        "positions of one expert",
        with_value(EXPERT + "pos_embed", torch.ones(1, 10, 16)),
        ["missing: interaction_experts.0.fusion_model.pos_embed"],
    ),
    (
        "one sparse tensor",
        with_value(EXPERT + "network.0.mlp.experts.htoh4.weight", torch.ones(4, 32, 16)),
        [
            "sparse with 4 experts, top 2 of a GShardGate",
            "missing: interaction_experts.0.fusion_model.network.0.mlp.gate.gate.weight",
            "unknown: interaction_experts.0.fusion_model.network.0.mlp.network.0.weight",
        ],
    ),
    (
        "one sparse gate",
        with_value(EXPERT + "network.0.mlp.all_gates.0.gate.weight", torch.ones(4, 16)),
        ["no usable tensor at any key", "experts.htoh4.weight"],
    ),
    (
        "one modality",
        lambda state: [state.pop(key) for key in list(state) if "experts.3." in key],
        ["expected 4 experts (two modalities) or more, got 3"],
    ),
    (
        "no head",
        lambda state: [state.pop(key) for key in list(state) if ".fc." in key],
        ["no keys of the experts' heads"],
    ),
    (
        "no reweighting",
        lambda state: [state.pop(key) for key in list(state) if "reweight" in key],
        ["no keys of the reweighting MLP"],
    ),
    (
        "absurd numbers",
        with_value("interaction_experts.999999999.fusion_model.x", torch.ones(1)),
        ["numbers in its keys exceed"],
    ),
    (
        "a scalar norm",
        lambda state: state.update(
            {key: torch.tensor(1.0) for key in state if key.endswith("norm1.weight")}
        ),
        ["no usable tensor", "norm1.weight"],
    ),
    (
        "mixed dtype",
        with_value("reweight.mlp.network.0.bias", torch.ones(20).half()),
        ["expected one floating dtype, got torch.float16, torch.float32"],
    ),
    (
        "integers",
        lambda state: state.update({key: value.long() for key, value in state.items()}),
        ["expected one floating dtype, got torch.int64"],
    ),
]


@pytest.mark.parametrize(("change", "parts"), [pytest.param(c, p, id=i) for i, c, p in BAD_KEYS])
def test_wrong_keys_are_listed(
    tmp_path: Path, change: Callable[[State], object], parts: list[str]
) -> None:
    state: State = dict(make_layer().state_dict())
    load_checkpoint(save(tmp_path / "good.pt", state))
    change(state)
    message = problem(save(tmp_path / "bad.pt", {"ensemble_model": state}))
    for part in parts:
        assert part in message


@pytest.mark.parametrize("variant", [fl, i2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converts(tmp_path: Path, variant: Any, dtype: torch.dtype) -> None:
    layer = make_layer(variant, heads=4, temperature=2.0).eval().to(dtype)
    encoders = {"text": {"weight": torch.ones(2)}}
    content = {"ensemble_model": layer.state_dict(), "encoder_dict": encoders}
    path = save(tmp_path / "run.best.pth", content)
    before = path.read_bytes()
    conversion = swap_checkpoint(path, num_heads=4, temperature=2.0)
    assert conversion.out == tmp_path / "run.best.flmoe.pt"
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "run.best.flmoe.pt",
        "run.best.pth",
    ]
    written = torch.load(conversion.out, weights_only=True)
    assert written.keys() == {"ensemble_model", "encoder_dict", "flmoe_config"}
    assert written["flmoe_config"]["num_heads"] == 4
    torch.testing.assert_close(written["encoder_dict"], encoders)
    fresh = make_layer(variant, heads=4, temperature=2.0, seed=9).to(dtype)
    fresh.load_state_dict(written["ensemble_model"], strict=True)

    # The settings travel with the file: the layer answers as the original without being told.
    loaded = load_layer(conversion.out)
    inputs = [torch.randn(2, 5, 16) for _ in range(2)]
    with torch.no_grad():
        expected = layer.float().inference(inputs)[2]
        found = swap(loaded.float()).model.inference(inputs)[2]
        other = load_layer(conversion.out, num_heads=2).float().inference(inputs)[2]
    torch.testing.assert_close(found, expected)
    assert (other - expected).abs().max() > 1e-3


def test_converts_to_safetensors_and_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    state = make_layer(heads=8).state_dict()
    path = save(tmp_path / "a.pt", {"ensemble_model": state})
    out = tmp_path / "b.safetensors"
    assert swap_checkpoint(path, num_heads=8, out=out).out == out
    found, _ = load_checkpoint(out)
    torch.testing.assert_close(found, dict(state), rtol=0, atol=0)
    again = swap_checkpoint(out)
    assert (again.num_heads, again.temperature) == (8, 1.0)
    assert again.out == tmp_path / "b.flmoe.pt"
    more = save(tmp_path / "c.pt", {"ensemble_model": state, "encoder_dict": {}})
    with pytest.raises(CheckpointError, match=r"also holds 'encoder_dict'.*write a \.pt"):
        swap_checkpoint(more, out=tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3, got 16"),
        ({"num_heads": 0}, r"num_heads.*at least 1"),
        ({"temperature": 0.0}, "temperature.*positive"),
        ({"temperature": float("nan")}, "temperature.*positive"),
        ({"out": "."}, "is a folder"),
        ({"out": "a.pt"}, "the checkpoint itself"),
        ({"out": "none/b.pt"}, "no such folder"),
    ],
)
def test_refuses_settings_and_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(Path("a.pt"), make_layer().state_dict())
    with pytest.raises(CheckpointError, match=message):
        swap_checkpoint(path, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_writes_nothing_where_the_fast_layer_disagrees(tmp_path: Path) -> None:
    state = make_layer().state_dict()
    state["reweight.mlp.network.0.weight"][0, 0] = float("nan")
    path = save(tmp_path / "a.pt", state)
    with pytest.raises(CheckpointError, match=r"not converted: .*not finite"):
        swap_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
def test_a_write_that_stops_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path, out = save(tmp_path / "a.pt", make_layer().state_dict()), tmp_path / "out.pt"
    out.write_text("older")

    def half(content: Any, stream: Any) -> None:
        stream.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises((CheckpointError, KeyboardInterrupt), match=r"no space left|^$"):
        swap_checkpoint(path, out=out)
    assert out.read_text() == "older"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt", "out.pt"]


def test_command_prints_a_report_or_json(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"ensemble_model": make_layer(modalities=3).state_dict()})
    arguments = ["swap", str(path), "--heads", "2", "--out", str(tmp_path / "b.pt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 modalities, width 16, 3 classes, 2 fusion layers" in result.stdout
    assert "1 layer swapped" in result.stdout
    assert f"Wrote {tmp_path / 'b.pt'}." in result.stdout
    facts = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert facts["architecture"]["num_modalities"] == 3
    assert facts["swapped"][0]["logits_error"] < 1e-4
    assert facts["num_heads"] == 2


def test_command_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "flmoe_kernels", "swap", "none.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: none.pt: no such file\n"
