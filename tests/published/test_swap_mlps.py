"""Tests of `swap` of sparse MLPs outside of interaction layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import RoutedMLP
from flmoe_kernels.layers.routed_mlp.gates import NoisyGate
from flmoe_kernels.published.swap import ROOT, swap
from tests.support.inputs import draw
from tests.support.lineage_sparse import GATES, gate_loss, lifted, make_mlp

every_gate = pytest.mark.parametrize("gate", GATES)


class Block(nn.Module):
    """Layer of the published gshardgate baseline: a sparse MLP, called once per modality."""

    def __init__(self, gate: str = "GShardGate", **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.5)
        self.mlp = make_mlp(gate, **options)

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [x + self.drop(self.mlp(self.norm(x))) for x in parts]


class Fusion(nn.Module):
    def __init__(self, gate: str = "GShardGate", **options: Any) -> None:
        super().__init__()
        layers = [Block(gate, **options), Block(gate, seed=1, **options)]
        self.network = nn.Sequential(*layers)
        self.head = nn.Linear(16, 3)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.head(torch.cat(self.network(parts), dim=1).mean(dim=1))


def parts(seed: int = 0) -> list[Tensor]:
    return [draw(3, 11, 16, seed=seed), draw(3, 7, 16, seed=seed + 1)]


@pytest.mark.parametrize(("gate", "mode"), [(gate, gate == "GShardGate") for gate in GATES])
def test_replaces_them_and_shares_their_parameters(gate: str, mode: bool) -> None:
    model = Fusion(gate).train(mode)
    original = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = swap(model)
    assert report.left == report.swapped == ()
    assert [(e.name, e.gate, e.experts, e.inputs) for e in report.swapped_mlps] == [
        (f"network.{i}.mlp", gate, 5, "random") for i in (0, 1)
    ]
    for entry in report.swapped_mlps:
        assert 0 < entry.output_error < 1e-5
        assert entry.speed_up is not None
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(part.training is mode for part in model.modules())
    for block in model.network:
        assert type(block.mlp) is RoutedMLP
        assert block.mlp.gate is block.mlp.all_gates["0"]

    lifted(model.eval()), lifted(original)
    with torch.no_grad():
        torch.testing.assert_close(model(parts()), original(parts()))
    original.load_state_dict(model.state_dict())
    for piece in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"):
        whole = state.pop(f"network.0.mlp.experts.{piece}")
        state |= {f"network.0.mlp.experts.{e}.{piece}": whole[e : e + 1] for e in range(5)}
    model.load_state_dict(state)


def test_settings_of_the_gates_are_kept() -> None:
    switch, gshard = make_mlp("SwitchGate", n_router=2), make_mlp(n_router=2)
    switch.gate.switch_eps, switch.gate.capacity = 0.25, (0.7, 1.3)
    gshard.gate.random_routing = True
    gshard.all_gates["1"].capacity = (3.0, 4.0)
    noisy = make_mlp("AddtionalNoisyGate")
    noisy.gate.noise_epsilon = 0.5
    naive = make_mlp("NaiveGate", top_k=3)
    naive.gate.gate.register_parameter("bias", None)
    model = nn.ModuleList([switch, gshard, noisy, naive])
    assert swap(model).left == ()
    assert (model[0].gate.switch_eps, model[0].gate.capacity) == (0.25, (0.7, 1.3))
    assert model[1].gate.random_routing is True
    assert model[1].all_gates["1"].capacity == (3.0, 4.0)
    assert type(model[2].gate) is NoisyGate
    assert model[2].gate.noise_epsilon == 0.5
    assert model[3].gate.gate.bias is None
    assert (model[3].top_k, model[3].act) == (3, "gelu")


@every_gate
def test_the_published_sum_of_gate_losses_works(gate: str) -> None:
    """The sum is over both layers and modalities and has a gradient; the published code warns of idle routers."""
    model = Fusion(gate, n_router=2)
    assert swap(model).left == ()
    inputs, warnings = parts(), list[str]()
    torch.manual_seed(2)
    (model(inputs).sum() + gate_loss(model, warnings)).backward()
    assert warnings == [f"network.{i}.mlp, router 1: empty" for i in (0, 1)]
    assert gate_loss(model) == 0, "all losses were read"

    torch.manual_seed(2)
    model(inputs)
    loss = gate_loss(model)
    routers = [p for block in model.network for p in block.mlp.gate.parameters()]
    grads = torch.autograd.grad(loss, routers, allow_unused=True, materialize_grads=True)
    assert bool(torch.cat([grad.flatten() for grad in grads]).any()) == (gate != "NaiveGate")
    spare = [p for block in model.network for p in block.mlp.all_gates["1"].parameters()]
    assert all(p.grad is None for p in spare)


def test_gate_losses_count_every_modality() -> None:
    """The published gate keeps only the last call's loss; ours keeps the sum."""
    published = Block().eval()
    model = copy.deepcopy(published)
    swap(model)
    model.train()
    for part in (model, published):
        part.drop.p = 0.0
    apart = []
    for x in parts():
        published([x])
        apart.append(gate_loss(published))
    published(parts())
    assert gate_loss(published) == apart[1]
    model(parts())
    torch.testing.assert_close(gate_loss(model), apart[0] + apart[1])


def test_alone_shared_and_on_given_inputs() -> None:
    report = swap(make_mlp())
    assert isinstance(report.model, RoutedMLP)
    assert report.swapped_mlps[0].name == ROOT

    model = Fusion()
    model.again = model.network[0].mlp
    model.spare = make_mlp(seed=5)
    report = swap(model, inputs=(parts(),))
    assert model.again is model.network[0].mlp
    assert {entry.name: entry.inputs for entry in report.swapped_mlps} == {
        "network.0.mlp, again": "given",
        "network.1.mlp": "given",
        "spare": "random",
    }


def test_fastmoes_own_code_is_not_run_on_given_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the model has such a layer, the model is not run; the other layers are compared on random inputs."""
    model = Fusion()
    experts = model.network[1].mlp.experts

    class Own(type(experts.htoh4)):
        def forward(self, *_: Any) -> Tensor:
            return pytest.fail("was run")

    Own.__module__ = "fmoe.linear"
    experts.htoh4.__class__ = experts.h4toh.__class__ = Own
    monkeypatch.setattr(Fusion, "forward", lambda *_: pytest.fail("was run"))
    report = swap(model, inputs=(parts(),), strict=False)
    assert [(e.name, e.inputs) for e in report.swapped_mlps] == [("network.0.mlp", "random")]
    assert [entry.name for entry in report.left] == ["network.1.mlp"]
    assert "only on a CUDA device" in report.left[0].reason
