"""Tests of logits of token subsets against `inference` on expanded inputs, and of what they refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import InteractionMoE, InteractionMoERegression, use_backend
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.explain.games import masked
from flmoe_kernels.explain.games.masked import MaskedModel
from flmoe_kernels.explain.games.models import logits_of
from flmoe_kernels.layers.interaction_moe.subsets import subset_logits
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.explain_games import interaction_layer
from tests.support.inputs import draw_masks
from tests.support.layers import LayerCase

N = 40
CASES = (
    LayerCase((7, 5), batch=3, dim=16, heads=4, layers=2, classes=4, masks="partial"),
    LayerCase((60, 63), batch=1, dim=24, heads=3, layers=2),
    LayerCase((5, 3, 4), batch=2, dim=8, heads=2, layers=3, masks="mixed"),
    LayerCase((6, 1), masks="padded_modality", options=(("reweighting", "average"),)),
    LayerCase((4, 6), batch=3, masks="padded_sample", options=(("uniqueness", False),)),
    LayerCase((6, 6), batch=2, dim=16, layers=2, compat="i2moe"),
)


def masked_model(
    case: LayerCase, model: Any, fill: str, expert: int | None, dtype: torch.dtype = torch.float64
) -> MaskedModel:
    x, masks = case.inputs(dtype), draw_masks(case.masks, case.batch, case.lengths)
    for values, mask in zip(x, masks or [None] * len(x), strict=True):
        if mask is not None:
            values[~mask.bool()] = torch.nan  # padding has no effect
    means = None
    if fill == "mean":  # of each position in modality 0, of all tokens in the others
        means = [each.nan_to_num().mean(dim=(0, 1) if m else 0) for m, each in enumerate(x)]
    return MaskedModel.of(model, x, masks, fill, means, expert, None)


def draw_subsets(case: LayerCase, full: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Samples (N,) and absent tokens: of some subsets all tokens, of others none, unless `full`."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(case.batch, (N,), generator=generator)
    share = torch.linspace(0.05, 0.95, N).unsqueeze(1)
    absent = [torch.rand((N, n), generator=generator) < share for n in case.lengths]
    for gone in absent:
        gone[0] = False
        gone[1] = not full
        if full:
            gone[:, 0] = False
    return rows, absent


def by_inference(model: MaskedModel, rows: Tensor, absent: list[Tensor]) -> Tensor:
    return logits_of(model.model, *model.present(rows, absent), model.expert)


def given(model: MaskedModel) -> tuple[Any, Any, Any]:
    masks, fills = (model.valid, None) if model.fill == "drop" else (model.masks, model.fills)
    return model.inputs, masks, fills


def computed(model: MaskedModel, rows: Tensor, absent: list[Tensor]) -> Tensor | None:
    inputs, masks, fills = given(model)
    return subset_logits(model.model, inputs, masks, rows, absent, fills, model.expert)


@torch.no_grad()
@pytest.mark.parametrize("expert", [None, 1])
@pytest.mark.parametrize("fill", ["drop", "zero", "mean"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_subsets_agree_with_inference(case: LayerCase, fill: str, expert: int | None) -> None:
    if case.compat == "i2moe" and fill == "drop":
        pytest.skip("learned positions take no masks")
    rows, absent = draw_subsets(case)
    model = masked_model(case, interaction_layer(case), fill, expert)
    logits = computed(model, rows, absent)
    torch.testing.assert_close(logits, by_inference(model, rows, absent), rtol=0, atol=1e-12)
    assert torch.equal(model.logits(rows, absent), logits)
    assert logits.std(dim=0).min() > 1e-3, "control: a constant would not pass"
    # A batch's other rows change nothing but its last bits.
    few = [gone[5:9] for gone in absent]
    torch.testing.assert_close(model.logits(rows[5:9], few), logits[5:9], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("fill", ["drop", "mean"])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_subsets_in_float32(case: LayerCase, fill: str) -> None:
    rows, absent = draw_subsets(case, full=True)
    single, low, high = (
        masked_model(case, model, fill, None, dtype)
        for model, dtype in (
            (interaction_layer(case, torch.float32), torch.float32),
            (case.reference(torch.float32).eval(), torch.float32),
            (case.reference(torch.float64).eval(), torch.float64),
        )
    )
    logits, threads = computed(single, rows, absent), torch.get_num_threads()
    assert_within_budget(
        logits, by_inference(low, rows, absent), by_inference(high, rows, absent), "logits"
    )
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(logits, model_logits := single.logits(rows, absent)), model_logits
    finally:
        torch.set_num_threads(threads)


def test_regression_layers_have_it() -> None:
    layer = InteractionMoERegression.adopt(interaction_layer(CASES[5]))
    rows, absent = draw_subsets(CASES[5])
    with torch.no_grad():
        assert computed(masked_model(CASES[5], layer, "zero", None), rows, absent) is not None


class Doubled(InteractionMoE):
    """A layer with its own inference."""

    def inference(self, inputs: Any, masks: Any = None) -> Any:
        experts, weights, mixed = super().inference(inputs, masks)
        return experts, weights, 2 * mixed


def _replaced(layer: Any) -> None:
    layer.inference = Doubled.inference.__get__(layer)
    layer.__class__ = Doubled


def _hidden(layer: Any) -> None:
    original = layer._fast_inference
    layer._fast_inference = lambda *args: [
        x if i < 2 else x + 1 for i, x in enumerate(original(*args))
    ]


def _capturing(layer: Any) -> None:
    layer.interaction_experts[1].fusion_model.network[0].attn.capture_attn = True


# What is done to the layer or around the call, so that `inference` computes the logits.
OTHERS: dict[str, Callable[[Any], Any]] = {
    "subclass": lambda layer: setattr(layer, "__class__", Doubled),
    "replaced on the instance": _replaced,
    "a private method replaced": _hidden,
    "attention maps": _capturing,
    "reference backend": lambda layer: setattr(layer, "backend", "reference"),
    "reference context": lambda layer: use_backend("reference"),
    "gradients": lambda layer: torch.enable_grad(),
    "autocast": lambda layer: torch.autocast("cpu", torch.bfloat16),
}


@torch.no_grad()
@pytest.mark.parametrize("expert", [None, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_run_inference(name: str, expert: int | None) -> None:
    case = CASES[0]
    rows, absent = draw_subsets(case, full=True)
    layer = interaction_layer(case)
    model = masked_model(case, layer, "drop", expert)
    before = model.logits(rows, absent)
    around = OTHERS[name](layer)
    with around if hasattr(around, "__exit__") else contextlib.nullcontext():
        assert computed(model, rows, absent) is None
        logits, expected = model.logits(rows, absent), by_inference(model, rows, absent)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    if name in ("subclass", "a private method replaced") and expert is None:
        assert (logits - before).abs().max() > 0.01, "control: the change has an effect"


@torch.no_grad()
def test_other_inputs_run_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    rows, absent = draw_subsets(case)
    layer = interaction_layer(case)
    for value in (torch.nan, torch.inf):
        model = masked_model(case, layer, "drop", None)
        model.inputs[0][1, 0, 0] = value  # valid, and absent in some subsets
        assert computed(model, rows, absent) is None
        logits = model.logits(rows, absent)
        there = (rows == 1) & ~absent[0][:, 0]
        assert torch.equal(logits.isfinite().all(dim=1), ~there)
    model = masked_model(case, layer, "zero", None)
    model.inputs[1] = None  # type: ignore[index]
    assert computed(model, rows, [absent[0], absent[1][:, :0]]) is None
    routed = LayerCase((6, 5), layers=2, gate="GShardGate")
    model = masked_model(routed, interaction_layer(routed), "drop", None)
    rows, absent = draw_subsets(routed)
    assert computed(model, rows, absent) is None
    # A class's method, replaced after import.
    model = masked_model(case, layer, "drop", None)
    rows, absent = draw_subsets(case)
    assert computed(model, rows, absent) is not None
    monkeypatch.setattr(InteractionMoE, "inference", Doubled.inference)
    assert computed(model, rows, absent) is None
    assert masked.has_subset_logits(nn.Identity()) is False


@torch.no_grad()
def test_changed_parts_are_honoured_or_refused() -> None:
    case = CASES[0]
    rows, absent = draw_subsets(case)
    layer: Any = interaction_layer(case)
    model = masked_model(case, layer, "drop", None)
    before = model.logits(rows, absent)
    encoder = layer.interaction_experts[1].fusion_model.network[0]
    encoder.mlp.network[0].weight.data.mul_(2.0)
    after = model.logits(rows, absent)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, by_inference(model, rows, absent), rtol=0, atol=1e-12)
    layer.reweight.temperature = 0.1
    after = model.logits(rows, absent)
    torch.testing.assert_close(after, by_inference(model, rows, absent), rtol=0, atol=1e-12)
    layer.replacement = "x"
    with pytest.raises(ValueError, match="replacement: expected one of"):
        computed(model, rows, absent)
    layer.replacement = "noise"
    handle = encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayer, match="has a forward hook"):
        computed(model, rows, absent)
    handle.remove()
    layer.float()
    with pytest.raises((TypeError, ValueError), match=r"inputs\[0\]"):
        computed(model, rows, absent)
