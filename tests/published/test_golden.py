"""Tests that the layers agree with results of the published code on six small layers, in golden.json.

They were recorded by tests/support/golden.py of commit d8e90ae; `python -m tests.support.scripts` compares the
layers with the published code itself. Parameters, inputs and noise follow from a formula.

For the record, the published code was changed in three ways. It computes positions, token counts and some gate
losses in float32, which changes the results by up to 1e-7; float64 took its place. Its gates keep only the loss of
the last modality; they kept the sum over modalities, as the layers of this package do. Random routing, which I2MoE
switches on in eval mode too, was off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from tests.support.layers import RANDOM_GATES, LayerCase, named_outputs

FILE = Path(__file__).with_name("golden.json")
GOLDEN: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
FL = LayerCase((6, 5), layers=2, classes=2, masks="short")
I2 = LayerCase((4, 4), "i2moe", layers=2, classes=2)
# With this capacity an expert can take every token.
GSHARD = {"gate": "GShardGate", "sparse": True, "capacity": 2.4, "masks": "none"}
CASES = {
    "fl_masks": FL,
    "fl_three_modalities": LayerCase((4, 3, 5), heads=4, classes=2),
    "fl_gshard": dataclasses.replace(FL, lengths=(3, 5), layers=3, **GSHARD),
    "fl_noisy": LayerCase((5, 4), classes=2, gate="NoisyGate", mlp_experts=5, sparse=True),
    "i2": I2,
    "i2_gshard": dataclasses.replace(I2, layers=1, **GSHARD),
}


def wave(shape: Sequence[int], place: float) -> Tensor:
    """sin(place + 0.41 * k^2) of the flat index k = 1, 2, ..., in float64; standard deviation about 0.7."""
    k = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return (place + 0.41 * k * k).sin().view(shape)


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for a state_dict, from the place of each name among the sorted names.

    Activations have order 1, and the gates' choices are clear. A router that has two names has one value.
    """
    own = {name: name.replace(".mlp.gate.", ".mlp.all_gates.0.") for name in state}
    places = {name: float(place) for place, name in enumerate(sorted(set(own.values())))}
    values = {}
    for name, tensor in state.items():
        value = wave(tensor.shape, places[own[name]])
        if tensor.dim() == 1 or name.endswith("bias"):
            value = 0.3 * value + (1.0 if ".norm" in name and name.endswith("weight") else 0.0)
        elif not name.endswith("pos_embed"):
            fan_in = tensor.shape[0] if "w_gate" in name else tensor.shape[-1]
            value = value * (2.0 / fan_in) ** 0.5 * (3.0 if "gate" in name else 1.0)
        values[name] = value
    return values


def keys(state: dict[str, Tensor]) -> str:
    """Digest of all names and shapes of a state_dict."""
    entries = "\n".join(f"{name} {tuple(state[name].shape)}" for name in sorted(state))
    return hashlib.sha256(entries.encode()).hexdigest()[:16]


def data(case: LayerCase) -> tuple[list[Tensor], list[Tensor] | None, list[list[Tensor]]]:
    """Inputs, masks and replacements in float64; with masks, sample b of modality m has b + m padded tokens."""
    shapes = [(case.batch, length, case.dim) for length in case.lengths]
    inputs = [1.4 * wave(shape, 100.0 + m) for m, shape in enumerate(shapes)]
    noise = [
        [1.4 * wave(shape, 200.0 + 10 * e + m) for m, shape in enumerate(shapes)]
        for e in range(case.experts)
    ]
    if case.masks == "none":
        return inputs, None, noise
    padded = torch.arange(case.batch)[:, None]
    masks = [torch.arange(n) < n - padded - m for m, n in enumerate(case.lengths)]
    return inputs, masks, noise


def measure(case: LayerCase, layer: nn.Module) -> dict[str, Any]:
    """Outputs of a call and gradients of a weighted sum of all of them.

    Latents are dot products with a wave, by expert and view. A group of gradients, for example those of one
    parameter of all experts, is its norm, then the dot product of every tensor with a wave.
    """
    dtype = next(layer.parameters()).dtype
    inputs, masks, noise = data(case)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    noise = [[x.to(dtype).requires_grad_() for x in row] for row in noise]
    outputs = named_outputs(layer(inputs, masks, replacements=noise))
    leaves = {f"inputs.{m}": x for m, x in enumerate(inputs)}
    leaves |= {f"replacements.{e}.{m}": x for e, row in enumerate(noise) for m, x in enumerate(row)}
    leaves |= dict(layer.named_parameters())
    terms = [_dot(out, 300.0 + i) for i, out in enumerate(outputs.values())]
    found = torch.autograd.grad(sum(terms), list(leaves.values()), allow_unused=True)
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        groups.setdefault(_group(name), []).append((name, gradient.double()))
    result = {name: out.detach().double() for name, out in outputs.items()}
    if "latents" in result:
        assert torch.equal(result.pop("latents"), result["expert_latents"][:, 0])
        latents = result["expert_latents"]
        dots = [[_dot(x, 400.0) for x in views] for views in latents]
        result["expert_latents"] = torch.tensor(dots, dtype=torch.float64)
    for group, members in groups.items():
        norm = torch.stack([gradient.norm() for _, gradient in members]).norm()
        dots = [_dot(gradient, 500.0) for _, gradient in sorted(members)]
        result[f"gradient {group}"] = torch.stack([norm, *dots])
    return result


def _dot(x: Tensor, place: float) -> Tensor:
    return (x * wave(x.shape, place).to(x)).sum()


def _group(name: str) -> str:
    """inputs, replacements, or a parameter without the number of its expert."""
    name = re.sub(r"^(inputs|replacements)\..*", r"\1", name)
    name = name.replace(".mlp.all_gates.0.", ".mlp.gate.")
    return re.sub(r"^interaction_experts\.\d+\.fusion_model\.", "", name)


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
    for name, case in CASES.items()
    for training in (False, True)
    if not (training and case.gate in RANDOM_GATES)
]


def make(name: str, kind: str, dtype: torch.dtype) -> nn.Module:
    """A layer of this package with the parameters of the published layer, loaded with the published keys."""
    case = CASES[name]
    layer: nn.Module = case.reference(dtype)
    if kind != "ReferenceInteractionMoE":
        layer = InteractionMoE.adopt(layer, backend=kind)
    state = layer.state_dict()
    assert keys(state) == GOLDEN[name]["keys"], "not the published names and shapes"
    layer.load_state_dict(parameters(state))
    return layer


def assert_agrees(name: str, layer: nn.Module) -> None:
    found = measure(CASES[name], layer)
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
    inputs, masks, _ = data(CASES[name])
    with torch.no_grad():
        experts, weights, logits = layer.inference([x.to(dtype) for x in inputs], masks)
    full = [views[0] for views in GOLDEN[name]["expert_logits"]]
    compare(f"inference of {name}", torch.stack(experts).double(), full, dtype)
    compare(f"inference of {name}", weights.double(), GOLDEN[name]["weights"], dtype)
    compare(f"inference of {name}", logits.double(), GOLDEN[name]["logits"], dtype)


@pytest.mark.parametrize("name", CASES)
def test_swapped_experts_do_not_agree(name: str) -> None:
    layer = make(name, "cpu", torch.float32).eval()
    first, second = (layer.interaction_experts[e].state_dict() for e in (0, 1))
    first = {key: value.clone() for key, value in first.items()}
    layer.interaction_experts[0].load_state_dict(second)
    layer.interaction_experts[1].load_state_dict(first)
    with pytest.raises(AssertionError, match="largest value"):
        assert_agrees(name, layer)
