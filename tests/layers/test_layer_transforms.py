"""Tests of layers under torch.func: masks, ensembles, randomness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flmoe_kernels import InteractionMoE, RoutedMLP, expert_attention
from tests.support.inputs import cumulative
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_inputs, pair_layer
from tests.support.routed_layers import make
from tests.support.transform_cases import MASK, assert_equal, numbers

Function = Callable[..., Tensor]


@pytest.mark.parametrize("numeric", [False, True])
def test_masks_under_vmap(numeric: bool) -> None:
    masks = torch.stack([MASK, MASK.flip(0)])
    masks = masks.double() if numeric else masks
    pairs = pair_layer()
    interaction = InteractionMoE.adopt(LayerCase((3, 3), dim=4, batch=2).reference(torch.float64))
    x, y = pair_inputs((3, 2)), numbers((2, 3, 4), (2, 3, 4))
    calls: list[Function] = [
        lambda mask: pairs(x, [mask, None]).logits,
        lambda mask: interaction.eval().inference(y, [None, mask])[2],
    ]
    for call in calls:
        assert_equal([vmap(call)(masks)], [torch.stack([call(mask) for mask in masks])])


def ensembles() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    case = LayerCase((3, 3), dim=4, batch=2)
    x, pairs, rows = case.inputs(torch.float64), pair_inputs((3, 2)), numbers((5, 16))
    return {
        "InteractionMoE": (
            lambda: InteractionMoE.adopt(case.reference(torch.float64)),
            lambda call: call(list(x))[2],
        ),
        "PairInteractionMoE": (pair_layer, lambda call: call(pairs).logits),
        "RoutedMLP": (lambda: make().double(), lambda call: call(*rows)),
    }


@pytest.mark.parametrize("name", ensembles())
def test_ensembles_with_stacked_parameters(name: str) -> None:
    """torch.func.stack_module_state, with the template on the meta device as in torch's tutorial."""
    new, call = ensembles()[name]
    models = [new().eval() for _ in range(3)]
    for i, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data.add_(0.1 * i)
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    template = copy.deepcopy(models[0]).to("meta")

    def member(p: Any, b: Any) -> Tensor:
        return call(lambda *x: functional_call(template, (p, b), x))  # type: ignore[arg-type]

    # The noise of the views does not reach the logits.
    found = vmap(member, randomness="different")(parameters, buffers)
    assert_equal([found], [torch.stack([call(model) for model in models]).detach()])


def random_layers() -> dict[str, tuple[nn.Module, Sequence[Tensor]]]:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Any:
            return expert_attention(q, q, q, cumulative([6]), dropout_p=0.5)

    return {
        "dropout of attention": (Attention(), numbers((6, 2, 4))),
        "noise of a gate": (make("NoisyGate").double(), numbers((5, 16))),
    }


@pytest.mark.parametrize("name", random_layers())
def test_randomness_under_vmap(name: str) -> None:
    """As in torch: refused by default, "same" or "different" in the calls."""
    layer, inputs = random_layers()[name]
    twice = [torch.stack([x, x]) for x in inputs]

    def run(randomness: str) -> Tensor:
        return vmap(layer, randomness=randomness)(*twice)

    with pytest.raises(RuntimeError, match="randomness"):
        run("error")
    for part in layer.modules():
        if isinstance(part, RoutedMLP):
            part.gate_loss()
    same, different = run("same"), run("different")
    torch.testing.assert_close(same[0], same[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(different[0], different[1])
