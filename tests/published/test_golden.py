"""Tests that the layers agree with recorded results of the published code, see tests/support/golden.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from tests.support import golden
from tests.support.layers import RANDOM_GATES

GOLDEN: dict[str, dict[str, Any]] = json.loads(golden.FILE.read_text(encoding="utf-8"))
# Relative to the largest value of an entry, which in a group of gradients is the norm. The file has 12 digits.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}
# A layer class or a backend of InteractionMoE, with a dtype.
LAYERS = (
    ("ReferenceInteractionMoE", torch.float64),
    ("reference", torch.float64),
    ("cpu", torch.float64),
    ("cpu", torch.float32),
)
# Without dropout, training computes the same as eval mode, except for random gates.
MODES = [
    (name, training)
    for name, case in golden.CASES.items()
    for training in (False, True)
    if not (training and case.gate in RANDOM_GATES)
]


def make(name: str, kind: str, dtype: torch.dtype) -> nn.Module:
    """A layer of this package with the parameters of the published layer, loaded with the published keys."""
    case = golden.CASES[name]
    layer: nn.Module = case.reference(dtype)
    if kind != "ReferenceInteractionMoE":
        layer = InteractionMoE.adopt(layer, backend=kind)
    state = layer.state_dict()
    assert golden.keys(state) == GOLDEN[name]["keys"], "not the published names and shapes"
    layer.load_state_dict(golden.parameters(state))
    return layer


def assert_agrees(name: str, layer: nn.Module) -> None:
    found = golden.measure(
        golden.CASES[name], layer, lambda x, masks, noise: layer(x, masks, replacements=noise)
    )
    expected = {key: value for key, value in GOLDEN[name].items() if key != "keys"}
    assert list(found) == list(expected)
    for key, value in expected.items():
        compare(f"{key} of {name}", found[key], value, next(layer.parameters()).dtype)


def compare(what: str, found: Tensor, expected: Any, dtype: torch.dtype) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape, what
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= TOLERANCES[dtype] * size, f"{what}: error {error:.2g}, largest value {size:.2g}"


@pytest.mark.parametrize(("kind", "dtype"), LAYERS)
@pytest.mark.parametrize(("name", "training"), MODES)
def test_agrees_with_the_published_code(
    name: str, training: bool, kind: str, dtype: torch.dtype
) -> None:
    layer = make(name, kind, dtype).train(training)
    assert_agrees(name, layer)
    inputs, masks, _ = golden.data(golden.CASES[name])
    with torch.no_grad():
        experts, weights, logits = layer.inference([x.to(dtype) for x in inputs], masks)
    full = [views[0] for views in GOLDEN[name]["expert_logits"]]
    compare(f"inference of {name}", torch.stack(experts).double(), full, dtype)
    compare(f"inference of {name}", weights.double(), GOLDEN[name]["weights"], dtype)
    compare(f"inference of {name}", logits.double(), GOLDEN[name]["logits"], dtype)


@pytest.mark.parametrize("name", golden.CASES)
def test_swapped_experts_do_not_agree(name: str) -> None:
    layer = make(name, "cpu", torch.float32).eval()
    first, second = (layer.interaction_experts[e].state_dict() for e in (0, 1))
    first = {key: value.clone() for key, value in first.items()}
    layer.interaction_experts[0].load_state_dict(second)
    layer.interaction_experts[1].load_state_dict(first)
    with pytest.raises(AssertionError, match="largest value"):
        assert_agrees(name, layer)
