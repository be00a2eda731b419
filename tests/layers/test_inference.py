"""Tests of the layer without gradients, which computes all encoders in one native call."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.layers.interaction_moe.dense import Encoders
from tests.support.encoder_cases import encoder_inference_arguments
from tests.support.inputs import as_dtype, draw, draw_masks
from tests.support.layers import (
    FL,
    I2,
    SPARSE_FL,
    LayerCase,
    assert_all_within_budget,
    data,
    fast_layer,
    named_outputs,
)

CASES = [
    dataclasses.replace(FL, masks="mixed", layers=2),
    dataclasses.replace(FL, masks="padded_modality", layers=3),
    LayerCase((9, 4), layers=1, dim=16, masks="partial"),
    LayerCase((6, 3), heads=5, dim=25, masks="partial"),
    LayerCase((6, 3), heads=8, dim=8),
    LayerCase((4, 9), heads=1, dim=17, classes=1),
    LayerCase((5, 1, 4, 2), dim=128, heads=4, batch=40, masks="mixed"),
    LayerCase((320, 196), dim=32, heads=2, batch=1, masks="partial"),
    dataclasses.replace(I2, layers=2),
    LayerCase((2,) * 5, "i2moe", dim=16, heads=8, masks="partial"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the layer took the kernel without gradients."""
    taken: list[bool] = []
    infers = Encoders.infers

    def recording(self: Encoders, *args: Any) -> bool:
        taken.append(infers(self, *args))
        return taken[-1]

    monkeypatch.setattr(Encoders, "infers", recording)
    return taken


def outputs(layer: Any, x: Any, masks: Any, noise: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        values = named_outputs(layer, layer(x, masks, replacements=noise))
        _, values["inferred weights"], values["inferred logits"] = layer.inference(x, masks)
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: LayerCase, dtype: torch.dtype, calls: list[bool]) -> None:
    x, masks, noise = data(case, dtype)
    exact = as_dtype(x, torch.float64), masks, as_dtype(noise, torch.float64)
    assert_all_within_budget(
        outputs(fast_layer(case, dtype).eval(), x, masks, noise),
        outputs(case.reference(dtype).eval(), x, masks, noise),
        outputs(case.reference(dtype).double().eval(), *exact),
        f"of {case} in {dtype}",
    )
    assert calls == [True, True]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case: LayerCase) -> None:
    """Many threads compute blocks of rows in parallel, one thread runs of samples."""
    layer, (x, masks, noise) = fast_layer(case).eval(), data(case)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 9):
            torch.set_num_threads(count)
            found.append(outputs(layer, x, masks, noise))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("change", ["data", "no_grad", "numpy", "load_state_dict", "replace"])
def test_changed_weights_are_seen(change: str) -> None:
    """A change in one place is seen, also one that torch does not record."""
    layer, (x, masks, _) = fast_layer(FL).eval(), data(FL)
    weight = layer.interaction_experts[1].fusion_model.network[0].mlp.network[3].weight
    with torch.no_grad():
        before = layer.inference(x, masks)[2]
        assert torch.equal(before, layer.inference(x, masks)[2])
        match change:
            case "data":
                weight.data[0, 0] += 1.0
            case "no_grad":
                weight[0, 0] += 1.0
            case "numpy":
                weight.numpy()[0, 0] += 1.0
            case "load_state_dict":
                state = copy.deepcopy(layer.state_dict())
                state["interaction_experts.1.fusion_model.network.0.mlp.network.3.weight"][
                    0, 0
                ] += 1
                layer.load_state_dict(state)
            case _:
                changed = weight.detach().clone()
                changed[0, 0] += 1.0
                owner = layer.interaction_experts[1].fusion_model.network[0].mlp.network[3]
                owner.weight = torch.nn.Parameter(changed)
        after = layer.inference(x, masks)[2]
        expected = layer.eval()
        expected.backend = "reference"
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, expected.inference(x, masks)[2])


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_a_parameter_of_another_dtype_or_device_is_refused(to: Any) -> None:
    layer, (x, masks, _) = fast_layer(FL).eval(), data(FL)
    with torch.no_grad():
        layer.inference(x, masks)
        linear = layer.interaction_experts[1].fusion_model.network[0].mlp.network[3]
        linear.weight = torch.nn.Parameter(linear.weight.detach().to(to))
        with pytest.raises(ValueError, match="parameters differ in"):
            layer.inference(x, masks)


