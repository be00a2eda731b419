"""Tests of finding an interaction layer in the contents of a checkpoint, whatever is around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.published.convert import load_checkpoint
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap_checkpoint
from tests.support.lineage import make_layer, make_sparse_layer
from tests.support.swaps import save


class Model(nn.Module):
    """A model that has an interaction layer as a part."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)
        self.backbone = nn.ModuleDict({"fusion": layer})


def lightning(layer: nn.Module) -> dict[Any, Any]:
    state = {f"model.{key}": value for key, value in Model(layer).state_dict().items()}
    steps = {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}
    optimizers = [{"state": steps, "param_groups": [{"lr": 0.1, "params": [0]}]}]
    return {"epoch": 3, "state_dict": state, "optimizer_states": optimizers, "hyper_parameters": {}}


def compiled_parts(layer: nn.Module) -> nn.Module:
    experts: Any = layer.interaction_experts
    experts[0] = torch.compile(experts[0])
    experts[1].fusion_model.network[0].mlp = torch.compile(experts[1].fusion_model.network[0].mlp)
    layer.reweight = torch.compile(layer.reweight)
    return layer


# (content of a file with this layer, name of the layer in it)
LAYOUTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "published": (
        lambda x: {
            "ensemble_model": x.state_dict(),
            "encoder_dict": {"text": nn.Linear(1, 1).requires_grad_(False).half().state_dict()},
        },
        "ensemble_model",
    ),
    "Lightning": (lightning, "state_dict.model.backbone.fusion"),
    "bare": (lambda x: x.state_dict(), ""),
    "compiled in DataParallel": (
        lambda x: nn.DataParallel(torch.compile(Model(torch.compile(x)))).state_dict(),
        "module._orig_mod.backbone.fusion._orig_mod",
    ),
    "compiled parts": (
        lambda x: {"model": Model(compiled_parts(x)).state_dict()},
        "backbone.fusion",
    ),
    "averaged": (lambda x: {"ema": AveragedModel(x).state_dict(), "step": 3}, "ema.module"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_is_found_and_written_back_in_place(tmp_path: Path, layout: str) -> None:
    """Separate experts are written as one tensor, so keys change; everything else stays."""
    torch.manual_seed(0)
    content, name = LAYOUTS[layout]
    apart, stacked = (make_sparse_layer(apart=apart, layers=1, seed=1) for apart in (True, False))
    expected, _ = load_checkpoint(save(tmp_path / "bare.pt", apart.state_dict()))
    stacked.load_state_dict(expected, strict=True)
    torch.manual_seed(1)
    path = save(tmp_path / "a.pt", content(apart))
    state, _ = load_checkpoint(path)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    load_checkpoint(path, layer=name)

    written = torch.load(swap_checkpoint(path, num_heads=2, temperature=1.0).out, weights_only=True)
    assert written.pop("flmoe_config")["num_heads"] == 2
    torch.manual_seed(1)
    whole = content(stacked)
    if all(isinstance(value, Tensor) for value in whole.values()):
        whole = {"ensemble_model": whole}
    torch.testing.assert_close(written, whole, rtol=0, atol=0)


def states() -> dict[str, Any]:
    model, average = (make_layer(seed=seed).state_dict() for seed in (1, 2))
    return {"model": {f"net.{key}": x for key, x in model.items()}, "ema": average, "epoch": 3}


def test_several_layers_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    content = states()
    path = save(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match=r"holds 2 .* with layer=: 'model.net', 'ema'$"):
        load_checkpoint(path)
    for name in ("model.net", "net", "ema"):
        state, _ = load_checkpoint(path, layer=name)
        expected = content["ema"] if name == "ema" else make_layer(seed=1).state_dict()
        torch.testing.assert_close(state, dict(expected), rtol=0, atol=0)
    out = str(tmp_path / "c.pt")
    arguments = ["swap", str(path), "--heads", "2", "--layer", "ema", "--out", out]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    written = torch.load(out, weights_only=True)
    assert written.pop("flmoe_config")["num_heads"] == 2
    torch.testing.assert_close(written, content)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", states())
    result = CliRunner().invoke(app, ["swap", str(path), "--layer", "odel.net"])
    message = "layer: expected one of 'model.net', 'ema', got 'odel.net'"
    assert (result.exit_code, result.stderr) == (2, f"error: {path}: {message}\n")


KEY = "reweight.mlp.network.0.bias"
VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: 3, "a value of type int"),
    (lambda: torch.ones(20, device="meta"), "a tensor on the meta device"),
    (lambda: torch.ones(1).expand(10**15), "a tensor whose elements share memory"),
]
FUSION = "and no interaction layer; build the model, .* flmoe_kernels.swap"
BAD: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (
        lambda x: {"fusion_model": nn.Linear(1, 1).state_dict(), "encoder_dict": {}},
        f"'fusion_model' {FUSION}",
    ),
    (
        lambda x: {key: value for key, value in x.items() if not key.startswith("reweight")},
        "no keys of the reweighting MLP; it has 'interaction_experts.0.*more$",
    ),
    (lambda x: {KEY: x[KEY]}, f"no keys of the experts; it has '{KEY}'"),
    (lambda x: {"a": {"b": {"w": x[KEY]}}, "epoch": 3}, "it has 'epoch', 'a.b.w'"),
    (lambda x: x | {f"reweight.module.{KEY[9:]}": x[KEY]}, f"two entries for {KEY}"),
    *(
        (lambda x, make=make: {**x, KEY: make()}, f"'{KEY}': expected a dense tensor, got {what}")
        for make, what in VALUES
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_contents_are_one_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    path = save(tmp_path / "a.pt", change(dict(make_layer().state_dict())))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
