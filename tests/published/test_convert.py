"""Tests of loading checkpoints: architectures from keys and shapes, refused files."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.layers.interaction_moe.build import build
from flmoe_kernels.published.convert import load_checkpoint
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap
from tests.support.inputs import draw
from tests.support.lineage import fl, i2, make_layer, make_sparse_layer
from tests.support.lineage_sparse import lifted
from tests.support.swaps import save

State = dict[str, Tensor]
EXPERT = "interaction_experts.1.fusion_model."
MLP = EXPERT + "network.0.mlp."


def problem(path: Path) -> str:
    """The one-line error message for a bad file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize(("modalities", "layers"), [(2, 1), (3, 4)])
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


BAD_FILES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "No such file"),
    (lambda path: path.write_text("epoch: 3\n"), "not a PyTorch checkpoint"),
    (lambda path: truncated(path, 0.6), "or truncated"),
    (lambda path: truncated(path, 0.6, legacy=True), "truncated"),
    (
        lambda path: save(path, {"ensemble_model": Code()}),
        r"contains \w+.system, which is not plain data",
    ),
    (pickled(2), r"contains \w+.system, which is not plain data; not loaded"),
    (lambda path: save(path, [1]), "holds a list, expected a state_dict"),
]


@pytest.mark.parametrize(("write", "message"), BAD_FILES)
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


def test_damaged_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.save(make_layer().state_dict())[:100])
    assert "not a .safetensors file, or truncated" in problem(path)


def without(part: str) -> Callable[[State], object]:
    """Remove the keys that contain a text."""
    return lambda state: [state.pop(key) for key in list(state) if part in key]


def with_value(key: str, value: Any) -> Callable[[State], object]:
    return lambda state: state.__setitem__(key, value)


BAD_KEYS: list[tuple[Callable[[State], object], list[str]]] = [
    (
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
    (without(EXPERT), [f"missing: {EXPERT}network.0.norm1.weight", "and 6 more"]),
    (
        with_value(EXPERT + "pos_embed", torch.ones(1, 10, 16)),
        ["missing: interaction_experts.0.fusion_model.pos_embed"],
    ),
    (without("experts.3."), ["expected at least 4 experts (two modalities), got 3"]),
    (without(".fc."), ["no keys of the experts' heads"]),
    (
        with_value("interaction_experts.999999999.fusion_model.x", torch.ones(1)),
        ["a number in a key is larger"],
    ),
    (
        with_value("reweight.mlp.network.0.bias", torch.ones(20).half()),
        ["expected one floating dtype, got torch.float16, torch.float32"],
    ),
]


SPARSE_KEYS: list[tuple[bool, Callable[[State], object], list[str]]] = [
    (
        False,
        lambda state: state[MLP + "gate.gate.bias"].add_(1),
        ["gate.bias", "differ, but are the same gate"],
    ),
    (
        False,
        with_value(MLP + "experts.h4toh.weight", torch.ones(5, 3, 32)),
        ["wrong shape: ", "h4toh.weight is (5, 3, 32), expected (5, 16, 32)"],
    ),
    (True, without(MLP + "experts.2.htoh4.bias"), ["Missing key", "experts.2.htoh4.bias"]),
]
WRONG_KEYS = [(make_layer, {}, *row) for row in BAD_KEYS]
WRONG_KEYS += [(make_sparse_layer, {"apart": apart}, *row) for apart, *row in SPARSE_KEYS]


@pytest.mark.parametrize(("make", "options", "change", "parts"), WRONG_KEYS)
def test_wrong_keys_are_listed(
    tmp_path: Path,
    make: Callable[..., nn.Module],
    options: dict[str, Any],
    change: Callable[[State], object],
    parts: list[str],
) -> None:
    state = {key: value.clone() for key, value in make(**options).state_dict().items()}
    load_checkpoint(save(tmp_path / "good.pt", state))
    change(state)
    message = problem(save(tmp_path / "bad.pt", {"ensemble_model": state}))
    for part in parts:
        assert part in message


def test_reads_the_layout_of_separate_experts(tmp_path: Path) -> None:
    layer = make_sparse_layer(fl, apart=True, layers=2)
    assert MLP + "experts.4.htoh4.weight" in layer.state_dict()
    path = save(tmp_path / "a.pt", {"ensemble_model": layer.state_dict()})
    state, architecture = load_checkpoint(path)
    assert architecture.sparse.num_experts == 5
    assert state.keys() == make_sparse_layer(fl, layers=2).state_dict().keys()
    reference = build(architecture, 2)
    reference.load_state_dict(state, strict=True)
    inputs = [draw(3, 5, 16, seed=m) for m in range(2)]
    original = lifted(layer)
    with torch.no_grad():
        found = lifted(swap(reference).model).inference(inputs)
        torch.testing.assert_close(found, original.inference(inputs))
