"""The layer with routed MLPs inside, against the reference: outputs, gate losses, gradients, a module's life."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer, InteractionMoE
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.gates import GShardGate
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from tests.support.inputs import as_dtype, draw_masks, draw_replacements, gradients
from tests.support.layers import (
    LayerCase,
    assert_layer_within_budget,
    named_outputs,
    outputs_and_gradients,
)

GATES = ("NaiveGate", "GShardGate", "SwitchGate", "NoisyGate")
# In training these draw random numbers, so that only eval mode can be compared.
RANDOM = ("SwitchGate", "NoisyGate")
FL = LayerCase((7, 5), dim=16, batch=3, layers=3, sparse=True, gate="GShardGate")
I2 = LayerCase((6, 6), "i2moe", dim=16, batch=3, sparse=True, gate="GShardGate")
BOTH = pytest.mark.parametrize("case", [FL, I2], ids=["fl_i2moe", "i2moe"])

CASES = [
    *(dataclasses.replace(FL, gate=gate, masks="partial") for gate in GATES),
    *(dataclasses.replace(I2, gate=gate) for gate in GATES),
    *(dataclasses.replace(FL, masks=masks) for masks in ("none", "padded_modality", "numbers")),
    *(dataclasses.replace(FL, gate=gate, capacity=0.4, masks="mixed") for gate in GATES[1:3]),
    dataclasses.replace(I2, capacity=0.4),
    LayerCase((4, 7, 3), dim=12, layers=2, sparse=True, gate="SwitchGate", masks="partial"),
    LayerCase((4, 4, 4), "i2moe", dim=12, sparse=True, gate="NaiveGate", mlp_experts=5, top_k=3),
    dataclasses.replace(FL, gate="NoisyGate", routers=2, mlp_experts=3, masks="partial"),
    LayerCase((5, 1, 4, 2), dim=12, sparse=True, gate="GShardGate", mlp_experts=7, masks="mixed"),
    LayerCase((1, 1), dim=12, batch=1, sparse=True, gate="NaiveGate", mlp_experts=1, top_k=1),
]


def fast_layer(case: LayerCase, dtype: torch.dtype = torch.float32) -> InteractionMoE:
    layer = InteractionMoE.adopt(case.reference(dtype), backend="cpu")
    return layer.train(case.gate not in RANDOM)


def data(case: LayerCase, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Any, Any]:
    x = case.inputs(dtype)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    return x, masks, draw_replacements(x, case.experts)


def gates_of(layer: nn.Module) -> list[Any]:
    return [part.gate for part in layer.modules() if isinstance(part, RoutedMLP)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: LayerCase) -> None:
    assert_layer_within_budget(case, fast_layer(case), torch.float32)


@pytest.mark.parametrize("case", [*CASES[:4], *CASES[11:14]], ids=str)
def test_matches_the_reference_in_float64(case: LayerCase) -> None:
    assert_layer_within_budget(case, fast_layer(case, torch.float64), torch.float64)


@pytest.mark.parametrize("case", [CASES[0], FL], ids=str)
def test_matches_the_reference_in_eval_mode(case: LayerCase) -> None:
    assert_layer_within_budget(case, fast_layer(case).eval(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference_in_half_precision(dtype: torch.dtype) -> None:
    """With as many choices as experts: whom rounding would send elsewhere cannot be compared."""
    case = dataclasses.replace(FL, gate="NaiveGate", mlp_experts=2, masks="partial")
    assert_layer_within_budget(case, fast_layer(case, dtype), dtype)


def test_drops_are_seen() -> None:
    """The control of the cases with a capacity: it takes part in the result, and so does the padding."""
    case = dataclasses.replace(FL, capacity=0.4, masks="partial")
    free, free64 = (
        dataclasses.replace(case, capacity=None).reference(dtype)
        for dtype in (torch.float32, torch.float64)
    )
    x, masks, noise = data(case)
    x64, noise64 = as_dtype(x, torch.float64), as_dtype(noise, torch.float64)
    low = named_outputs(free, free(x, masks, replacements=noise))
    oracle = named_outputs(free64, free64(x64, masks, replacements=noise64))
    found = fast_layer(case)(x, masks, replacements=noise)
    other = fast_layer(dataclasses.replace(case, capacity=None))
    unmasked = named_outputs(other, other(x, None, replacements=noise))
    for name in ("expert_latents", "gate_losses"):
        limited = named_outputs(other, found)[name]
        assert_outside_budget(limited, low[name], oracle[name], name)
        assert_outside_budget(unmasked[name], low[name], oracle[name], name)


@pytest.mark.parametrize("path", ["gate.gate.bias", "experts.htoh4.bias", "experts.h4toh.weight"])
def test_a_wrong_layer_fails(path: str) -> None:
    layer = fast_layer(FL)
    parameter = layer.get_parameter(f"interaction_experts.1.fusion_model.network.0.mlp.{path}")
    with torch.no_grad():
        parameter.view(-1)[0] += 0.05
    with pytest.raises(AssertionError, match="above the budget"):
        assert_layer_within_budget(FL, layer, torch.float32)


@pytest.mark.parametrize("gate", GATES)
def test_a_sample_of_padding_alone(gate: str) -> None:
    """It has no part in gate losses or capacities; the other samples and all losses are the reference's."""
    case = dataclasses.replace(FL, gate=gate, capacity=0.6, masks="padded_sample")
    x, masks, noise = data(case)
    layer = fast_layer(case)
    outputs, grads = outputs_and_gradients(layer, x, masks, noise)
    assert all(value.isfinite().all() for value in (*outputs.values(), *grads.values()))
    low_layer, exact = (
        case.reference(dtype).train(layer.training) for dtype in (torch.float32, torch.float64)
    )
    low = named_outputs(low_layer, low_layer(x, masks, replacements=noise))
    wide = [as_dtype(each, torch.float64) for each in (x, noise)]
    oracle = named_outputs(exact, exact(wide[0], masks, replacements=wide[1]))
    assert_within_budget(outputs["gate_losses"], low["gate_losses"], oracle["gate_losses"], gate)
    others = [b for b in range(case.batch) if b != case.batch // 2]
    for name in ("expert_latents", "expert_logits"):
        found = [each[name][:, :, others] for each in (outputs, low, oracle)]
        assert_within_budget(*found, name)


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("fast", [True, False])
def test_every_modality_has_a_part_in_the_gate_losses(gate: str, fast: bool) -> None:
    """Of the loss and of its gradient at the gates' weights, which are no longer zero without any one of them."""
    case = dataclasses.replace(FL, gate=gate, masks="all_valid")
    layer = (fast_layer(case) if fast else case.reference()).eval()
    x, full, noise = data(case)
    weight = [next(gate.parameters()) for gate in gates_of(layer)]

    def losses(masks: Any) -> tuple[Tensor, list[Tensor]]:
        found = named_outputs(layer, layer(x, masks, replacements=noise))["gate_losses"]
        return found.detach(), gradients([found], weight)

    whole, whole_grads = losses(full)
    assert (whole > 0).all()
    assert all(grad.abs().max() > 1e-4 for grad in whole_grads)
    for m in range(len(case.lengths)):
        without = [torch.zeros_like(mask) if n == m else mask for n, mask in enumerate(full)]
        part, part_grads = losses(without)
        assert ((part - whole).abs() > 1e-3).all()
        for grad, without_it in zip(whole_grads, part_grads, strict=True):
            assert (grad - without_it).abs().max() > 1e-4
            assert without_it.abs().max() > 1e-4


@pytest.mark.parametrize("mode", [True, False])
@BOTH
def test_gate_losses_are_sums_over_layers_and_modalities(case: LayerCase, mode: bool) -> None:
    """Of what the gates say of each call on its own, with a mask or without, whether gradients are kept or not."""
    case = dataclasses.replace(case, masks="none" if case is I2 else "partial")
    reference, calls = case.reference().train(mode), []
    for e, expert in enumerate(reference.interaction_experts):
        for part in expert.modules():
            if isinstance(part, RoutedMLP):
                part.register_forward_pre_hook(lambda mlp, args, e=e: calls.append((e, mlp, args)))
    x, masks, noise = data(case)
    result = reference(x, masks, replacements=noise)
    views, per_view = len(x) + 1, len(x) * ((case.layers + 1) // 2)
    assert len(calls) == case.experts * views * per_view
    expected = torch.zeros(case.experts, views)
    for number, (e, mlp, (tokens, *mask)) in enumerate(calls):
        flat = tokens.detach().flatten(0, 1)
        valid = mask[0].flatten() if mask and mask[0] is not None else None
        loss = mlp.gate.route(flat, valid, len(flat))[2]
        expected[e, number // per_view % views] += loss.detach()
    assert (expected > 0.9 * per_view).all()
    layer = fast_layer(case).train(mode)
    with torch.no_grad():
        for found in (
            result,
            layer(x, masks, replacements=noise),
            case.reference().train(mode)(x, masks, replacements=noise),
        ):
            losses = named_outputs(layer, found)["gate_losses"].detach()
            torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("gate", RANDOM)
def test_random_draws_in_training(gate: str) -> None:
    """They follow torch's generator; equal to the reference's in distribution: means within five deviations."""
    case = dataclasses.replace(FL, gate=gate, layers=1, batch=2, mlp_experts=3)
    x, masks, noise = data(case)
    layers = [fast_layer(case).train(), case.reference().train()]

    def losses(layer: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return named_outputs(layer, layer(x, masks, replacements=noise))["gate_losses"]

    first = losses(layers[0], 1)
    assert torch.equal(first, losses(layers[0], 1))
    assert not torch.equal(first, losses(layers[0], 2))
    drawn = [torch.stack([losses(layer, seed) for seed in range(40)]) for layer in layers]
    means, spreads = ([f(d, 0) for d in drawn] for f in (torch.mean, torch.std))
    deviation = ((spreads[0].square() + spreads[1].square()) / 40).sqrt()
    assert ((means[0] - means[1]).abs() <= 5 * deviation + 1e-6).all()
    assert (spreads[0] > 0).any()


@BOTH
def test_nothing_gathers_when_nobody_takes_the_losses(case: LayerCase) -> None:
    case = dataclasses.replace(case, sparse=False)
    for layer in (fast_layer(case), case.reference()):
        x, masks, noise = data(case)
        assert len(layer(x, masks, replacements=noise)) == 4 + (case.compat == "fl_i2moe")
        layer.inference(x, masks)
        assert all(gate.get_loss() is None for gate in gates_of(layer))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@BOTH
def test_inference_is_the_full_view(case: LayerCase, backend: str) -> None:
    layer = fast_layer(dataclasses.replace(case, dropout=0.5)).eval()
    layer.backend = backend
    x, masks, noise = data(case)
    outputs = named_outputs(layer, layer(x, masks, replacements=noise))
    expert_logits, weights, logits = layer.inference(x, masks)
    torch.testing.assert_close(torch.stack(list(expert_logits)), outputs["expert_logits"][:, 0])
    torch.testing.assert_close((weights, logits), (outputs["weights"], outputs["logits"]))


@BOTH
def test_dropout_after_the_routed_mlp_and_noise(case: LayerCase) -> None:
    layer, x = fast_layer(dataclasses.replace(case, dropout=0.5)), case.inputs()

    def latents(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return named_outputs(layer, layer(x))["expert_logits"]

    assert torch.equal(latents(1), latents(1))
    assert not torch.equal(latents(1)[:, 0], latents(2)[:, 0])


@pytest.mark.parametrize(
    "case",
    [
        LayerCase((150, 70), dim=48, heads=4, batch=3, dropout=0.5, masks="partial"),
        LayerCase((40, 40), "i2moe", dim=48, heads=4, batch=3, dropout=0.5),
    ],
    ids=str,
)
def test_the_same_bits_for_any_number_of_threads(case: LayerCase) -> None:
    case = dataclasses.replace(case, sparse=True, gate="GShardGate", capacity=0.6)
    layer, (x, masks, _) = fast_layer(case), data(case)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(11)
            outputs, grads = outputs_and_gradients(layer, x, masks, None)
            found.append({**outputs, **grads})
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break() -> None:
    """With masks this is the plan whose shapes do not depend on data, padded rows included."""
    case = dataclasses.replace(FL, layers=1, masks="padded_sample", capacity=0.5)
    layer, (x, masks, noise) = fast_layer(case), data(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        leaves = [each.requires_grad_() for each in x]
        outputs = named_outputs(layer, function(leaves, masks, replacements=noise))
        wanted = [out for name, out in outputs.items() if name != "latents"]
        grads = gradients(wanted, [*leaves, *layer.parameters()])
        results.append([*outputs.values(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "gate"), [(FL, "NoisyGate"), (FL, "GShardGate"), (I2, "SwitchGate")]
)
def test_checkpoints_load_both_ways(case: LayerCase, gate: str) -> None:
    case = dataclasses.replace(case, gate=gate, routers=2)
    reference, (x, masks, noise) = case.reference().eval(), data(case)
    fusion = reference.interaction_experts[0].fusion_model
    fresh = InteractionMoE(2, fusion, True, case.dim, 2 * case.dim, 3, 1.5).eval()
    assert list(fresh.state_dict()) == list(reference.state_dict())
    assert {k: tuple(v.shape) for k, v in reference.state_dict().items()} == (
        fresh.spec.parameter_shapes()
    )
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
    fresh.load_state_dict(reference.state_dict(), strict=True)
    found, expected = (layer(x, masks, replacements=noise)[2] for layer in (fresh, reference))
    torch.testing.assert_close(found, expected)
    other = case.reference()
    other.load_state_dict(fresh.state_dict(), strict=True)
    mlp = "interaction_experts.0.fusion_model.network.0.mlp."
    name = "gate.w_gate" if gate == "NoisyGate" else "gate.gate.weight"
    first = fresh.get_parameter(mlp + name)
    assert fresh.get_parameter(mlp + name.replace("gate.", "all_gates.0.", 1)) is first
    state = fresh.state_dict()
    state[mlp + "surplus"] = state.pop(mlp + "experts.h4toh.bias")
    with pytest.raises(RuntimeError, match=r"(?s)experts\.h4toh\.bias.*surplus"):
        other.load_state_dict(state)


def test_adopts_copies_and_pickles() -> None:
    reference, (x, masks, noise) = FL.reference().eval(), data(FL)
    layer = InteractionMoE.adopt(reference)
    theirs, ours = (dict(each.named_parameters()) for each in (reference, layer))
    assert theirs.keys() == ours.keys()
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    assert {gate.capacity for gate in gates_of(layer)} == {(1.2, 2.4)}
    expected = layer(x, masks, replacements=noise)[2]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, masks, replacements=noise)[2], expected)
        assert all(
            part.gate is part.all_gates["0"]
            for part in other.modules()
            if isinstance(part, RoutedMLP)
        )


def test_an_empty_batch() -> None:
    case = dataclasses.replace(FL, batch=0)
    layer = fast_layer(case)
    result = layer(case.inputs())
    assert result[2].shape == (0, case.classes)
    assert named_outputs(layer, result)["gate_losses"].isfinite().all()
    result[2].sum().backward()


class OtherGate(GShardGate):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gate: gate.register_forward_hook(print), "GShardGate: carries a hook"),
        (lambda gate: setattr(gate, "__class__", OtherGate), "OtherGate: put into the layer after"),
    ],
)
def test_gates_changed_after_construction_are_refused(change: Any, reason: str) -> None:
    layer = fast_layer(FL)
    change(gates_of(layer)[1])
    with pytest.raises(UnsupportedLayer, match=reason):
        layer(FL.inputs())


def test_fusion_alone() -> None:
    fusion = FusionTransformer(
        2, 16, 3, 4, mlp_sparse=True, num_experts=3, top_k=2, gate="SwitchGate", num_routers=2
    )
    assert [isinstance(layer.mlp, RoutedMLP) for layer in fusion.network[:-1]] == [
        True,
        False,
        True,
        False,
    ]
    assert {gate.top_k for gate in gates_of(fusion)} == {1}
    fusion(FL.inputs())
    loss = fusion.gate_loss()
    loss.backward()
    assert loss > 0
    assert fusion.gate_loss() == 0
    assert FusionTransformer(2, 16, 3).gate_loss() == 0
    with pytest.raises(ValueError, match="num_experts: mlp_sparse=True expected at least 1"):
        FusionTransformer(2, 16, 3, mlp_sparse=True)
    with pytest.raises(ValueError, match="gate: expected one of"):
        FusionTransformer(2, 16, 3, mlp_sparse=True, num_experts=2, gate="TopGate")
