"""A changed part of a RoutedMLP takes effect or is refused; torch.func leaves the parameters alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from flmoe_kernels import RoutedMLP
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.gates import NaiveGate
from tests.support.inputs import draw
from tests.support.routed_layers import D, E, make


def step(mlp: RoutedMLP, x: Tensor) -> Tensor:
    out = mlp(x)
    out.square().sum().backward()
    return out.detach()


HONOURED: list[tuple[str, Callable[[Any], object]]] = [
    ("prune", lambda x: prune.l1_unstructured(x.experts.htoh4, "weight", 0.5)),
    ("weight_norm", lambda x: nn.utils.weight_norm(x.experts.h4toh, dim=0)),
    (
        "parametrization",
        lambda x: parametrize.register_parametrization(x.experts.htoh4, "weight", nn.Tanh()),
    ),
    ("activation", lambda x: setattr(x.experts, "activation", nn.ReLU())),
    ("tanh", lambda x: setattr(x.experts.activation, "approximate", "tanh")),
    ("no bias", lambda x: setattr(x.experts.htoh4, "bias", None)),
    ("pruned gate", lambda x: prune.l1_unstructured(x.gate.gate, "weight", 0.5)),
]


@pytest.mark.parametrize("change", [c[1] for c in HONOURED], ids=[c[0] for c in HONOURED])
def test_changes_of_the_experts_and_the_gate_take_effect_in_every_step(
    change: Callable[[Any], object],
) -> None:
    x = draw(6, D)
    mlp = make("NaiveGate")
    change(mlp)
    for _ in range(2):
        out = step(mlp, x)
        mlp.backend = "reference"
        torch.testing.assert_close(step(mlp, x), out)
        mlp.backend = None
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter -= 0.01 * parameter.grad
        assert not torch.allclose(mlp(x), out)


REFUSED: list[tuple[Callable[[Any], object], str]] = [
    (lambda x: x.experts.register_forward_hook(lambda *_: None), "experts: has a forward hook"),
    (
        lambda x: setattr(x.experts.activation, "forward", torch.tanh),
        r"experts\.activation\.forward: replaced on this instance",
    ),
    (
        lambda x: setattr(x.experts, "activation", nn.Tanh()),
        r"experts\.activation: expected nn\.GELU, nn\.ReLU or nn\.SiLU, got Tanh",
    ),
    (lambda x: setattr(x, "experts", nn.Identity()), "experts: expected Experts, got Identity"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_changes_that_the_kernels_do_not_compute_are_refused(
    change: Callable[[Any], object], message: str
) -> None:
    mlp, x = make(), draw(6, D)
    mlp(x)
    change(mlp)
    with pytest.raises(UnsupportedLayer, match=message):
        mlp(x)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedLayer, match=message):
        torch.compile(mlp, backend="eager")(x)


@pytest.mark.parametrize("path", ["gate", "gate.gate", "experts.htoh4", "experts.h4toh"])
def test_hooks_of_parts_that_are_called_fire(path: str) -> None:
    mlp, calls = make(), list[str]()
    part = mlp.get_submodule(path)
    part.register_forward_pre_hook(lambda *_: calls.append("pre"))
    part.register_forward_hook(lambda *_: calls.append("forward"))
    part.register_full_backward_hook(lambda *_: calls.append("backward"))
    step(mlp, draw(6, D))
    assert calls[:2] == ["pre", "forward"]
    # These have no input, so torch's backward hook fires for their outputs.
    assert "backward" in calls


def test_layers_do_not_share_the_default_activation() -> None:
    a, b = RoutedMLP(2, D, D), RoutedMLP(2, D, D)
    a.experts.activation.approximate = "tanh"
    assert (a.act, b.act) == ("gelu_tanh", "gelu")


def test_a_replaced_gate_is_used_and_saved() -> None:
    mlp, x = make("NaiveGate"), draw(6, D)
    mlp.gate = make("SwitchGate", seed=1).gate.eval()
    assert mlp.all_gates["0"] is mlp.gate
    mlp(x)
    assert mlp.last_topk_indices.shape == (6, mlp.top_k) == (6, 1)
    state = mlp.state_dict()
    assert torch.equal(state["all_gates.0.gate.weight"], mlp.gate.gate.weight)


def test_router_0_is_the_gate_itself() -> None:
    """Also after a functional_call, which needs a copy of it."""
    model = nn.Sequential(make("GShardGate").eval())
    functional_call(model, model.state_dict(), (draw(6, D),))
    gate = model[0].gate
    assert model.get_submodule("0.all_gates.0") is getattr(model[0].all_gates, "0") is gate


@pytest.mark.parametrize("keys", ["named_parameters", "state_dict"])
def test_functional_call_restores_the_parameters(keys: str) -> None:
    mlp, x = make(n_router=2).eval(), draw(6, D)
    before, expected = dict(mlp.named_parameters()), mlp(x)
    other = copy.deepcopy(mlp)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    values = {
        name: value.detach().clone() if keys == "named_parameters" else value
        for name, value in dict(getattr(other, keys)()).items()
    }
    torch.testing.assert_close(functional_call(mlp, values, (x,)), other(x))
    after = dict(mlp.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(mlp(x), expected)


def test_a_gate_for_another_number_of_experts_is_refused() -> None:
    mlp = make("NaiveGate")
    mlp.gate = NaiveGate(D, E + 1, 1, 1)
    with pytest.raises(
        UnsupportedLayer, match=f"gate: expected a gate for {E} experts, got one for"
    ):
        mlp(draw(6, D))
