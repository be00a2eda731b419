"""Tests of RoutedMLP: results, and compatibility with the published module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import BackendUnavailable, RoutedMLP
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.routed_mlp.gates import GShardGate, NoisyGate
from flmoe_kernels.layers.routed_mlp.structure import activation_name
from flmoe_kernels.ops.routed_mlp import reference
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from tests.support import lineage_sparse as lineage
from tests.support.inputs import draw
from tests.support.routed_layers import GATES, D, E, F, every_gate, make


def expected_output(mlp: RoutedMLP, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Result of the reference in dtype, with the choices and weights of the last call."""
    index, weight = mlp.last_topk_indices, mlp.last_topk_scores
    first, second = mlp.experts.htoh4, mlp.experts.h4toh
    parameters = [p.to(dtype) for p in (first.weight, first.bias, second.weight, second.bias)]
    rows = x.reshape(-1, D).to(dtype)
    out = reference.routed_mlp(rows, index, weight.to(dtype), *parameters, mlp.act)
    return out.view(x.shape)


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_output_within_budget(gate: str, dtype: torch.dtype, training: bool) -> None:
    mlp = make(gate).train(training).to(dtype)
    x = draw(3, 13, D).to(dtype)
    with torch.no_grad():
        found = mlp(x)
        own, exact = (expected_output(mlp, x, kind) for kind in (dtype, torch.float64))
    assert_within_budget(found, own, exact, f"out of {gate}")
    assert_outside_budget(found.flip(0), own, exact, "tokens in another order")


