"""Tests of the comparison in `swap`: inputs, detected errors, no side effects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import RoutedMLP
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.published.compare import compare
from flmoe_kernels.published.swap import swap
from tests.support.inputs import draw
from tests.support.lineage import fl, i2, make_layer, make_sparse_layer
from tests.support.lineage_sparse import GATES, make_mlp
from tests.support.swaps import Make, left, snapshot


class Around(nn.Module):
    """A model with dropout and buffers around the layer, which the comparison must not change."""

    def __init__(self, layer: nn.Module, via: str = "forward") -> None:
        super().__init__()
        self.moe, self.via = layer, via
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, a: Tensor, b: Tensor, masks: Any = None, *, fail: bool = False) -> Any:
        if fail:
            raise ArithmeticError("the model's own")
        parts = [self.norm(self.drop(x).mT).mT for x in (a, b)]
        if self.via == "inference":
            return self.moe.inference(parts, masks)
        return self.moe(parts, masks=masks) if masks is not None else self.moe(parts)


Change = Callable[[Any], Any]
WRONG_LAYERS: list[tuple[str, Change]] = [
    ("logits differ", lambda out: (out[0], out[1], out[2] * 1.0001, *out[3:])),
    ("logits differ", lambda out: (out[0], out[1], out[2] * float("nan"), *out[3:])),
    ("logits differ", lambda out: ([out[0][0], *out[0][:-1]], *out[1:])),
    ("weights differ", lambda out: (out[0], out[1].flip(1), *out[2:])),
    ("fast layer's losses differ", lambda out: (*out[:3], [*out[3][:-1], 0 * out[3][0]], out[4])),
    ("fast layer's losses differ", lambda out: (*out[:3], [1.0001 * x for x in out[3]], out[4])),
    ("latents differ", lambda out: (*out[:-1], [z + 1e-4 for z in out[-1]])),
    ("fast layer fails: ZeroDivisionError", lambda out: (1 // 0,)),
]
WRONG_MLPS: list[tuple[str, Change]] = [
    ("outputs differ", lambda out: 1.001 * out),
    ("outputs differ", lambda out: out.flip(0)),
    ("outputs differ", lambda out: out * float("nan")),
    (r"expected an output \(\d+, 16\), got \(\d+, 15\)", lambda out: out[:, 1:]),
]
WRONG = [(InteractionMoE, make_layer, *row) for row in WRONG_LAYERS]
WRONG += [(RoutedMLP, make_mlp, *row) for row in WRONG_MLPS]


@pytest.mark.parametrize(("kind", "make", "reason", "change"), WRONG)
def test_a_wrong_fast_layer_is_caught(
    monkeypatch: pytest.MonkeyPatch, kind: Any, make: Make, reason: str, change: Change
) -> None:
    right = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: change(right(self, *a, **k)))
    layer = make()
    before = snapshot(layer)
    assert re.search(reason, left(swap(layer)))
    assert snapshot(layer) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", [None, "inside", "GShardGate", "AddtionalNoisyGate"])
def test_other_dtypes_pass_and_zeros_fail(
    monkeypatch: pytest.MonkeyPatch, gate: str | None, dtype: torch.dtype
) -> None:
    """A dense layer, a sparse layer, and sparse MLPs."""
    makes: dict[str | None, Make] = {None: lambda: make_layer(i2)}
    makes["inside"] = lambda: make_sparse_layer(i2)
    make = makes.get(gate, lambda: make_mlp(gate))
    assert swap(make().to(dtype)).left == ()
    kind, method = (RoutedMLP, "forward") if gate in GATES else (InteractionMoE, "inference")
    right = getattr(kind, method)

    def zeros(self: Any, *a: Any) -> Any:
        if kind is RoutedMLP:
            return torch.zeros_like(right(self, *a))
        logits, weights, mixed = right(self, *a)
        return [0 * x for x in logits], weights, mixed

    monkeypatch.setattr(kind, method, zeros)
    assert re.search("(logits|outputs) differ", left(swap(make().to(dtype))))


@pytest.mark.parametrize(("given", "mode"), [(False, True), (True, False)])
def test_has_no_side_effects(given: bool, mode: bool) -> None:
    model = Around(make_layer()).train(mode)
    model.drop.eval()
    attention = model.moe.interaction_experts[0].fusion_model.network[0].attn
    attention.require_attn_grad = True
    parts = (torch.randn(2, 6, 16), torch.randn(2, 4, 16))
    model(*parts)
    # deepcopy refuses tensors with a gradient history.
    kept_map = attention.last_attn
    assert kept_map.grad_fn is not None
    for parameter in model.parameters():
        parameter.grad = None
    modes = {name: part.training for name, part in model.named_modules() if name != "moe"}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    values = {name: value.detach().clone() for name, value in model.named_parameters()}

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    report = swap(model, inputs=parts if given else None)
    assert [entry.inputs for entry in report.swapped] == ["given" if given else "random"]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert attention.last_attn is kept_map
    assert model.moe.training is mode
    now = {n: part.training for n, part in model.named_modules()}
    assert all(now[name] == mode for name, mode in modes.items() if not name.startswith("moe"))
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        assert torch.equal(value, (buffers | values)[name]), name
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [make_mlp, make_sparse_layer])
def test_keeps_the_state_of_sparse_mlps(make: Any) -> None:
    """A swap that replaces the layer keeps losses, stored choices and capacities."""
    layer = make().train()
    out = layer(draw(6, 16)) if make is make_mlp else layer([draw(2, 7, 16), draw(2, 4, 16)])[2]
    before = [snapshot(part) for part in layer.children()]
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    assert swap(nn.Sequential(layer)).left == ()
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert [snapshot(part) for part in layer.children()] == before
    out.sum().backward()


def test_fastmoes_own_modules_are_not_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU they would end the process, because their kernels treat the addresses as the GPU's."""
    monkeypatch.setattr(fl.TransformerEncoderLayer, "__module__", "fmoe.transformer")
    monkeypatch.setattr(fl.InteractionMoE, "forward", lambda *_: pytest.fail("was run"))
    assert "only on a CUDA device" in left(swap(make_layer(), strict=False))
    assert swap(make_layer(), check=False, strict=False).left == ()


