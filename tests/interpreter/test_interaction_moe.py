"""Tests of InteractionMoE on its Triton kernels.

The interpreter uses the GPU's plan of rows: as many rows as tokens, padded rows at the end.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flmoe_kernels import InteractionMoE
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from tests.support.inputs import as_dtype, draw_masks, draw_replacements
from tests.support.layers import LayerCase, assert_all_within_budget, outputs_and_gradients
from tests.support.triton_interpreter import round_to_nearest

TRITON = "triton"
FL = LayerCase((5, 3), dim=32, layers=2, masks="partial", sparse=True)
I2 = LayerCase((3, 3), "i2moe", batch=1, dim=16, heads=1, dropout=0.4)


def triton_layer(case: LayerCase, dtype: torch.dtype = torch.float32) -> InteractionMoE:
    return InteractionMoE.adopt(case.reference(dtype), backend=TRITON)


def test_outputs_and_gradients_with_a_sample_of_padding_alone() -> None:
    """A sparse and a dense layer with NaN in all padding against the CPU kernels in float64, because the reference
    returns NaN here; control: another order of experts."""
    sizes = {"heads": 1, "dim": 16, "mlp_experts": 3}
    case = dataclasses.replace(FL, masks="padded_sample", gate="GShardGate", **sizes)
    x = case.inputs()
    masks, noise = draw_masks(case.masks, case.batch, case.lengths), draw_replacements(x, 4)
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = InteractionMoE.adopt(case.reference(dtype), backend="cpu")
        results = outputs_and_gradients(layer, as_dtype(x, dtype), masks, as_dtype(noise, dtype))
        found.append({**results[0], **results[1]})
    dirty = [
        torch.where(mask.unsqueeze(-1), each, float("nan"))
        for each, mask in zip(x, masks, strict=True)
    ]
    actual = outputs_and_gradients(triton_layer(case), dirty, masks, noise)
    assert_all_within_budget({**actual[0], **actual[1]}, *found, str(case))
    padded = case.batch // 2
    assert (actual[0]["expert_latents"][:, :, padded] == 0).all()
    assert all((actual[1][f"inputs.{m}"][~masks[m]] == 0).all() for m in range(2))
    for name in ("expert_logits", "losses"):
        other = actual[0][name].roll(1, 0)
        assert_outside_budget(other, *(each[name] for each in found), "another order")


def test_inference_is_the_full_view_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest(monkeypatch)
    case, dtype = dataclasses.replace(FL, layers=1), torch.bfloat16
    x, masks = case.inputs(dtype), draw_masks("mixed", case.batch, case.lengths)
    found = triton_layer(case, dtype).eval().inference(x, masks)
    low, exact = (
        case.reference(dtype).to(kind).eval().inference(as_dtype(x, kind), masks)
        for kind in (dtype, torch.float64)
    )
    for name, got, *want in zip(("weights", "logits"), found[1:], low[1:], exact[1:], strict=True):
        assert_within_budget(got, *want, name)
    experts = (torch.stack(list(each[0])) for each in (found, low, exact))
    assert_within_budget(*experts, "experts' logits")


@pytest.mark.parametrize("absent", [False, True])
def test_missing_modalities(absent: bool) -> None:
    """A modality without tokens, and samples without a modality: their views have latent 0 and enter no loss."""
    case = LayerCase((3, 2, 2), batch=3, dim=16, heads=1)
    x = [None if absent and m == 1 else each for m, each in enumerate(case.inputs())]
    first = torch.tensor([[True] * 3, [False] * 3, [True, True, False]])
    masks = [first, None, None]
    rows = draw_replacements(case.inputs(), case.experts)
    noise = [[each[:, :0] if absent and m == 1 else each for m, each in enumerate(r)] for r in rows]
    found = []
    for layer, dtype in (
        (triton_layer(case), torch.float32),
        (case.reference(), torch.float32),
        (case.reference(), torch.float64),
    ):
        inputs = [None if each is None else each.to(dtype) for each in x]
        given = as_dtype(noise, dtype)
        results = outputs_and_gradients(layer.to(dtype), inputs, masks, given)
        found.append({**results[0], **results[1]})
    assert_all_within_budget(*found, str(case))
    latents = found[0]["expert_latents"]
    assert not latents[:, 1, 1].any()
    assert latents[:, 1, 0].any()
    assert bool(latents[:, 2].any()) != absent


def test_dropout_is_the_cpu_kernels() -> None:
    """With the same torch seed both backends draw the same masks; with I2MoE's residual and learned positions."""
    x, results = I2.inputs(), []
    noise = draw_replacements(x, I2.experts)
    for backend, seed in ((TRITON, 3), ("cpu", 3), ("cpu", 4)):
        layer = InteractionMoE.adopt(I2.reference(), backend=backend)
        torch.manual_seed(seed)
        outputs, grads = outputs_and_gradients(layer, x, None, noise)
        results.append({**outputs, **grads})
    actual, want, other = results
    for name, value in want.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4, msg=name)
    for name in ("expert_logits", "losses", "logits"):
        assert (other[name] - want[name]).abs().max() > 1e-2


def test_autocast_computes_in_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, logits, weights, latents and losses stay float32; the kernels' rows have the low precision."""
    round_to_nearest(monkeypatch)
    case, low_type = dataclasses.replace(FL, layers=1, heads=1, dim=16), torch.bfloat16
    layer = InteractionMoE.adopt(case.reference(low_type).float(), backend=TRITON)
    x = case.inputs(low_type)
    masks, noise = draw_masks(case.masks, case.batch, case.lengths), draw_replacements(x, 4)
    with torch.autocast("cpu", dtype=low_type):
        results = outputs_and_gradients(layer, x, masks, noise)
    assert {value.dtype for value in results[0].values()} == {torch.float32}
    kinds = {name.split(".")[0]: value.dtype for name, value in results[1].items()}
    assert kinds["interaction_experts"] == kinds["reweight"] == torch.float32
    assert kinds["inputs"] == low_type
    # torch.autocast converted some results to float32.
    found = [{name: value.to(low_type) for name, value in {**results[0], **results[1]}.items()}]
    for dtype in (low_type, torch.float64):
        reference = case.reference(low_type).to(dtype)
        pair = outputs_and_gradients(reference, as_dtype(x, dtype), masks, as_dtype(noise, dtype))
        found.append({**pair[0], **pair[1]})
    assert_all_within_budget(*found, str(case))
    latents = results[0]["latents"]
    assert torch.equal(latents, latents.to(low_type).float()), (
        "the rows did not have the low precision"
    )