def test_gradients_and_dropout_need_the_other_path(calls: list[bool]) -> None:
    layer, (x, masks, _) = fast_layer(dataclasses.replace(FL, dropout=0.5)).eval(), data(FL)
    assert layer.inference(x, masks)[2].requires_grad
    layer.requires_grad_(False)
    assert not layer.inference(x, masks)[2].requires_grad
    leaves = [part.requires_grad_() for part in x]
    assert layer.inference(leaves, masks)[2].requires_grad
    with torch.no_grad():
        layer.train().inference(x, masks)
        layer.eval().interaction_experts[2].fusion_model.network[0].dropout2.train()
        with pytest.raises(ValueError, match="dropout2 differs between the experts"):
            layer.inference(x, masks)
        fast_layer(SPARSE_FL).eval().inference(SPARSE_FL.inputs())
    assert calls == [False, True, False, False, False]


def test_gradients_of_positions_alone(calls: list[bool]) -> None:
    layer, oracle = fast_layer(I2).eval(), I2.reference().eval()
    gradients = []
    for each in (layer, oracle):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.endswith("pos_embed"))
        each.inference(I2.inputs())[2].sum().backward()
        gradients.append(each.interaction_experts[1].fusion_model.pos_embed.grad)
    assert calls == [False]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-3


def test_nan_stays_in_its_sample() -> None:
    """Samples share tiles of the product, and padding is not read."""
    layer, x = fast_layer(FL).eval(), FL.inputs()
    masks = draw_masks("partial", FL.batch, FL.lengths)
    with torch.no_grad():
        expected = layer.inference(x, masks)[2]
        padded = [
            torch.where(mask.bool().unsqueeze(-1), part, torch.nan)
            for part, mask in zip(x, masks, strict=True)
        ]
        torch.testing.assert_close(layer.inference(padded, masks)[2], expected)
        x[0][1, 0] = torch.nan
        masks[0][1, 0] = True
        found = layer.inference(x, masks)[2]
    assert found[1].isnan().all()
    others = [i for i in range(FL.batch) if i != 1]
    assert torch.equal(found[others], expected[others])


BOUNDS = torch.tensor([0, 2, 3, 3, 4, 4, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.tensor([4, 0, 1, 1, 2, 5])}, "index: expected rows of the table"),
        ({"index": torch.tensor([4, -1, 1, 1, 2, 3])}, "index: expected rows of the table"),
        ({"index": torch.tensor([4, 0, 1, 1, 2])}, "cu_segments: expected non-decreasing"),
        ({"cu_segments": BOUNDS.flip(0).contiguous()}, "cu_samples: expected"),
        ({"cu_segments": BOUNDS[:6].contiguous()}, "cu_segments: expected a multiple"),
        ({"cu_segments": BOUNDS[:1].contiguous()}, "cu_segments: expected a multiple"),
        ({"cu_samples": BOUNDS[1::2].contiguous()}, "cu_samples: expected"),
        ({"cu_samples": torch.tensor([0, 2, 4, 6], dtype=torch.int32)}, "cu_samples: expected"),
        ({"weights": []}, "weights: expected"),
        ({"heads": 3}, "heads: expected a divisor"),
        ({"rows": draw(1, 5, 7, seed=1)}, r"weights\[0\]: expected"),
        ({"rows": draw(3, 5, 8, seed=1)}, "rows: expected"),
        ({"rows": draw(1, 5, 8, seed=1).double()}, r"weights\[0\]: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.flmoe.encoder_inference(*encoder_inference_arguments(**changes))
