"""Tests of PairInteractionMoE against its definition: outputs, losses, masks, module methods."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.interaction_losses.reference import interaction_losses
from tests.support.inputs import draw, draw_masks, gradients
from tests.support.pair_layers import BACKENDS, DIMS, by_definition, pair_inputs, pair_layer

ALL_KINDS = ("unique_a", "unique_b", "synergy", "redundancy", "null")
CASES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "two": ((3, 2), "none", {}),
    "three, masked": ((3, 2, 2), "partial", {}),
    "top 2 with null": ((4, 3), "partial", {"kinds": ALL_KINDS, "top_k": 2}),
    "top 1, cold": ((3, 2, 2), "mixed", {"top_k": 1, "temperature": 0.3}),
    "repeated": (
        (3, 2, 2),
        "padded_modality",
        {"kinds": ("synergy", "unique_b", "synergy", "unique_b"), "num_classes": 1},
    ),
    "0/1 masks": ((3, 2), "numbers", {}),
}
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@EACH_BACKEND
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_its_docstring(case: str, backend: str) -> None:
    lengths, pattern, options = CASES[case]
    layer = pair_layer(DIMS[: len(lengths)], backend=backend, token_outputs=True, **options)
    x, masks = pair_inputs(lengths), draw_masks(pattern, 2, lengths)
    expected, out = by_definition(layer, x, masks), layer(x, masks)
    for name in ("logits", "expert_logits"):
        torch.testing.assert_close(getattr(out, name), expected[name])
    torch.testing.assert_close(list(out.mass), expected["mass"])
    torch.testing.assert_close(out.logits, layer.bias + out.expert_logits.sum(1))
    for m, (found, want) in enumerate(zip(out.tokens, expected["tokens"], strict=True)):
        mask = None if masks is None else masks[m]
        keep = torch.ones_like(want) if mask is None else mask.double().unsqueeze(2)
        torch.testing.assert_close(found, want * keep)


def test_expert_names() -> None:
    assert pair_layer().experts == ("unique_0", "unique_1", "synergy", "redundancy")
    layer = pair_layer((2, 2, 2), kinds=("synergy", "unique_b", "null", "unique_a", "synergy"))
    shared = ("synergy", "null", "synergy_2")
    assert layer.experts == ("unique_0", "unique_1", "unique_2", *shared)
    assert layer.modality_pairs == ((0, 1), (0, 2), (1, 2))
    assert layer.pair_experts[1] == ("synergy", "unique_2", "null", "unique_0", "synergy_2")
    layer = pair_layer((2, 2, 2), kinds=("unique_a", "unique_a", "unique_b"))
    assert layer.experts == ("unique_0", "unique_1", "unique_2", "unique_0_2", "unique_1_2")


@EACH_BACKEND
def test_latents_are_the_pooled_values_of_each_expert(backend: str) -> None:
    layer = pair_layer(DIMS, backend=backend)
    out = layer(pair_inputs((3, 2, 2)))
    assert out.latents.shape == (5, 2, 3 * 4)
    by_pair = out.latents.unflatten(2, (3, 4))
    torch.testing.assert_close(
        torch.einsum("ebpv,evc->bec", by_pair, layer.head), out.expert_logits
    )
    for p, names in enumerate(layer.pair_experts):
        for e, name in enumerate(layer.experts):
            assert bool((by_pair[e, :, p] == 0).all()) == (name not in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["none", "partial"])
def test_cpu_is_within_the_budget_of_the_reference(pattern: str, dtype: torch.dtype) -> None:
    lengths = (13, 7, 5)
    masks = draw_masks(pattern, 2, lengths)
    found = []
    for backend, kind in (("cpu", dtype), ("reference", dtype), ("reference", torch.float64)):
        # All three use the same rounded values.
        layer = pair_layer(DIMS, dtype, backend=backend, rank=8, value_dim=16).to(kind)
        x = [each.to(kind).requires_grad_() for each in pair_inputs(lengths, dtype=dtype)]
        out = layer(x, masks, interaction_losses=True, replacements=[each.flip(0) for each in x])
        outputs = {"logits": out.logits, "latents": out.latents, "losses": out.losses}
        leaves = [*x, *layer.parameters()]
        grads = gradients([out.logits, out.latents], leaves)
        names = ["x0", "x1", "x2", *dict(layer.named_parameters())]
        found.append(outputs | dict(zip(names, grads, strict=True)))
    for name, exact in found[2].items():
        # Sums over tokens have different orders; in low precision the size of the terms determines the rounding.
        size = float(exact.detach().abs().max())
        assert_within_budget(found[0][name], found[1][name], exact, name, magnitude=2 * size)


@EACH_BACKEND
def test_a_missing_modality_is_one_with_every_token_masked(backend: str) -> None:
    layer = pair_layer(DIMS, backend=backend, token_outputs=True)
    x = pair_inputs((3, 2, 2))
    absent = layer([x[0], None, x[2]])
    masked = layer(x, [None, torch.zeros(2, 2, dtype=torch.bool), None])
    empty = layer([x[0], x[1][:, :0], x[2]])
    for other in (masked, empty):
        torch.testing.assert_close(absent.logits, other.logits)
        torch.testing.assert_close(absent.latents, other.latents)
        torch.testing.assert_close(absent.tokens[0], other.tokens[0])
    assert absent.tokens[1].shape == empty.tokens[1].shape == (2, 0, 4)
    assert not torch.allclose(absent.logits, layer(x).logits)


@EACH_BACKEND
def test_padding_does_not_matter(backend: str) -> None:
    layer = pair_layer(DIMS, backend=backend, token_outputs=True)
    lengths = (4, 3, 2)
    x, masks = pair_inputs(lengths), draw_masks("partial", 2, lengths)
    noise = pair_inputs(lengths, seed=70)
    results = []
    for filler in (0.0, 3.0, float("nan")):
        dirty = [
            each.masked_fill(~mask.unsqueeze(2), filler).requires_grad_()
            for each, mask in zip(x, masks, strict=True)
        ]
        other = [
            each.masked_fill(~mask.unsqueeze(2), filler)
            for each, mask in zip(noise, masks, strict=True)
        ]
        out = layer(dirty, masks, interaction_losses=True, replacements=other)
        outputs = [out.logits, out.latents, out.losses, *out.mass, *out.tokens]
        results.append([*outputs, *gradients(outputs, [*dirty, *layer.parameters()])])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert torch.equal(found, expected)
    assert all(each.isfinite().all() for each in results[0])


@EACH_BACKEND
def test_the_anchor_is_never_masked(backend: str) -> None:
    layer = pair_layer(backend=backend)
    x = pair_inputs((3, 2))
    none = [torch.zeros(2, length, dtype=torch.bool) for length in (3, 2)]
    out = layer(x, none)
    assert (out.latents != 0).any(dim=2).all()
    for mass in out.mass:
        assert (mass[:, :, :-1] == 0).all()
        torch.testing.assert_close(mass[:, :, -1].sum(1), torch.ones(2, dtype=torch.float64))
    grads = torch.autograd.grad(out.logits.square().sum(), list(layer.anchors))
    assert all(bool(grad.any()) for grad in grads)
    torch.testing.assert_close(out.logits[0], out.logits[1])
    torch.testing.assert_close(out.logits, by_definition(layer, x, none)["logits"])


@EACH_BACKEND
@pytest.mark.parametrize("modalities", [2, 3])
def test_losses_are_the_references_on_perturbed_latents(modalities: int, backend: str) -> None:
    lengths, dims = (4, 3, 2)[:modalities], DIMS[:modalities]
    kinds = ("redundancy", "null", "unique_b", "synergy", "unique_a")
    layer = pair_layer(dims, backend=backend, kinds=kinds)
    x = [each.requires_grad_() for each in pair_inputs(lengths, dims)]
    noise = [each.requires_grad_() for each in pair_inputs(lengths, dims, seed=70)]
    masks = draw_masks("partial", 2, lengths)
    out = layer(x, masks, interaction_losses=True, replacements=noise)
    views = [layer(x, masks).latents]
    views += [layer([*x[:m], noise[m], *x[m + 1 :]], masks).latents for m in range(modalities)]
    names = [*(f"unique_{m}" for m in range(modalities)), "synergy", "redundancy"]
    by_expert = [[view[layer.experts.index(name)] for view in views] for name in names]
    expected = torch.stack(interaction_losses(by_expert))
    torch.testing.assert_close(out.losses, expected)
    torch.testing.assert_close(out.latents, views[0])
    torch.testing.assert_close(out.logits, layer(x, masks).logits)
    assert [mass.shape[0] for mass in out.mass] == [2] * len(layer.modality_pairs)
    leaves = [*x, *noise, *layer.parameters()]
    found, want = gradients([out.losses], leaves), gradients([expected], leaves)
    for grad, other in zip(found, want, strict=True):
        torch.testing.assert_close(grad, other)
    assert all(bool(grad.any()) for grad in found[: 2 * modalities])


def test_noise_follows_torchs_generator() -> None:
    layer, x = pair_layer(), pair_inputs((3, 2))

    def losses(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x, interaction_losses=True).losses

    assert torch.equal(losses(1), losses(1))
    assert not torch.equal(losses(1), losses(2))
    torch.manual_seed(1)
    noise = [torch.randn_like(each) for each in x]
    assert torch.equal(layer(x, interaction_losses=True, replacements=noise).losses, losses(1))
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


@EACH_BACKEND
def test_layers_stack_without_a_modality(backend: str) -> None:
    """Every parameter has a gradient, as DistributedDataParallel requires; unused parameters have 0."""
    below = pair_layer(DIMS, num_classes=None, token_outputs=True, backend=backend)
    above = pair_layer(DIMS, backend=backend, seed=1)
    x = pair_inputs((3, 2, 2))
    first = below([x[0], None, x[2]], interaction_losses=True)
    assert (first.logits, first.expert_logits, below(x).latents) == (None,) * 3
    assert first.losses.isfinite().all()
    assert [each.shape for each in first.tokens] == [(2, 3, 5), (2, 0, 4), (2, 2, 6)]
    out = above(first.tokens)
    torch.testing.assert_close(out.logits, above([first.tokens[0], None, first.tokens[2]]).logits)
    out.logits.square().sum().backward()
    for layer in (below, above):
        assert all(parameter.grad is not None for parameter in layer.parameters())
    assert not below.token_maps[0]["b"].weight.grad.any()
    assert below.token_maps[0]["a"].weight.grad.any()


STATE = {
    "gate_bias": (3, 4),
    "head": (5, 4, 3),
    "bias": (3,),
    **{f"anchors.{m}": (dim,) for m, dim in enumerate(DIMS)},
    **{f"norms.{m}.{leaf}": (dim,) for m, dim in enumerate(DIMS) for leaf in ("weight", "bias")},
    **{
        f"projections.{p}.{side}.{leaf}": (28, DIMS[m]) if leaf == "weight" else (28,)
        for p, pair in enumerate([(0, 1), (0, 2), (1, 2)])
        for side, m in zip("ab", pair, strict=True)
        for leaf in ("weight", "bias")
    },
}
TOKEN_MAPS = {
    f"token_maps.{p}.{side}.weight": (DIMS[m], 4)
    for p, pair in enumerate([(0, 1), (0, 2), (1, 2)])
    for side, m in zip("ab", pair, strict=True)
}


def test_state_dict_is_what_checkpoints_hold() -> None:
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in layer.state_dict().items()}

    assert shapes(pair_layer(DIMS)) == STATE
    assert shapes(pair_layer(DIMS, token_outputs=True)) == STATE | TOKEN_MAPS
    headless = {name: shape for name, shape in STATE.items() if name not in ("head", "bias")}
    assert shapes(pair_layer(DIMS, token_outputs=True, num_classes=None)) == headless | TOKEN_MAPS


def test_copies_pickles_and_checkpoints() -> None:
    layer, x = pair_layer(DIMS), pair_inputs((3, 2, 2))
    expected = layer(x).logits
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = pair_layer(DIMS, seed=5)
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x).logits, expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert torch.equal(layer(x).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer = pair_layer(dtype=torch.float32, backend="cpu")
    x = pair_inputs((6, 5), dtype=dtype)
    expected = layer([each.float() for each in x])
    with torch.autocast("cpu", dtype=dtype):
        out = layer([each.requires_grad_() for each in x], interaction_losses=True)
        explanation = layer.explain(x)
    torch.testing.assert_close(out.logits.float(), expected.logits, rtol=0.05, atol=0.1)
    (out.logits.float().sum() + out.losses.float().sum()).backward()
    assert all(each.grad is not None and each.grad.dtype == dtype for each in x)
    assert layer.gate_bias.grad.dtype == torch.float32
    best = expected.logits.max(dim=1).values
    torch.testing.assert_close(explanation.value, best)


@EACH_BACKEND
@pytest.mark.parametrize("autocast", [False, True], ids=["half layer", "autocast"])
def test_sums_over_many_pairs_fit_float16(autocast: bool, backend: str) -> None:
    """The messages of 512 x 512 pairs have the same sign, and their sum exceeds float16's 65504."""
    layer = PairInteractionMoE([8, 8], num_classes=3, rank=2, value_dim=4, backend=backend)
    with torch.no_grad():
        for maps in layer.projections:
            for linear in maps.values():
                linear.weight.mul_(0.1)
                linear.bias.fill_(1.0)
        layer.head.add_(0.25)
    layer.half().float()
    # LayerNorm subtracts the mean over features, so the common part of the tokens is a direction.
    common = torch.linspace(-3.0, 3.0, 8)
    x = [each + common for each in pair_inputs((512, 512), (8, 8), dtype=torch.float32)]
    x = [each.half().float() for each in x]
    expected = layer(x, interaction_losses=True, replacements=[each.flip(0) for each in x])
    assert float((expected.latents.detach() * layer.normalizer).abs().max()) > 65504
    if not autocast:
        layer = layer.half()
    half = [each.half() for each in x]
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        found = layer(half, interaction_losses=True, replacements=[each.flip(0) for each in half])
    assert found.logits.dtype == layer.gate_bias.dtype
    assert found.latents.dtype == found.losses.dtype == torch.float32
    close = {"rtol": 0.01, "atol": 0.01, "check_dtype": False}
    for name in ("logits", "expert_logits", "latents", "losses"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    found.logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@EACH_BACKEND
def test_an_empty_batch(backend: str) -> None:
    layer = pair_layer(backend=backend, token_outputs=True)
    x = pair_inputs((3, 2), batch=0)
    out = layer(x)
    assert out.logits.shape == (0, 3)
    assert out.tokens[0].shape == (0, 3, 5)
    out.logits.sum().backward()
    assert layer.explain(x).shapley_values()[1].shape == (0, 2)


def test_longer_padding_changes_nothing() -> None:
    """The normalizer does not depend on the number of tokens."""
    layer, (a, b) = pair_layer(), pair_inputs((3, 2))
    longer = [torch.cat([each, draw(2, 4, each.shape[2], dtype=each.dtype)], 1) for each in (a, b)]
    masks = [torch.arange(each.shape[1] + 4).expand(2, -1) < each.shape[1] for each in (a, b)]
    torch.testing.assert_close(layer(longer, masks).logits, layer([a, b]).logits)
