"""Tests of the layer without gradients, which computes all encoders in one native call."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.encoder_cases import encoder_inference_arguments
from tests.support.inputs import as_dtype, draw, draw_masks
from tests.support.layers import (
    FL,
    I2,
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
# In half precision: masks, an odd number of heads, learned positions.
MIXED = (CASES[0], CASES[3], CASES[8])


def outputs(layer: Any, x: Any, masks: Any, noise: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        values = named_outputs(layer(x, masks, replacements=noise))
        _, values["inferred weights"], values["inferred logits"] = layer.inference(x, masks)
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, dtype) for case in MIXED for dtype in (torch.bfloat16, torch.float16)),
        (CASES[1], torch.float64),
    ],
    ids=str,
)
def test_matches_the_reference(case: LayerCase, dtype: torch.dtype) -> None:
    x, masks, noise = data(case, dtype)
    exact = as_dtype(x, torch.float64), masks, as_dtype(noise, torch.float64)
    assert_all_within_budget(
        outputs(fast_layer(case, dtype).eval(), x, masks, noise),
        outputs(case.reference(dtype).eval(), x, masks, noise),
        outputs(case.reference(dtype).double().eval(), *exact),
        f"of {case} in {dtype}",
    )


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


def test_gradients_and_dropout() -> None:
    """Gradients of parameters, gradients of inputs only, and dropout: each avoids the inference kernel."""
    layer, (x, masks, _) = fast_layer(dataclasses.replace(FL, dropout=0.5)).eval(), data(FL)
    encoder = layer.interaction_experts[0].fusion_model.network[0]
    layer.inference(x, masks)[0][0].sum().backward()
    assert encoder.attn.proj.weight.grad.any()
    layer.requires_grad_(False)
    leaves = [part.requires_grad_() for part in x]
    (gradient,) = torch.autograd.grad(layer.inference(leaves, masks)[0][0].sum(), leaves[:1])
    assert gradient.any()
    layer.train()
    with torch.no_grad():
        results = [layer.inference(x, masks)[0][0] for _ in range(2)]
    assert not torch.equal(*results)


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
        ({"index": torch.tensor([4, 0, 1, 1, 2])}, "cu_segments: expected non-decreasing"),
        ({"cu_segments": BOUNDS.flip(0).contiguous()}, "cu_samples: expected"),
        ({"cu_segments": BOUNDS[:6].contiguous()}, "cu_segments: expected a multiple"),
        ({"cu_samples": torch.tensor([0, 2, 4, 6], dtype=torch.int32)}, "cu_samples: expected"),
        ({"weights": []}, "weights: expected"),
        ({"heads": 3}, "heads: expected a divisor"),
        ({"rows": draw(1, 5, 7, seed=1)}, r"weights\[0\]: expected"),
        ({"rows": draw(1, 5, 8, seed=1).double()}, r"weights\[0\]: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.flmoe.encoder_inference(*encoder_inference_arguments(**changes))
