"""Tests of the fast layer against the reference: outputs, losses, gradients, masks, module methods."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import InteractionMoE
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from tests.support.inputs import as_dtype, draw_masks
from tests.support.layers import (
    FL,
    I2,
    SPARSE_FL,
    SPARSE_I2,
    LayerCase,
    assert_all_within_budget,
    assert_layer_within_budget,
    data,
    fast_layer,
    gates_of,
    named_outputs,
    outputs_and_gradients,
)
from tests.support.routed_layers import GATES

HALF = (torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("case", [FL, I2], ids=["fl_i2moe", "i2moe"])
EVERY = pytest.mark.parametrize("case", [FL, I2, SPARSE_FL, SPARSE_I2], ids=str)

MASKED = ("all_none", "all_valid", "partial", "padded_modality", "mixed", "numbers")
CASES = [
    *(dataclasses.replace(FL, masks=masks, layers=2) for masks in MASKED),
    *(LayerCase((9, 4), layers=layers, dim=16, masks="partial") for layers in (1, 4)),
    *(LayerCase((6, 3), heads=heads, dim=5 * heads, masks="partial") for heads in (3, 7)),
    LayerCase((6, 3), heads=8, dim=8, masks="mixed"),
    LayerCase((4, 9), heads=1, dim=17, classes=1),
    LayerCase((3, 7, 2), dim=12, layers=2, masks="partial"),
    LayerCase((5, 1, 4, 2), dim=12, masks="mixed"),
    LayerCase((5, 2, 3, 1, 4), dim=16, heads=4, layers=2, masks="padded_modality"),
    LayerCase((1, 1), dim=12, batch=1),
    I2,
    LayerCase((1, 1), "i2moe", dim=12),
    # The losses of two samples are four numbers, whose errors in half precision are chance: more samples.
    LayerCase((5, 5), "i2moe", batch=8, layers=3, dim=16),
    LayerCase((4, 4, 4), "i2moe", layers=2, dim=12, masks="padded_modality"),
    LayerCase((4, 4), "i2moe", layers=2, dim=12, masks="partial"),
    LayerCase((2,) * 5, "i2moe", dim=16, heads=8),
]
LARGE = [
    LayerCase((63, 60), dim=40, heads=4, masks="partial"),
    LayerCase((320, 196), dim=16, heads=2, batch=1, masks="partial"),
]


SPARSE = [
    *(dataclasses.replace(SPARSE_FL, gate=gate, masks="partial") for gate in GATES),
    *(dataclasses.replace(SPARSE_I2, gate=gate) for gate in GATES),
    *(dataclasses.replace(SPARSE_FL, masks=masks) for masks in ("none", "padded_modality")),
    *(
        dataclasses.replace(SPARSE_FL, gate=gate, capacity=0.4, masks="mixed")
        for gate in GATES[1:3]
    ),
    dataclasses.replace(SPARSE_I2, capacity=0.4),
    LayerCase((4, 7, 3), dim=12, layers=2, sparse=True, gate="SwitchGate", masks="partial"),
    LayerCase((4, 4, 4), "i2moe", dim=12, sparse=True, gate="NaiveGate", mlp_experts=5, top_k=3),
    dataclasses.replace(SPARSE_FL, gate="NoisyGate", routers=2, mlp_experts=3, masks="partial"),
    LayerCase((5, 1, 4, 2), dim=12, sparse=True, gate="GShardGate", mlp_experts=7, masks="mixed"),
    LayerCase((1, 1), dim=12, batch=1, sparse=True, gate="NaiveGate", mlp_experts=1, top_k=1),
]
# As many choices as experts: rows that rounding sends to another expert cannot be compared.
ALL_CHOSEN = dataclasses.replace(SPARSE_FL, gate="NaiveGate", mlp_experts=2, masks="partial")
# Those in bfloat16 that are not slow: masks, an odd number of heads, learned positions.
QUICK = (CASES[2], CASES[4], CASES[9], CASES[-2])
CALLS = [
    *((case, torch.float32, True) for case in (*CASES, *LARGE, *SPARSE)),
    *((case, torch.bfloat16, True) for case in QUICK),
    *(
        pytest.param(case, dtype, True, marks=pytest.mark.slow)
        for case in CASES
        for dtype in (torch.float64, *HALF)
        if dtype != torch.bfloat16 or case not in QUICK
    ),
    *((case, torch.float64, True) for case in SPARSE[:2]),
    *((ALL_CHOSEN, dtype, True) for dtype in HALF),
    (SPARSE_FL, torch.float32, False),
]


@pytest.mark.parametrize(("case", "dtype", "training"), CALLS, ids=str)
def test_matches_the_reference(case: LayerCase, dtype: torch.dtype, training: bool) -> None:
    layer = fast_layer(case, dtype)
    assert_layer_within_budget(case, layer if training else layer.eval(), dtype)


@pytest.mark.parametrize(
    ("case", "path"),
    [(FL, "attn.kv.weight"), (I2, "norm2.bias"), (SPARSE_FL, "mlp.gate.gate.bias")],
    ids=str,
)
def test_a_wrong_parameter_fails(case: LayerCase, path: str) -> None:
    """The control."""
    layer = fast_layer(case)
    parameter = layer.get_parameter(f"interaction_experts.1.fusion_model.network.0.{path}")
    with torch.no_grad():
        parameter.view(-1)[0] += 0.05
    with pytest.raises(AssertionError, match="above the budget"):
        assert_layer_within_budget(case, layer, torch.float32)


PADDED = LayerCase((6, 5), dim=16, batch=3, layers=2, masks="padded_sample")
PADDED_SPARSE = [
    dataclasses.replace(SPARSE_FL, gate=gate, capacity=0.6, masks="padded_sample")
    for gate in ("GShardGate", "NoisyGate")
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((PADDED, dtype) for dtype in (torch.float32, torch.bfloat16)),
        *((case, torch.float32) for case in PADDED_SPARSE),
    ],
    ids=str,
)
def test_a_sample_of_padding_alone(case: LayerCase, dtype: torch.dtype) -> None:
    """It has latent 0, finite gradients and no part in gate losses; other samples agree with the reference."""
    x, masks, noise = data(case, dtype)
    layer = fast_layer(case, dtype)
    padded, others = case.batch // 2, [0, 2]
    outputs, grads = outputs_and_gradients(layer, x, masks, noise)
    assert all(value.isfinite().all() for value in (*outputs.values(), *grads.values()))
    assert (outputs["expert_latents"][:, :, padded] == 0).all()
    assert all((grad[padded] == 0).all() for grad in (grads["inputs.0"], grads["inputs.1"]))
    low_layer = case.reference(dtype).train(layer.training)
    low = named_outputs(low_layer(x, masks, replacements=noise))
    exact = case.reference(dtype).double().train(layer.training)
    wide = [as_dtype(each, torch.float64) for each in (x, noise)]
    oracle = named_outputs(exact(wide[0], masks, replacements=wide[1]))
    for name in ("expert_latents", "expert_logits"):
        found = [each[name][:, :, others] for each in (outputs, low, oracle)]
        assert_within_budget(*found, name)
        assert_outside_budget(outputs[name][:, :, :2], *found[1:], name)
    for name in ("weights", "logits"):
        assert_within_budget(*(each[name][others] for each in (outputs, low, oracle)), name)
    if case.gate is not None:
        assert_within_budget(*(each["gate_losses"] for each in (outputs, low, oracle)), case.gate)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@EVERY
def test_inference_is_the_full_view(case: LayerCase, backend: str) -> None:
    layer = fast_layer(dataclasses.replace(case, dropout=0.5)).eval()
    layer.backend = backend
    x = case.inputs()
    masks = draw_masks("partial", case.batch, case.lengths) if case.compat == "fl_i2moe" else None
    expert_logits, weights, logits = layer.inference(x, masks)
    outputs = named_outputs(layer(x, masks))
    assert len(expert_logits) == case.experts
    torch.testing.assert_close(torch.stack(list(expert_logits)), outputs["expert_logits"][:, 0])
    torch.testing.assert_close((weights, logits), (outputs["weights"], outputs["logits"]))
    expected = case.reference().eval().inference(x, masks)
    torch.testing.assert_close(logits, expected[2])
    torch.testing.assert_close(list(expert_logits), list(expected[0]))


@EVERY
def test_noise_and_dropout_follow_torchs_generator(case: LayerCase) -> None:
    layer = fast_layer(dataclasses.replace(case, dropout=0.5))
    x = case.inputs()

    def latents(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return named_outputs(layer(x))["expert_logits"]

    first = latents(1)
    assert torch.equal(first, latents(1))
    assert not torch.equal(first, latents(2))
    layer.eval()
    state = torch.get_rng_state()
    full = latents(1)[:, 0]
    assert torch.equal(full, latents(2)[:, 0]), "in eval mode the full view is not random"
    assert not torch.equal(latents(1)[:, 1:], latents(2)[:, 1:]), "the noise is random"
    torch.set_rng_state(state)
    layer.inference(x)
    assert torch.equal(torch.get_rng_state(), state), "inference in eval mode draws nothing"


def test_noise_is_fresh_per_expert_modality_and_sample() -> None:
    """Experts with equal parameters differ only by their noise."""
    case = LayerCase((4, 4), dim=8, batch=2)
    layer = fast_layer(case)
    first = layer.interaction_experts[0]
    for expert in layer.interaction_experts:
        expert.load_state_dict(first.state_dict())
    x = [each[:1].expand(2, -1, -1) for each in case.inputs()]
    latents = named_outputs(layer(x))["expert_latents"]
    assert (latents[:, 0] == latents[0, 0, 0]).all()
    noisy = latents[:, 1:].flatten(0, 2)
    assert len({tuple(row.tolist()) for row in noisy}) == len(noisy)


STORED = [
    *(FL, I2, dataclasses.replace(SPARSE_I2, gate="SwitchGate", routers=2)),
    *(dataclasses.replace(SPARSE_FL, gate=gate, routers=2) for gate in ("NoisyGate", "GShardGate")),
]


@pytest.mark.parametrize("case", STORED, ids=str)
def test_checkpoints_load_both_ways(case: LayerCase) -> None:
    x, masks, noise = data(case)
    reference, layer = case.reference().eval(), fast_layer(case).eval()
    assert list(reference.state_dict()) == list(layer.state_dict())
    fresh_reference = case.reference()
    fusion = fresh_reference.interaction_experts[0].fusion_model
    sizes = (case.dim, 2 * case.dim, 3, 1.5)
    fresh = InteractionMoE(len(case.lengths), fusion, case.sparse, *sizes).eval()
    shapes = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert shapes == fresh.spec.parameter_shapes()
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
    torch.testing.assert_close(got, want)
    state = reference.state_dict()
    state["reweight.unknown"] = state.pop("reweight.mlp.network.0.bias")
    lost = "reweight.mlp.network.0.bias"
    if case.gate is not None:
        mlp = "interaction_experts.0.fusion_model.network.0.mlp."
        name = "gate.w_gate" if case.gate == "NoisyGate" else "gate.gate.weight"
        first = fresh.get_parameter(mlp + name)
        assert fresh.get_parameter(mlp + name.replace("gate.", "all_gates.0.", 1)) is first
        lost = mlp + "experts.h4toh.bias"
        del state[lost]
    with pytest.raises(RuntimeError, match=rf"(?s){lost}.*reweight.unknown"):
        fresh.load_state_dict(state)


@EVERY
def test_adopt_shares_parameters(case: LayerCase) -> None:
    reference = dataclasses.replace(case, dropout=0.25).reference().eval()
    layer = InteractionMoE.adopt(reference)
    theirs, ours = dict(reference.named_parameters()), dict(layer.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    assert not layer.training
    rates = {rate for rates in layer.spec.dropout for rate in dataclasses.astuple(rates)}
    assert rates == ({0.25} if case.gate is None else {0.25, 0.0}), "routed MLPs have no dropout"
    assert {gate.capacity for gate in gates_of(layer)} == ({(1.2, 2.4)} if case.gate else set())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    before = layer(case.inputs())[2]
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(layer.inference(case.inputs())[2], before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(case: LayerCase, dtype: torch.dtype) -> None:
    """Parameters, logits, weights, latents and losses stay float32; the kernels' rows have the low precision."""
    layer = InteractionMoE.adopt(case.reference(dtype).float(), backend="cpu")
    x, masks, noise = data(case, dtype)
    with torch.autocast("cpu", dtype=dtype):
        results = outputs_and_gradients(layer, x, masks, noise)
        inferred = layer.inference(x, masks)[2]
    torch.testing.assert_close(inferred, results[0]["logits"])
    assert {value.dtype for value in results[0].values()} == {torch.float32}
    for name, gradient in results[1].items():
        low = name.startswith(("inputs", "replacements"))
        assert gradient.dtype == (dtype if low else torch.float32), name
    # torch.autocast converted some results to float32.
    found = [{name: value.to(dtype) for name, value in {**results[0], **results[1]}.items()}]
    for each in (dtype, torch.float64):
        reference = case.reference(dtype).to(each)
        pair = outputs_and_gradients(reference, as_dtype(x, each), masks, as_dtype(noise, each))
        found.append({**pair[0], **pair[1]})
    assert_all_within_budget(*found, f"of {case} in {dtype}")
    if case.compat == "fl_i2moe":  # the other variant returns no latents
        latents = results[0]["latents"]
        assert torch.equal(latents, latents.to(dtype).float()), "the rows had another precision"


