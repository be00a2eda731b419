"""The fast layer against the reference: every output, loss and gradient, masks, edges, its life as a module."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import InteractionMoE, ReferenceInteractionMoE, use_backend
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from tests.support.inputs import as_dtype, draw_masks, draw_replacements
from tests.support.layers import (
    LayerCase,
    assert_layer_within_budget,
    named_outputs,
    outputs_and_gradients,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SLOW_DTYPES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[2:]]
FL = LayerCase((7, 5), dim=16, batch=3)
I2 = LayerCase((6, 6), "i2moe", dim=16, batch=3)
BOTH = pytest.mark.parametrize("case", [FL, I2], ids=["fl_i2moe", "i2moe"])

MASKED = ("all_none", "all_valid", "partial", "padded_modality", "mixed", "numbers")
CASES = [
    *(dataclasses.replace(FL, masks=masks, layers=2) for masks in MASKED),
    *(LayerCase((9, 4), layers=layers, dim=16, masks="partial") for layers in (1, 3, 4)),
    *(LayerCase((6, 3), heads=heads, dim=5 * heads, masks="partial") for heads in (3, 4, 5, 6, 7)),
    LayerCase((6, 3), heads=8, dim=8, masks="mixed"),
    LayerCase((4, 9), heads=1, dim=17, classes=1),
    LayerCase((3, 7, 2), dim=12, layers=2, masks="partial"),
    LayerCase((5, 1, 4, 2), dim=12, masks="mixed"),
    LayerCase((5, 2, 3, 1, 4), dim=16, heads=4, layers=2, masks="padded_modality"),
    LayerCase((1, 1), dim=12, batch=1),
    I2,
    LayerCase((1, 1), "i2moe", dim=12),
    LayerCase((5, 5), "i2moe", layers=3, dim=16),
    LayerCase((4, 4, 4), "i2moe", layers=4, dim=12, heads=3),
    LayerCase((3,) * 4, "i2moe", dim=20, heads=5, layers=2),
    LayerCase((2,) * 5, "i2moe", dim=16, heads=8),
]
LARGE = [
    LayerCase((63, 60), dim=40, heads=4, masks="partial"),
    LayerCase((320, 196), dim=16, heads=2, batch=1, masks="partial"),
]


def fast_layer(case: LayerCase, dtype: torch.dtype = torch.float32) -> InteractionMoE:
    return InteractionMoE.adopt(case.reference(dtype), backend="cpu")


def data(case: LayerCase, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Any, Any]:
    x = case.inputs(dtype)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    return x, masks, draw_replacements(x, case.experts)


@pytest.mark.parametrize("dtype", [*DTYPES[:2], *SLOW_DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: LayerCase, dtype: torch.dtype) -> None:
    assert_layer_within_budget(case, fast_layer(case, dtype), dtype)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_matches_the_reference_on_long_sequences(case: LayerCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_layer_within_budget(case, fast_layer(case, dtype), dtype)


@BOTH
def test_a_wrong_layer_fails(case: LayerCase) -> None:
    """The control: one parameter, one head more, or other weights, and the comparison fails."""
    for path in ("norm2.bias", "attn.kv.weight", "mlp.network.0.bias"):
        layer = fast_layer(case)
        parameter = layer.get_parameter(f"interaction_experts.1.fusion_model.network.0.{path}")
        with torch.no_grad():
            parameter.view(-1)[0] += 0.05
        with pytest.raises(AssertionError, match="above the budget"):
            assert_layer_within_budget(case, layer, torch.float32)
    other = InteractionMoE.adopt(dataclasses.replace(case, heads=4).reference())
    with pytest.raises(AssertionError, match="above the budget"):
        assert_layer_within_budget(case, other, torch.float32)


def test_wrong_masks_and_noise_fail() -> None:
    case = dataclasses.replace(FL, masks="partial")
    x, masks, noise = data(case)
    exact = case.reference().double()
    x64, noise64 = as_dtype(x, torch.float64), as_dtype(noise, torch.float64)
    oracle = named_outputs(exact, exact(x64, masks, replacements=noise64))
    low_layer = case.reference()
    low = named_outputs(low_layer, low_layer(x, masks, replacements=noise))
    layer = fast_layer(case)
    flipped = [masks[0].clone(), masks[1]]
    flipped[0][0, 0] = False
    wrong = {
        "no masks": layer(x, None, replacements=noise),
        "one token fewer": layer(x, flipped, replacements=noise),
        "noise of another expert": layer(x, masks, replacements=[*noise[1:], noise[0]]),
        "modalities swapped": layer(x[::-1], masks[::-1], replacements=[n[::-1] for n in noise]),
    }
    for reason, result in wrong.items():
        outputs = named_outputs(layer, result)
        assert_outside_budget(
            outputs["expert_latents"], low["expert_latents"], oracle["expert_latents"], reason
        )
        assert_outside_budget(outputs["losses"], low["losses"], oracle["losses"], reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sample_of_padding_alone(dtype: torch.dtype) -> None:
    """Latent 0 and finite gradients for it; the others are as in a batch without it."""
    case = LayerCase((6, 5), dim=16, batch=3, layers=2, masks="padded_sample")
    x, masks, noise = data(case, dtype)
    padded, others = case.batch // 2, [0, 2]
    outputs, grads = outputs_and_gradients(fast_layer(case, dtype), x, masks, noise)
    assert all(value.isfinite().all() for value in (*outputs.values(), *grads.values()))
    assert (outputs["expert_latents"][:, :, padded] == 0).all()
    assert all((grad[padded] == 0).all() for grad in (grads["inputs.0"], grads["inputs.1"]))

    def rest(tree: Any) -> Any:
        return tree[others] if isinstance(tree, Tensor) else [rest(each) for each in tree]

    layer = case.reference(dtype)
    low = named_outputs(layer, layer(rest(x), rest(masks), replacements=rest(noise)))
    wide = [as_dtype(rest(each), torch.float64) for each in (x, noise)]
    exact = case.reference(dtype).double()
    oracle = named_outputs(exact, exact(wide[0], rest(masks), replacements=wide[1]))
    for name in ("expert_latents", "expert_logits"):
        got = outputs[name][:, :, others]
        assert_within_budget(got, low[name], oracle[name], name)
        assert_outside_budget(outputs[name][:, :, :2], low[name], oracle[name], name)
    for name in ("weights", "logits"):
        assert_within_budget(outputs[name][others], low[name], oracle[name], name)


@BOTH
def test_inference_is_the_full_view(case: LayerCase) -> None:
    layer = fast_layer(dataclasses.replace(case, dropout=0.5)).eval()
    x = case.inputs()
    masks = draw_masks("partial", case.batch, case.lengths) if case.compat == "fl_i2moe" else None
    expert_logits, weights, logits = layer.inference(x, masks)
    outputs = named_outputs(layer, layer(x, masks))
    assert len(expert_logits) == case.experts
    torch.testing.assert_close(torch.stack(list(expert_logits)), outputs["expert_logits"][:, 0])
    torch.testing.assert_close(weights, outputs["weights"])
    torch.testing.assert_close(logits, outputs["logits"])
    reference = case.reference().eval()
    expected = reference.inference(x, masks)
    torch.testing.assert_close(logits, expected[2])
    torch.testing.assert_close(list(expert_logits), list(expected[0]))


@pytest.mark.parametrize("sparse", [False, True])
@BOTH
def test_shape_of_what_comes_back(case: LayerCase, sparse: bool) -> None:
    case = dataclasses.replace(case, sparse=sparse)
    x, masks, noise = data(case)
    results = [
        layer(x, masks, replacements=noise) for layer in (fast_layer(case), case.reference())
    ]

    def structure(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (tuple(value.shape), value.dtype)
        return [structure(each) for each in value]

    assert structure(results[0]) == structure(results[1])
    assert len(results[0]) == 4 + sparse + (case.compat == "fl_i2moe")
    if sparse:
        gates = results[0][4]
        assert len(gates) == case.experts
        assert all(gate == 0 for views in gates for gate in views)


@BOTH
def test_noise_and_dropout_follow_torchs_generator(case: LayerCase) -> None:
    layer = fast_layer(dataclasses.replace(case, dropout=0.5))
    x = case.inputs()

    def latents(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return named_outputs(layer, layer(x))["expert_logits"]

    first = latents(1)
    assert torch.equal(first, latents(1))
    assert not torch.equal(first, latents(2))
    layer.eval()
    state = torch.get_rng_state()
    full = latents(1)[:, 0]
    assert torch.equal(full, latents(2)[:, 0]), "in eval the full view is not random"
    assert not torch.equal(latents(1)[:, 1:], latents(2)[:, 1:]), "the noise is"
    torch.set_rng_state(state)
    layer.inference(x)
    assert torch.equal(torch.get_rng_state(), state), "inference in eval draws nothing"


def test_noise_is_fresh_per_expert_modality_and_sample() -> None:
    """Experts with equal parameters differ in their noise alone."""
    case = LayerCase((4, 4), dim=8, batch=2)
    layer = fast_layer(case)
    first = layer.interaction_experts[0]
    for expert in layer.interaction_experts:
        expert.load_state_dict(first.state_dict())
    x = [each[:1].expand(2, -1, -1) for each in case.inputs()]
    latents = named_outputs(layer, layer(x))["expert_latents"]
    assert (latents[:, 0] == latents[0, 0, 0]).all()
    noisy = latents[:, 1:].flatten(0, 2)
    assert len({tuple(row.tolist()) for row in noisy}) == len(noisy)


@BOTH
def test_checkpoints_load_both_ways(case: LayerCase) -> None:
    x, masks, noise = data(case)
    reference, layer = case.reference().eval(), fast_layer(case).eval()
    assert list(reference.state_dict()) == list(layer.state_dict())
    fresh_reference = dataclasses.replace(case).reference()
    fusion = case.reference().interaction_experts[0].fusion_model
    fresh = InteractionMoE(len(case.lengths), fusion, False, case.dim, 2 * case.dim, 3, 1.5).eval()
    with torch.no_grad():
        for parameter in (*fresh.parameters(), *fresh_reference.parameters()):
            parameter.fill_(float("nan"))
    buffer = io.BytesIO()
    torch.save(reference.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    fresh_reference.load_state_dict(layer.state_dict(), strict=True)
    want = layer(x, masks, replacements=noise)[2]
    assert torch.equal(fresh(x, masks, replacements=noise)[2], want)
    got = fresh_reference.eval()(x, masks, replacements=noise)[2]
    assert torch.equal(got, reference(x, masks, replacements=noise)[2])
    state = reference.state_dict()
    state["reweight.unknown"] = state.pop("reweight.mlp.network.0.bias")
    with pytest.raises(RuntimeError, match=r"reweight\.mlp\.network\.0\.bias[\s\S]*unknown"):
        fresh.load_state_dict(state)


@BOTH
def test_adopt_shares_parameters(case: LayerCase) -> None:
    reference = dataclasses.replace(case, dropout=0.25).reference().eval()
    layer = InteractionMoE.adopt(reference)
    theirs, ours = dict(reference.named_parameters()), dict(layer.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    assert not layer.training
    assert {rate for rates in layer.spec.dropout for rate in dataclasses.astuple(rates)} == {0.25}
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    before = layer(case.inputs())[2]
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(layer.inference(case.inputs())[2], before)


def test_backends_of_the_layer() -> None:
    case = FL
    x, masks, noise = data(case)
    expected = case.reference()(x, masks, replacements=noise)[2]
    layer = InteractionMoE.adopt(case.reference())
    with use_backend("reference"):
        assert torch.equal(layer(x, masks, replacements=noise)[2], expected)
    chosen = InteractionMoE.adopt(case.reference(), backend="reference")
    assert torch.equal(chosen(x, masks, replacements=noise)[2], expected)
    assert torch.equal(chosen.inference(x)[2], case.reference().inference(x)[2])
    assert isinstance(layer, ReferenceInteractionMoE)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_parameters_type(case: LayerCase, dtype: torch.dtype) -> None:
    layer = fast_layer(case)
    x, masks, noise = data(case, dtype)
    wide = as_dtype(x, torch.float32), as_dtype(noise, torch.float32)
    expected = layer(wide[0], masks, replacements=wide[1])
    with torch.autocast("cpu", dtype=dtype):
        leaves = [each.requires_grad_() for each in x]
        result = layer(leaves, masks, replacements=wide[1])
        inferred = layer.inference(leaves, masks)
    result[2].sum().backward()
    assert result[2].dtype == torch.float32
    assert torch.equal(result[2], expected[2])
    torch.testing.assert_close(inferred[2], expected[2])
    assert all(each.grad is not None and each.grad.dtype == dtype for each in leaves)
    first = next(layer.parameters())
    assert first.grad is not None
    assert first.grad.dtype == torch.float32


@BOTH
def test_copies_and_pickles(case: LayerCase) -> None:
    layer = fast_layer(case).eval()
    x, masks, noise = data(case)
    expected = layer(x, masks, replacements=noise)[2]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.training
        assert torch.equal(other(x, masks, replacements=noise)[2], expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert torch.equal(layer(x, masks, replacements=noise)[2], expected)


@BOTH
def test_an_empty_batch(case: LayerCase) -> None:
    empty = dataclasses.replace(case, batch=0)
    layer = fast_layer(empty)
    x = [each.requires_grad_() for each in empty.inputs()]
    result = layer(x)
    assert result[2].shape == (0, case.classes)
    assert layer.inference(x)[2].shape == (0, case.classes)
    result[2].sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in layer.parameters())


@BOTH
def test_frozen_parameters(case: LayerCase) -> None:
    x, masks, noise = data(case)
    whole, partial = fast_layer(case), fast_layer(case)
    frozen = [name for name, _ in partial.named_parameters() if "network.0" in name or "fc" in name]
    for name in frozen:
        partial.get_parameter(name).requires_grad_(False)
    _, expected = outputs_and_gradients(whole, x, masks, noise)
    _, found = outputs_and_gradients(partial, x, masks, noise)
    assert found.keys() == expected.keys() - set(frozen)
    assert frozen
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())
    for parameter in partial.parameters():
        parameter.requires_grad_(False)
    assert not partial([each.detach() for each in x])[2].requires_grad


def test_no_gradient_is_asked_for_under_no_grad() -> None:
    layer, x = fast_layer(FL), FL.inputs()
    with torch.no_grad():
        assert not layer(x)[2].requires_grad
    with torch.inference_mode():
        assert torch.equal(layer.inference(x)[2], layer.inference(x)[2])


def test_hooks_on_the_layer_fire() -> None:
    layer, seen = fast_layer(FL), []
    layer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    layer.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    layer(FL.inputs())
    assert seen == [1, 5]


def test_a_parameter_shared_by_experts_adds_up_its_gradients() -> None:
    layer, reference = fast_layer(FL, torch.float64), FL.reference(torch.float64)
    for each in (layer, reference):
        heads = [expert.fusion_model.network[-1] for expert in each.interaction_experts]
        for head in heads[1:]:
            head.fc = heads[0].fc
        assert isinstance(heads[1].fc, nn.Linear)
    x, masks, noise = data(FL, torch.float64)
    name = "interaction_experts.0.fusion_model.network.1.fc.weight"
    found, expected = (
        outputs_and_gradients(m, x, masks, noise)[1][name] for m in (layer, reference)
    )
    torch.testing.assert_close(found, expected)