@pytest.mark.parametrize("via", ["forward", "inference"])
def test_compares_on_the_models_inputs(monkeypatch: pytest.MonkeyPatch, via: str) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "flmoe_kernels.published.swap.compare", lambda *a: (seen.append(a[-1]), compare(*a))[1]
    )
    a, b = torch.randn(7, 6, 16), torch.randn(7, 4, 16)
    masks = [torch.ones(7, 6), torch.ones(7, 4)]
    masks[0][0, 3:] = 0
    for mask in masks:
        mask[1] = 0  # The published layer makes NaN of this sample, so it cannot be compared.
    model = Around(make_layer(), via).eval()
    expected = model.norm(model.drop(a).mT).mT.detach()
    report = swap(model, inputs=(a, b), masks=masks)
    assert [entry.inputs for entry in report.swapped] == ["given"]
    torch.testing.assert_close(seen[0].inputs[0], expected)
    torch.testing.assert_close(seen[0].masks, masks)
    assert "inference" not in vars(model.moe)
    assert "forward" not in vars(model.moe)

    named = swap(Around(make_layer(), via), inputs={"a": a, "b": b, "masks": masks})
    assert [entry.inputs for entry in named.swapped] == ["given"]


def test_inputs_of_the_layer_itself_and_of_a_layer_that_is_not_called() -> None:
    inputs = [torch.randn(2, 6, 16), torch.randn(2, 4, 16)]
    masks = [torch.ones(2, 6), torch.ones(2, 4)]
    assert swap(make_layer(), inputs=inputs, masks=masks).swapped[0].inputs == "given"
    model = Around(make_layer())
    model.spare = make_layer(seed=1)
    report = swap(model, inputs=tuple(inputs))
    assert {entry.name: entry.inputs for entry in report.swapped} == {
        "moe": "given",
        "spare": "random",
    }


def test_a_failing_model_stops_the_swap_before_it_changes_anything() -> None:
    model = Around(make_layer()).train()
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="the model's own"):
        swap(model, inputs={"a": None, "b": None, "fail": True})
    assert snapshot(model) == before


def test_tokens_whose_choice_depends_on_rounding_are_excluded() -> None:
    mlp = make_mlp()
    with torch.no_grad():
        mlp.gate.gate.weight.zero_()
        mlp.gate.gate.bias.zero_()
    assert "rounding decides the expert" in left(swap(mlp))
