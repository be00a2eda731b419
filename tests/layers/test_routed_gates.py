"""Tests of the gates: choices, losses, no influence of padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.routed_mlp.gates import (
    GShardGate,
    NaiveGate,
    SwitchGate,
    variation,
)
from flmoe_kernels.ops.routing.api import gate as choose
from flmoe_kernels.ops.routing.api import limit
from tests.support.inputs import draw
from tests.support.routed_gates import D, E, N, call, every_gate, make


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
    assert not gate.has_loss, "the loss can be read once"


@every_gate
def test_gradcheck(name: str) -> None:
    """Gradients of weights (with drops) and losses by tokens, some of them masked, and by all parameters."""
    gate = make(name).double()
    x = draw(11, D, dtype=torch.float64).requires_grad_()
    mask = torch.arange(11) % 4 != 1
    names = [name for name, _ in gate.named_parameters()]

    def values(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        own = dict(zip(names, parameters, strict=True))
        _, weight = torch.func.functional_call(gate, own, (x, mask))
        return weight, gate.get_loss()

    leaves = [p.detach().clone().requires_grad_() for p in gate.parameters()]
    assert torch.autograd.gradcheck(values, (x, *leaves))


@pytest.mark.parametrize("name", ["gshard", "switch"])
@pytest.mark.parametrize("training", [True, False])
def test_capacity(name: str, training: bool) -> None:
    gate = make(name, training)
    rate = 1.2 if training else 2.4
    most = math.ceil(rate * N * gate.top_k / E)
    assert gate.rows_per_expert(N) == most
    with torch.no_grad():
        gate.gate.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    index = call(gate, draw(N, D))[0]
    counts = torch.bincount(index[index >= 0], minlength=E)
    assert int(counts.max()) == most
    first = (index == 0).any(dim=1)
    assert torch.equal(first, torch.arange(N) < most), "the first tokens keep their place"


@pytest.mark.parametrize("name", ["gshard", "switch"])
def test_capacity_uses_the_given_number_of_tokens(name: str) -> None:
    """Rows packed without padding are routed like the padded rows."""
    gate, mask = make(name), torch.arange(N) % 3 != 1
    gate.capacity = (0.9, 0.9)
    x = draw(N, D)
    if name == "switch":
        gate.switch_eps = 0.0
    padded, packed, alone = (
        gate(*arguments)
        for arguments in ((x, mask), (x[mask], None, N), (x[mask], None, int(mask.sum())))
    )
    assert torch.equal(padded.index[mask], packed.index)
    torch.testing.assert_close(padded.weight[mask], packed.weight)
    assert (packed.index < 0).any()
    assert not torch.equal(packed.index, alone.index), "control: the capacity of the rows alone"


@pytest.mark.parametrize("name", ["gshard", "switch"])
def test_balance_loss_is_its_formula(name: str) -> None:
    gate, x = make(name, training=False), draw(N, D)
    mask = torch.arange(N) % 4 != 0
    p = gate.gate(x).softmax(dim=1)[mask]
    share = torch.tensor([float((p.argmax(1) == e).float().mean()) for e in range(E)])
    torch.testing.assert_close(call(gate, x, mask)[2], E * (share * p.mean(0)).sum())
    # If one expert gets all tokens, the loss is E times that of even loads.
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


def test_hooks_of_the_lineage() -> None:
    gate, x = make("naive"), draw(N, D).requires_grad_()
    for _ in range(5):
        index = gate(x).index
    assert [logit.tolist() for logit in gate.topk_logits] == [index.tolist()], "the last call's"
    assert not gate.topk_logits[0].requires_grad
    assert len(gate.get_topk_logit()) == 1
    assert gate.get_topk_logit() == gate.topk_logits == []
    gate(x)
    gate.reset_topk_logit()
    assert gate.topk_logits == []
    gate.set_topk_logit(index)
    assert len(gate.get_topk_logit(clear=False)) == len(gate.topk_logits) == 1
    gate.set_topk_indicates(index)
    assert gate.get_topk_indicate(clear=False) is gate.get_topk_indicate() is index
    assert gate.get_topk_indicate() is None


@every_gate
def test_evaluation_chooses_by_clean_logits(name: str) -> None:
    gate, x = make(name, training=False), draw(N, D)
    order = gate.clean_logits(x).argsort(dim=1, descending=True)[:, : gate.top_k]
    index = gate(x).index
    assert torch.equal(torch.where(index < 0, -1, order), index)
    assert (index >= 0).any()


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_remaining_choices_get_a_new_softmax(dtype: torch.dtype, backend: str | None) -> None:
    """Against the formula in float64; two, one or none of three choices remain, with distant logits."""
    logits = (4.0 * draw(40, 6)).to(dtype)
    logits[::2, 0] += 15.0
    mask = torch.arange(40) % 7 != 3
    cotangent = draw(40, 3, seed=3).to(dtype)

    def found(kind: torch.dtype, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.to(kind, copy=True).requires_grad_()
        index, weight = choose(leaf, 3, capacity=9, mask=mask, backend=backend)
        (weight * cotangent.to(kind)).sum().backward()
        return index, weight.detach(), leaf.grad

    index, weight, grad = found(dtype, backend)
    free = choose(logits, 3).index
    left = (index >= 0).sum(dim=1)
    assert set(left.tolist()) == {0, 1, 2, 3}
    leaf = logits.double().requires_grad_()
    rows = []
    for n in range(40):
        kept = (index[n] >= 0).nonzero().flatten()
        share = leaf[n, free[n, kept]].softmax(dim=0)
        rows.append(torch.zeros(3, dtype=torch.float64).index_put((kept,), share))
    exact = torch.stack(rows)
    (exact * cotangent).sum().backward()
    _, low, low_grad = found(dtype, "reference")
    assert_within_budget(weight, low, exact.detach(), "weights")
    assert_within_budget(grad, low_grad, leaf.grad, "gradients")
    lost = torch.where(index < 0, 0.0, choose(logits, 3).weight)
    assert_outside_budget(lost, low, exact.detach(), "weights as before the drops")
    assert not grad[left < 2].any()


def test_limit() -> None:
    index = torch.tensor([[1, 0], [1, 2], [0, 1], [-1, 1], [1, 0]])
    mask = torch.tensor([True, False, True, True, True])
    for backend in ("reference", None):
        found = limit(index.int(), 3, capacity=2, mask=mask, backend=backend)
        assert found.dtype == torch.int64
        assert found.tolist() == [[1, 0], [-1, -1], [0, 1], [-1, -1], [-1, -1]]
        assert limit(index, 3, capacity=0, backend=backend).max() == -1
        assert torch.equal(limit(index, 3, backend=backend), index)
    with pytest.raises(ValueError, match="index: expected -1 or experts from 0 to 1"):
        limit(index, 2)
    with pytest.raises(ValueError, match=r"mask: expected \(5,\), got \(4,\)"):
        limit(index, 3, mask=mask[:4])
    with pytest.raises(TypeError, match="capacity: expected an int, got float"):
        limit(index, 3, capacity=2.0)  # type: ignore[arg-type]


def test_noise_is_drawn_only_in_training() -> None:
    x = draw(N, D)
    for name in ("switch", "noisy", "gshard random"):
        gate = make(name)
        torch.manual_seed(3)
        first, second = gate(x), gate(x)
        assert not all(map(torch.equal, first, second)), name
        gate.eval()
        assert all(map(torch.equal, gate(x), gate(x))), name


def test_jitter_multiplies_the_router_s_input() -> None:
    """Jitter does not change a token of zeros: its logits equal the bias."""
    gate = make("switch")
    weight = call(gate, torch.zeros(1, D))[1]
    torch.testing.assert_close(weight[0, 0], gate.gate.bias.softmax(0).max())
    assert not torch.equal(call(gate, draw(1, D))[1], call(gate.eval(), draw(1, D))[1])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="topk: expected 2 for GShard, got 1"):
        GShardGate(D, E, topk=1)
    with pytest.raises(ValueError, match="topk: expected 1 for Switch, got 2"):
        SwitchGate(D, E, topk=2)
    with pytest.raises(ValueError, match="top_k: expected an int from 1 to 5, got 6"):
        NaiveGate(D, E, top_k=6)
    with pytest.raises(ValueError, match="capacity: expected a positive number"):
        GShardGate(D, E, capacity=(0.0, 2.0))
    with pytest.raises(ValueError, match="mask: expected"):
        make("naive")(draw(N, D), torch.ones(3, dtype=torch.bool))