@every_gate
def test_gradients_within_budget(gate: str) -> None:
    x = draw(31, D)
    results = []
    for backend, kind in (
        (None, torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        mlp = make(gate, backend=backend).eval().to(kind)
        leaf = x.to(kind).requires_grad_()
        out = mlp(leaf)
        loss = mlp.gate_loss()
        parameters = {name: p for name, p in mlp.named_parameters() if "noise" not in name}
        total = (out * draw(31, D, dtype=torch.float64, seed=3).to(kind)).sum() + 0.1 * loss
        grads = torch.autograd.grad(total, [leaf, *parameters.values()])
        results.append((mlp.last_topk_indices, ["x", *parameters], grads))
    assert all(torch.equal(indices, results[0][0]) for indices, _, _ in results)
    for name, found, own, exact in zip(
        results[0][1], *(grads for _, _, grads in results), strict=True
    ):
        size = float(exact.abs().max())
        assert_within_budget(found, own, exact, f"gradient of {name}", magnitude=max(size, 1e-2))


@every_gate
def test_agrees_with_the_published_module(gate: str) -> None:
    published = lineage.lifted(lineage.make_mlp({"NoisyGate": lineage.GATES[3]}.get(gate, gate)))
    mlp = lineage.lifted(make(gate))
    mlp.load_state_dict(published.state_dict())
    published.capture_topk_pre_mix = mlp.capture_topk_pre_mix = True
    x = draw(2, 21, D)
    with torch.no_grad():
        found, own = mlp(x), published(x)
        exact = copy.deepcopy(published).double()(x.double())
    assert_within_budget(found, own, exact, gate)
    (kept, order), (expected, other) = (m.last_topk_indices.sort(1) for m in (mlp, published))
    assert torch.equal(kept, expected)
    parts = [
        module.last_topk_pre_mix[torch.arange(42)[:, None], places]
        for module, places in ((mlp, order), (published, other))
    ]
    torch.testing.assert_close(*parts)
    with torch.no_grad():
        mlp.experts.h4toh.weight[int(mlp.last_topk_indices[0, 0])] = 0.0
        assert_outside_budget(mlp(x), own, exact, "a missing expert")


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 3, 5, D)])
@every_gate
def test_any_leading_shape(gate: str, shape: tuple[int, ...]) -> None:
    mlp = make(gate)
    out = mlp(draw(*shape).requires_grad_())
    assert out.shape == shape
    loss = mlp.gate_loss()
    assert bool(loss.isfinite())
    (out.sum() + loss).backward()
    assert all(bool(p.grad.isfinite().all()) for p in mlp.parameters() if p.grad is not None)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_change_results(gate: str, training: bool) -> None:
    mlp = make(gate).train(training)
    mask = torch.arange(3 * 14).view(3, 14) % 3 != 1
    results = []
    for filling in (0.0, float("nan"), 1e4):
        x = draw(3, 14, D).masked_fill(~mask[..., None], filling).requires_grad_()
        torch.manual_seed(5)
        out = mlp(x, mask)
        loss = mlp.gate_loss()
        grads = torch.autograd.grad(
            out.sum() + loss, [x, *mlp.parameters()], allow_unused=True, materialize_grads=True
        )
        assert not out[~mask].any()
        assert out[mask].any(dim=1).float().mean() > 0.8
        assert (mlp.last_topk_indices.view(3, 14, -1)[~mask] == -1).all()
        assert not grads[0][~mask].any()
        results.append((out, loss, *grads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    torch.manual_seed(5)
    if gate != "NaiveGate":
        mlp(draw(3, 14, D))
        assert not torch.equal(mlp.gate_loss(), results[0][1]), "control: no mask"


def test_padding_uses_no_capacity() -> None:
    """All tokens choose the same expert, which takes the first valid ones."""
    mlp = make().eval()
    with torch.no_grad():
        mlp.gate.gate.bias.copy_(torch.tensor([50.0, 25.0, 0, 0, 0]))
    mlp.gate.capacity = (0.5, 0.5)
    mask = torch.arange(40) >= 12
    mlp(draw(40, D), mask)
    places = mlp.gate.rows_per_expert(40)
    assert 0 < places < 28, "some tokens must be dropped"
    kept = (mlp.last_topk_indices == 0).any(dim=1).nonzero().flatten()
    assert kept.tolist() == list(range(12, 12 + places))


def test_all_padding() -> None:
    for gate in GATES:
        mlp = make(gate)
        out = mlp(draw(6, D), torch.zeros(6, dtype=torch.bool))
        assert not out.any()
        assert bool(mlp.gate_loss().isfinite())


@every_gate
def test_pre_mix_outputs(gate: str) -> None:
    mlp, x = make(gate).eval(), draw(2, 15, D)
    if gate != "NaiveGate" and hasattr(mlp.gate, "capacity"):
        mlp.gate.capacity = (0.5, 0.5)
    plain = mlp(x)
    assert mlp.last_topk_pre_mix is None
    mlp.capture_topk_pre_mix = True
    out = mlp(x)
    pre_mix, index, weight = mlp.last_topk_pre_mix, mlp.last_topk_indices, mlp.last_topk_scores
    assert pre_mix.shape == (*index.shape, D) == (30, mlp.top_k, D)
    assert pre_mix[index >= 0].any(dim=1).all()
    assert not pre_mix[index < 0].any()
    assert bool((index < 0).any()) == (gate in ("GShardGate", "SwitchGate"))
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(out.view(30, D), (weight[..., None] * pre_mix).sum(1))

    loss = pre_mix.square().sum() + weight.square().sum()
    grads = torch.autograd.grad(loss, list(mlp.experts.parameters()), retain_graph=True)
    assert all(bool(grad.any()) for grad in grads)
    router = mlp.gate.w_gate if gate == "NoisyGate" else mlp.gate.gate.weight
    assert torch.autograd.grad(loss, router)[0].any()
    mlp.capture_topk_pre_mix = False
    mlp(x)
    assert mlp.last_topk_pre_mix is None


def test_parts_and_names_are_the_published_ones() -> None:
    mlp, published = make(n_router=3), lineage.make_mlp(n_router=3)
    assert mlp.gate is mlp.all_gates["0"]
    assert list(mlp.state_dict()) == list(published.state_dict())
    assert mlp.last_tot_expert == E
    assert {p.dp_comm for p in mlp.experts.parameters()} == {"none"}
    mlp(draw(5, D)).sum().backward()
    assert mlp.gate.gate.weight.grad is not None
    spare = [p for r in ("1", "2") for p in mlp.all_gates[r].parameters()]
    assert all(p.grad is None for p in spare)
    assert mlp.all_gates["1"].get_loss() is None
    assert type(RoutedMLP(E, D, F, gate="AddtionalNoisyGate").gate) is NoisyGate
    assert type(RoutedMLP(E, D, F, gate=GShardGate).gate) is GShardGate
    assert RoutedMLP(E, D, F).gate.top_k == 2


def test_experts_are_initialised_like_linear() -> None:
    mlp = RoutedMLP(E, 64, 96)
    for part, fan_in in ((mlp.experts.htoh4, 64), (mlp.experts.h4toh, 96)):
        assert not part.bias.any()
        largest = part.weight.detach().abs().flatten(1).amax(dim=1)
        assert torch.allclose(largest, torch.full((E,), fan_in**-0.5), rtol=0.02)


def test_activations() -> None:
    x = draw(9, D)
    outputs = []
    for module in (nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU()):
        mlp = make("NaiveGate", activation=module).eval()
        found = mlp(x)
        own, exact = (expected_output(mlp, x, kind) for kind in (torch.float32, torch.float64))
        assert_within_budget(found, own, exact, str(module))
        outputs.append(found)
    assert len({float(out.detach().sum()) for out in outputs}) == 4
    for other in (nn.Tanh(), torch.relu, "gelu"):
        with pytest.raises(TypeError, match=r"activation: expected nn\.GELU, nn\.ReLU or nn\.SiLU"):
            activation_name(other)


@every_gate
def test_autocast_is_that_of_linear(gate: str) -> None:
    mlp, x = make(gate), draw(11, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlp(x)
        assert out.dtype == nn.Linear(D, D)(x).dtype == torch.bfloat16
        wide = copy.deepcopy(mlp).double()
        assert wide(x.double()).dtype == torch.float64
    (out.float().sum() + mlp.gate_loss()).backward()
    assert mlp.experts.htoh4.weight.grad.dtype == torch.float32
    assert mlp.experts.htoh4.weight.grad.any()
    with torch.no_grad():
        own, exact = (
            expected_output(mlp, x.bfloat16(), k) for k in (torch.bfloat16, torch.float64)
        )
    assert_within_budget(out.detach(), own, exact, gate)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_change_the_function(dtype: torch.dtype, backend: str | None) -> None:
    x, index = draw(11, D), torch.arange(22).view(11, 2) % E
    weight = draw(11, 2, seed=1).softmax(dim=1)
    mlp = make()
    first, second = mlp.experts.htoh4, mlp.experts.h4toh
    arguments = (x, index, weight, first.weight, first.bias, second.weight, second.bias)
    expected = routed_mlp(*arguments, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        found = routed_mlp(*arguments, backend=backend)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.sum().backward()


def test_moves_with_the_model() -> None:
    mlp = make()
    mlp(draw(4, D))
    mlp.double()
    out = mlp(draw(4, D).double())
    assert (out.dtype, mlp.gate_loss().dtype) == (torch.float64,) * 2
    with torch.device("meta"):
        skeleton = RoutedMLP(E, D, F, gate="GShardGate")
    skeleton.to_empty(device="cpu").load_state_dict(make().state_dict())
    torch.testing.assert_close(skeleton.eval()(draw(4, D)), make().eval()(draw(4, D)))


def test_mistakes() -> None:
    mlp = make()
    calls: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"inp: expected \(\.\.\., 16\), got \(3, 15\)", lambda: mlp(draw(3, 15))),
        (TypeError, "inp: expected dtype torch.float32 as the", lambda: mlp(draw(3, D).double())),
        (ValueError, "mask: expected", lambda: mlp(draw(3, D), torch.ones(4, dtype=torch.bool))),
        (TypeError, "mask: expected bool", lambda: mlp(draw(3, D), torch.ones(3))),
        (ValueError, "gate: expected one of NaiveGate, .*'TopKGate'", lambda: make("TopKGate")),
        (ValueError, "topk: expected 2 for GShard, got 3", lambda: make(top_k=3)),
        (ValueError, "world_size: expected 1, got 2", lambda: make("NaiveGate", world_size=2)),
        (TypeError, "activation: expected", lambda: make(activation=nn.Tanh())),
        (BackendUnavailable, "backend 'cuda'", lambda: make(backend="cuda")(draw(3, D))),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            call()
