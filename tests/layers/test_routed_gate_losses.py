"""Tests of gate losses: calls in the sum, no counting in half precision."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.routed_mlp.gates import (
    Gate,
    NaiveGate,
    SwitchGate,
    variation,
)
from tests.support.inputs import draw
from tests.support.routed_gates import D, E, N, call, every_gate, make


@every_gate
def test_losses_of_a_step_add_up(name: str) -> None:
    gate, parts = make(name), [draw(N, D, seed=i) for i in range(3)]
    apart = [call(gate, part)[2] for part in parts]
    for part in parts:
        torch.manual_seed(1)
        gate(part)
    total = gate.get_loss(clear=False)
    torch.testing.assert_close(total, sum(apart))
    assert gate.get_loss() is total
    assert gate.get_loss() is None
    if name != "naive":
        assert all(total != loss for loss in apart), "control: the loss of one call"


def test_an_evaluation_keeps_the_losses_of_a_training_step() -> None:
    gate, x, y = make("gshard"), draw(N, D), draw(N, D, seed=9)
    expected = call(gate, x)[2] + call(gate, y)[2]
    gate(x)
    with torch.no_grad():
        gate(y)
    gate.eval()
    gate(y)
    gate.train()
    gate(y)
    found = gate.get_loss()
    assert found == expected
    assert found.requires_grad


def objective(gate: Gate, *parts: Tensor) -> Tensor:
    """Objective of several calls; squared, because the weights of a token sum to 1."""
    return torch.stack([gate(part).weight.square().sum() for part in parts]).sum()


@every_gate
def test_an_unread_loss_is_not_added_to_the_next_step(name: str) -> None:
    gate, x, y = make(name), draw(N, D), draw(N, D, seed=9)
    apart = [call(gate, part)[2] for part in (x, y)]
    objective(gate, x, y).backward()
    assert gate.has_loss, "it can still be read"
    torch.manual_seed(1)
    total = gate(x).weight.square().sum()
    torch.manual_seed(1)
    total = total + gate(y).weight.square().sum()
    loss = gate.get_loss()
    torch.testing.assert_close(loss, sum(apart), msg="the sum of exactly these two calls")
    (total + loss).backward()

    objective(gate, x).backward()
    gate.eval()
    gate(y)
    expected = call(gate, y)[2]
    objective(gate.train(), x).backward()
    gate.eval()
    gate(y)
    assert gate.get_loss() == expected, "the loss of a later evaluation"


def test_the_backward_pass_of_another_step_clears_no_losses() -> None:
    """Overlapping steps: the second starts before the backward of the first."""
    gate, x, y = make("gshard"), draw(N, D), draw(N, D, seed=9)
    apart = [call(gate, part)[2] for part in (x, y)]
    first, of_first = gate(x).weight.square().sum(), gate.get_loss()
    torch.manual_seed(1)
    second = gate(x).weight.square().sum()
    (first + of_first).backward()
    torch.manual_seed(1)
    second = second + gate(y).weight.square().sum()
    loss = gate.get_loss()
    torch.testing.assert_close(loss, sum(apart))
    (second + loss).backward()
    assert not gate.has_loss


def test_unread_losses_keep_no_graphs_alive() -> None:
    gate, x = make("gshard"), draw(4, D)
    first = draw(4, D).requires_grad_()
    graph = weakref.ref(first)
    out = objective(gate, first)
    del first
    assert graph() is not None, "control: the graph is needed until then"
    out.backward()
    del out
    gate(x)
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_count_twice(reentrant: bool) -> None:
    gate, x = make("gshard"), draw(N, D).requires_grad_()
    expected = call(gate, x)[2]

    def weights(x: Tensor) -> Tensor:
        return gate(x).weight

    def gradients(weight: Tensor) -> tuple[Tensor, ...]:
        loss = gate.get_loss()
        assert loss == expected
        total = weight[:, 0].sum() + (0.0 if reentrant else loss)
        for parameter in gate.parameters():
            parameter.grad = None
        total.backward()
        assert gate.get_loss() is None
        return tuple(p.grad for p in gate.parameters() if p.grad is not None)

    again = gradients(torch.utils.checkpoint.checkpoint(weights, x, use_reentrant=reentrant))
    torch.testing.assert_close(again, gradients(weights(x)))


def hot(gate: Gate, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a step under autocast in which all tokens choose the same expert, with all logits and noise."""
    tokens = 70000
    x = draw(tokens, D)
    noise = draw(tokens, gate.tot_expert, seed=4)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.mul_(0.1)
        if isinstance(gate, NaiveGate):
            gate.gate.bias[1] += 9.0
    with torch.autocast("cpu", dtype=dtype), mock.patch.object(torch, "randn_like") as drawn:
        drawn.side_effect = lambda like: noise.to(like.dtype)
        gate(x)
        logits = gate.clean_logits(x)
    return gate.get_loss().detach(), logits.detach(), noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gshard", "switch"])
def test_balance_loss_is_not_counted_in_half(name: str, dtype: torch.dtype) -> None:
    gate = make(name)
    if isinstance(gate, SwitchGate):
        gate.switch_eps = 0.0
    loss, logits, _ = hot(gate, dtype)
    p = logits.double().softmax(dim=1)
    shares = torch.nn.functional.one_hot(logits.argmax(dim=1), E).double().mean(dim=0)
    assert shares[1] > 0.99
    exact = E * (shares * p.mean(dim=0)).sum()
    own = E * (shares.float() * p.float().mean(dim=0)).sum()
    assert_within_budget(loss, own, exact, name)
    assert_outside_budget(loss.to(dtype), own, exact, "a loss of half precision")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noisy_loss_is_not_counted_in_half(dtype: torch.dtype) -> None:
    gate = make("noisy")
    with torch.no_grad():
        # A deviation of about 1e-2; the formula uses the value that half precision represents.
        gate.w_noise.zero_()
    loss, clean, noise = hot(gate, dtype)
    deviation = torch.nn.functional.softplus(torch.zeros((), dtype=dtype)) + gate.noise_epsilon
    noisy = clean + noise.to(dtype) * deviation
    best, order = noisy.sort(dim=1, descending=True, stable=True)
    results = []
    for kind in (torch.float32, torch.float64):
        weight = best[:, :2].to(kind).softmax(dim=1).to(dtype).to(kind)
        importance = torch.zeros(E, dtype=kind).scatter_add_(
            0, order[:, :2].flatten(), weight.flatten()
        )
        rival = torch.where(noisy > best[:, 2:3], best[:, 2:3], best[:, 1:2]).to(kind)
        load = torch.special.ndtr((clean.to(kind) - rival) / deviation.to(kind)).sum(dim=0)
        results.append(variation(importance) + variation(load))
    own, exact = results
    assert_within_budget(loss, own, exact, "noisy")
    assert_outside_budget(loss.to(dtype), own, exact, "a loss of half precision")