def test_float64_stays_under_autocast() -> None:
    layer, x = fast_layer(FL, torch.float64), FL.inputs(torch.float64)
    expected = layer.inference(x)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.inference(x)[2], expected)


@pytest.mark.parametrize("case", [FL, SPARSE_FL], ids=str)
def test_copies_and_pickles(case: LayerCase) -> None:
    layer = fast_layer(case).eval()
    x, masks, noise = data(case)
    expected = layer(x, masks, replacements=noise)[2]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.training
        assert torch.equal(other(x, masks, replacements=noise)[2], expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}
        mlps = [part for part in other.modules() if isinstance(part, RoutedMLP)]
        assert all(part.gate is part.all_gates["0"] for part in mlps)
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert torch.equal(layer(x, masks, replacements=noise)[2], expected)


@EVERY
def test_an_empty_batch(case: LayerCase) -> None:
    empty = dataclasses.replace(case, batch=0)
    layer = fast_layer(empty)
    x = [each.requires_grad_() for each in empty.inputs()]
    result = layer(x)
    assert result[2].shape == (0, case.classes)
    assert layer.inference(x)[2].shape == (0, case.classes)
    if case.gate is not None:
        assert named_outputs(result)["gate_losses"].isfinite().all()
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


def test_gradients_of_a_parameter_shared_by_experts_are_summed() -> None:
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
