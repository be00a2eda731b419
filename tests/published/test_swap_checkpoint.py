"""Tests of `swap_checkpoint` and the command `swap`: written files and settings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.published.convert import load_checkpoint, load_layer
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap, swap_checkpoint
from tests.support.lineage import fl, i2, make_layer, make_sparse_layer
from tests.support.lineage_sparse import GATES, lifted
from tests.support.swaps import save

CONVERTED = [
    (fl, None, torch.float32),
    (i2, None, torch.bfloat16),
    *((fl, gate, torch.float32) for gate in GATES),
]


@pytest.mark.parametrize(("variant", "gate", "dtype"), CONVERTED)
def test_converts(tmp_path: Path, variant: Any, gate: str | None, dtype: torch.dtype) -> None:
    def make(**options: Any) -> Any:
        options |= {"heads": 4, "temperature": 2.0}
        if gate is None:
            return make_layer(variant, **options).to(dtype)
        return make_sparse_layer(variant, gate, layers=1, **options)

    layer = make().eval()
    encoders = {"text": {"weight": torch.ones(2)}}
    content = {"ensemble_model": layer.state_dict(), "encoder_dict": encoders}
    path = save(tmp_path / "run.best.pth", content)
    before = path.read_bytes()
    given = None if gate == "AddtionalNoisyGate" else gate
    conversion = swap_checkpoint(path, num_heads=4, temperature=2.0, gate=given)
    assert conversion.out == tmp_path / "run.best.flmoe.pt"
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "run.best.flmoe.pt",
        "run.best.pth",
    ]
    written = torch.load(conversion.out, weights_only=True)
    assert written.keys() == {"ensemble_model", "encoder_dict", "flmoe_config"}
    config = written["flmoe_config"]
    assert config["num_heads"] == 4
    if gate is not None:
        assert config["sparse"]["gate"] == gate.removeprefix("Addtional")
        assert config["sparse"]["top_k"] == (1 if gate == "SwitchGate" else 2)
    torch.testing.assert_close(written["encoder_dict"], encoders)
    make(seed=9).load_state_dict(written["ensemble_model"], strict=True)

    # The file contains the settings: without options, the layer gives the original's results.
    loaded = lifted(load_layer(conversion.out).float())
    inputs = [torch.randn(2, 5, 16) for _ in range(2)]
    with torch.no_grad():
        expected = lifted(layer.float()).inference(inputs)[2]
        found = lifted(swap(loaded).model).inference(inputs)[2]
        other = load_layer(conversion.out, num_heads=2).float().inference(inputs)[2]
    torch.testing.assert_close(found, expected)
    assert (other - expected).abs().max() > 1e-3
    assert loaded.fusion_sparse == (gate is not None)


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


DENSE: dict[str, Any] = {"mlp_sparse": False}
NOISY = {"gate": "AddtionalNoisyGate"}


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (DENSE, {"num_heads": 3}, "num_heads=3, got 16"),
        (DENSE, {"temperature": 0.0}, "temperature.*positive"),
        (DENSE, {"out": "."}, "is a folder"),
        (DENSE, {"out": "a.pt"}, "the checkpoint itself"),
        (DENSE, {"out": "none/b.pt"}, "no such folder"),
        (DENSE, {"gate": "GShardGate"}, "gate: expected None without sparse MLPs"),
        ({}, {"gate": "TopGate"}, "gate: expected one of NaiveGate, .*got 'TopGate'"),
        ({}, {"gate": "NoisyGate"}, "a gate other than NoisyGate, got NoisyGate"),
        (NOISY, {"gate": "GShardGate"}, "of NoisyGate, got GShardGate"),
        ({}, {"gate": "SwitchGate", "top_k": 2}, "top.?k: expected 1 for Switch, got 2"),
    ],
)
def test_refuses_settings_and_targets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    given: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(Path("a.pt"), make_sparse_layer(**options).state_dict())
    with pytest.raises(CheckpointError, match=message):
        swap_checkpoint(path, **given)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_the_file_contains_the_settings_of_the_gates(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", make_sparse_layer(gate="NaiveGate", layers=1).state_dict())
    assert swap_checkpoint(path).architecture.sparse.gate == "GShardGate"
    out = swap_checkpoint(path, gate="NaiveGate", top_k=3, out=tmp_path / "b.pt").out
    assert load_checkpoint(out)[1].sparse.top_k == 3
    assert load_checkpoint(out, top_k=4)[1].sparse.top_k == 4
    found = swap_checkpoint(save(tmp_path / "c.pt", make_sparse_layer(layers=1).state_dict()))
    written = torch.load(found.out, weights_only=True)
    sparse = written["flmoe_config"]["sparse"]
    sparse |= {"capacity": [0.5, 0.75], "random_routing": True}
    again = save(tmp_path / "d.pt", written)
    spec = load_checkpoint(again)[1].sparse
    assert (spec.capacity, spec.random_routing) == ((0.5, 0.75), True)
    fusion = load_layer(again).interaction_experts[1].fusion_model
    assert fusion.network[0].mlp.gate.capacity == (0.5, 0.75)
    assert load_checkpoint(again, gate="NaiveGate")[1].sparse.capacity is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", make_layer().state_dict())
    out = tmp_path / "full.pt"
    out.symlink_to("/dev/full")
    arguments = ["swap", str(path), "--heads", "2", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr == f"error: {out}: cannot be written: No space left on device\n"


def test_writes_nothing_if_the_fast_layer_disagrees(tmp_path: Path) -> None:
    state = make_layer().state_dict()
    state["reweight.mlp.network.0.weight"][0, 0] = float("nan")
    path = save(tmp_path / "a.pt", state)
    with pytest.raises(CheckpointError, match=r"not converted: .*not finite"):
        swap_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


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


def test_command_has_options_for_the_gate_and_top_k(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", make_sparse_layer(gate="NaiveGate", layers=1).state_dict())
    arguments = ["swap", str(path), "--heads", "2", "--gate", "NaiveGate", "--top-k", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "sparse with 5 experts, top 3 of a NaiveGate" in result.stdout
    assert "2 heads, temperature 1, top 3 of a NaiveGate" in result.stdout


def test_assumed_and_contradicted_settings_are_reported(tmp_path: Path) -> None:
    """The number of heads does not follow from the parameters, and the check cannot notice a wrong one."""
    path = save(tmp_path / "run.pt", make_layer().state_dict())
    with pytest.warns(
        UserWarning, match=r"does not store num_heads and temperature; assumed 4 and 1\.0"
    ):
        load_layer(path)
    with pytest.warns(UserWarning, match="does not store temperature; assumed 1"):
        written = swap_checkpoint(path, num_heads=2).out
    with pytest.warns(UserWarning, match="num_heads is 2 in the file, used 4 as passed"):
        load_layer(written, num_heads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_layer(written)
