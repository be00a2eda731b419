"""The gates: what they choose, what their losses measure, and that padding has no part in either."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flmoe_kernels.routed_mlp import GShardGate, NaiveGate, NoisyGate, SwitchGate
from flmoe_kernels.routed_mlp.gates import GATES, Gate, variation
from flmoe_kernels.testing import draw

D, E, N = 6, 5, 60
MAKERS: dict[str, Callable[[], Gate]] = {
    "naive": lambda: NaiveGate(D, E, top_k=3),
    "gshard": lambda: GShardGate(D, E),
    "gshard random": lambda: GShardGate(D, E, random_routing=True),
    "switch": lambda: SwitchGate(D, E),
    "noisy": lambda: NoisyGate(D, E, top_k=2),
    "noisy, all": lambda: NoisyGate(D, E, top_k=E),
}
every_gate = pytest.mark.parametrize("name", list(MAKERS))


def make(name: str, training: bool = True) -> Gate:
    torch.manual_seed(0)
    return MAKERS[name]().train(training)


def call(gate: Gate, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """index, weight and loss, with the same random numbers every time."""
    torch.manual_seed(1)
    index, weight = gate(x, mask)
    loss = gate.get_loss()
    assert loss is not None
    return index, weight, loss


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_weights(name: str, training: bool) -> None:
    gate = make(name, training)
    index, weight, loss = call(gate, draw(N, D))
    assert index.shape == weight.shape == (N, gate.top_k)
    assert loss.shape == ()
    assert not weight[index < 0].any()
    kept = (index >= 0).any(dim=1)
    if name.startswith("switch"):
        assert (weight[kept] > 1 / E - 1e-6).all()
    elif name != "gshard random":
        torch.testing.assert_close(weight.sum(1), kept.float())
    assert not gate.has_loss, "the loss is taken once"


@every_gate
def test_padding_changes_nothing(name: str) -> None:
    """Other values in masked tokens: the same choices, weights and loss, and nothing goes to them."""
    gate, mask = make(name), torch.arange(N) % 3 != 1
    x = draw(N, D)
    other = torch.where(mask[:, None], x, 7.0 * draw(N, D, seed=5))
    expected, found = call(gate, x, mask), call(gate, other, mask)
    assert all(map(torch.equal, found, expected))
    assert (found[0][~mask] == -1).all()
    if name.startswith(("gshard", "switch", "noisy")):
        assert not torch.equal(call(gate, x)[2], expected[2]), "the control: padding that counts"


@every_gate
def test_losses_have_gradients(name: str) -> None:
    gate = make(name)
    loss = call(gate, draw(N, D))[2]
    grads = torch.autograd.grad(loss, list(gate.parameters()), allow_unused=True)
    found = any(grad is not None and grad.abs().max() > 0 for grad in grads)
    assert found == (name != "naive")
    assert loss.requires_grad


@pytest.mark.parametrize("name", ["gshard", "switch"])
@pytest.mark.parametrize("training", [True, False])
def test_capacity(name: str, training: bool) -> None:
    gate = make(name, training)
    assert isinstance(gate, GShardGate | SwitchGate)
    rate = 1.2 if training else 2.4
    most = math.ceil(rate * N * gate.top_k / E)
    assert gate.rows_per_expert(N) == most
    with torch.no_grad():
        gate.gate.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    index = call(gate, draw(N, D))[0]
    counts = torch.bincount(index[index >= 0], minlength=E)
    assert int(counts.max()) == most
    first = (index == 0).any(dim=1)
    assert torch.equal(first, torch.arange(N) < most), "the lowest tokens keep their place"


@pytest.mark.parametrize("name", ["gshard", "switch"])
def test_balance_loss_is_its_formula(name: str) -> None:
    gate, x = make(name, training=False), draw(N, D)
    assert isinstance(gate, GShardGate | SwitchGate)
    mask = torch.arange(N) % 4 != 0
    p = gate.gate(x).softmax(dim=1)[mask]
    share = torch.tensor([float((p.argmax(1) == e).float().mean()) for e in range(E)])
    torch.testing.assert_close(call(gate, x, mask)[2], E * (share * p.mean(0)).sum())
    # One expert that takes all costs E times what even loads cost.
    hot = torch.full((N, E), -1e4)
    hot[:, 2] = 1e4
    assert gate.balance(hot.argmax(1), hot.softmax(1), None).item() == pytest.approx(E)
    even = torch.full((N, E), 1 / E)
    assert gate.balance(torch.arange(N) % E, even, None).item() == pytest.approx(1.0)


def test_noisy_loss_is_its_formula() -> None:
    gate, x = make("noisy"), draw(N, D)
    index, weight, loss = call(gate, x)
    torch.manual_seed(1)
    weight = weight.detach()
    clean = (x @ gate.w_gate).detach()
    deviation = torch.nn.functional.softplus(x @ gate.w_noise).detach() + 1e-2
    noisy = clean + torch.randn_like(clean) * deviation
    importance, load = torch.zeros(E), torch.zeros(E)
    for n in range(N):
        order = noisy[n].argsort(descending=True)
        assert index[n].tolist() == order[:2].tolist()
        for k in range(2):
            importance[index[n, k]] += weight[n, k]
        for e in range(E):
            rival = noisy[n, order[2]] if e in order[:2].tolist() else noisy[n, order[1]]
            z = float((clean[n, e] - rival) / deviation[n, e])
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = variation(importance) + variation(load)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_noise_is_drawn_in_training_alone() -> None:
    x = draw(N, D)
    for name in ("switch", "noisy", "gshard random"):
        gate = make(name)
        torch.manual_seed(3)
        first, second = gate(x), gate(x)
        assert not all(map(torch.equal, first, second)), name
        gate.eval()
        assert all(map(torch.equal, gate(x), gate(x))), name


def test_jitter_multiplies_the_router_s_input() -> None:
    """A token of zeros has nothing to be multiplied: its logits are the bias alone."""
    gate = make("switch")
    assert isinstance(gate, SwitchGate)
    weight = call(gate, torch.zeros(1, D))[1]
    torch.testing.assert_close(weight[0, 0], gate.gate.bias.softmax(0).max())
    assert not torch.equal(call(gate, draw(1, D))[1], call(gate.eval(), draw(1, D))[1])


def test_parameters_are_those_of_the_published_gates() -> None:
    names = {name: sorted(make(name).state_dict()) for name in MAKERS}
    linear, noisy = ["gate.bias", "gate.weight"], ["w_gate", "w_noise"]
    assert names == {name: noisy if name.startswith("noisy") else linear for name in names}
    assert sorted(GATES) == ["GShardGate", "NaiveGate", "NoisyGate", "SwitchGate"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="top_k: expected 2 for GShard, got 1"):
        GShardGate(D, E, top_k=1)
    with pytest.raises(ValueError, match="top_k: expected 1 for Switch, got 2"):
        SwitchGate(D, E, top_k=2)
    with pytest.raises(ValueError, match="top_k: expected an int from 1 to 5, got 6"):
        NaiveGate(D, E, top_k=6)
    with pytest.raises(ValueError, match="capacity: expected a positive number"):
        GShardGate(D, E, capacity=(0.0, 2.0))
    with pytest.raises(ValueError, match="mask: expected"):
        make("naive")(draw(N, D), torch.ones(3, dtype=torch.bool))
