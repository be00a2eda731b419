"""Results of the published code on six small layers, in tests/published/golden.json.

    python -m tests.support.golden PATH_OF_FL-I2MoE_Decor PATH_OF_I2MoE

runs the code of these two checkouts and writes the file. Parameters, inputs and noise follow from a formula.

The published code is changed in three ways. It computes positions, token counts and some gate losses in float32;
here float64 takes its place, because float32 changes the results by up to 1e-7. Its gates keep only the loss of
the last modality; here they keep the sum over modalities, as the layers of this package do. Random routing, which
I2MoE switches on in eval mode too, is off.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.reference import Replacements
from flmoe_kernels.layers.modalities import Masks
from tests.support.checkout import Checkout
from tests.support.layers import LayerCase, named_outputs

FILE = Path(__file__).parents[1] / "published" / "golden.json"
DIGITS = 12

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
PUBLISHED_GATES = {"NoisyGate": "AddtionalNoisyGate"}

Run = Callable[[list[Tensor], Masks, Replacements], Sequence[Any]]


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


def measure(case: LayerCase, layer: nn.Module, run: Run) -> dict[str, Any]:
    """Outputs of a call and gradients of a weighted sum of all of them.

    Latents are dot products with a wave, by expert and view. A group of gradients, for example those of one
    parameter of all experts, is its norm, then the dot product of every tensor with a wave.
    """
    dtype = next(layer.parameters()).dtype
    inputs, masks, noise = data(case)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    noise = [[x.to(dtype).requires_grad_() for x in row] for row in noise]
    outputs = named_outputs(layer, run(inputs, masks, noise))
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


def published_layer(case: LayerCase, checkout: Checkout) -> nn.Module:
    """The published layer of a case, in train mode without dropout; its gates add up their losses."""
    fusion = checkout.Transformer(
        len(case.lengths),
        case.lengths[0],
        case.dim,
        case.classes,
        case.layers,
        num_layers_pred=1,
        num_experts=case.mlp_experts,
        num_routers=case.routers,
        top_k=case.top_k,
        num_heads=case.heads,
        dropout=0.0,
        mlp_sparse=case.gate is not None,
        gate=PUBLISHED_GATES.get(case.gate or "", case.gate),
    )
    layer = checkout.InteractionMoE(
        len(case.lengths), fusion, case.sparse, case.dim, 2 * case.dim, 3, 1.5
    )
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "capacity"):
            part.capacity, part.random_routing = (case.capacity, case.capacity), False
        if hasattr(part, "all_gates"):
            _watch(part.gate)
    return layer


def _watch(gate: Any) -> None:
    """Make a gate add up its losses, and check that it drops nothing and that its choices are clear."""
    losses: list[Tensor] = []

    def take() -> Tensor:
        total = torch.stack([loss.reshape(()) for loss in losses]).sum()
        losses.clear()
        return total

    def check(module: Any, args: tuple[Tensor], chosen: tuple[Tensor, Tensor]) -> None:
        logits = module.gate(*args) if hasattr(module, "gate") else args[0] @ module.w_gate
        best = logits.sort(dim=1, descending=True).values[:, : module.top_k + 1]
        assert (best[:, :-1] - best[:, 1:]).min() > 1e-3, "two experts have nearly equal logits"
        assert (chosen[0] >= 0).all(), "a choice was dropped"

    gate.set_loss, gate.get_loss = losses.append, take
    gate.register_forward_hook(check)


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Let code that names float32 compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def record(checkout: Checkout) -> dict[str, dict[str, Any]]:
    """The results of all cases of this checkout."""
    results = {}
    for name, case in CASES.items():
        if case.compat != checkout.compat:
            continue
        with _in_float64():
            layer = published_layer(case, checkout)
            state = layer.state_dict()
            layer.load_state_dict(parameters(state))
            values = measure(case, layer.eval(), _with_noise(layer))
        rounded = {key: _rounded(value.tolist()) for key, value in values.items()}
        results[name] = {"keys": keys(state), **rounded}
    return results


def _with_noise(layer: nn.Module) -> Run:
    """Calls of the published layer in which given noise takes the place of its random numbers."""

    def run(inputs: list[Tensor], masks: Masks, noise: Replacements) -> Sequence[Any]:
        left = [[row[m] for row in noise] for m in range(len(inputs))]

        def replacement(x: Tensor) -> Tensor:
            for m, own in enumerate(inputs):
                if x is own:
                    return left[m].pop(0)
            return torch.zeros_like(x)  # the noise of a gate, which eval mode multiplies by 0

        with mock.patch.object(torch, "randn_like", replacement):
            result = layer(inputs) if masks is None else layer(inputs, masks)
        assert not any(left), "the layer drew fewer replacements than expected"
        return result

    return run


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fl", type=Checkout, help="checkout of dut0817/FL-I2MoE_Decor")
    parser.add_argument("i2", type=Checkout, help="checkout of Raina-Xin/I2MoE")
    options = parser.parse_args()
    results = record(options.fl) | record(options.i2)
    cases = []
    for name, case in results.items():
        rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in case.items()]
        cases.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}")
    FILE.write_text("{\n" + ",\n".join(cases) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
