"""Tests of layers with hooks, derived methods or replaced parts: explanations are of what the layer returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from flmoe_kernels import InteractionMoE, PairInteractionMoE
from flmoe_kernels.explain import TwoAdditiveGame, attribute, probe_pairs, shapley_interactions
from flmoe_kernels.explain.games.models import is_plain_pair_layer
from tests.support.explain_games import interaction_layer
from tests.support.inputs import draw
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_inputs, pair_layer

LENGTHS = (3, 2)
CASE = LayerCase(LENGTHS, batch=1)
EXPERT = 1


def moved(inputs: Any) -> list[Tensor]:
    """Inputs plus positions."""
    return [x + 2 * draw(*x.shape[1:], seed=9) for x in inputs]


def scaled(out: Any) -> Any:
    """The layer's result with other logits."""
    if isinstance(out, tuple) and hasattr(out, "_replace"):
        return out._replace(logits=3 * out.logits, expert_logits=2 * out.expert_logits)
    experts = [[(2 * logits, latent) for logits, latent in views] for views in out[0]]
    return (experts, out[1], 3 * out[2] + 1, *out[3:])


class Positions(PairInteractionMoE):
    def forward(self, inputs: Any, masks: Any = None, **options: Any) -> Any:
        return super().forward(moved(inputs), masks, **options)


class Scaled(InteractionMoE):
    def forward(self, *args: Any, **options: Any) -> Any:
        return scaled(super().forward(*args, **options))


class Inference(InteractionMoE):
    def inference(self, *args: Any) -> Any:
        experts, weights, mixed = super().inference(*args)
        return [2 * x for x in experts], weights, 3 * mixed


class PositionNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + draw(*x.shape[1:], seed=9)


class Mixing(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.sum(dim=1, keepdim=True))


def _class(kind: type) -> Callable[[Any], Any]:
    return lambda layer: setattr(layer, "__class__", kind)


def _pre_hook(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda _, args: (moved(args[0]), *args[1:]))


def _hook(layer: Any) -> None:
    layer.register_forward_hook(lambda _, args, out: scaled(out))


def _forward(layer: Any) -> None:
    original = layer.forward
    layer.forward = lambda inputs, masks=None: original(moved(inputs), masks)


def _norms(kind: type[nn.LayerNorm]) -> Callable[[Any], Any]:
    def replace(layer: Any) -> None:
        for m, norm in enumerate(layer.norms):
            layer.norms[m] = kind(norm.normalized_shape, dtype=torch.float64).eval()

    return replace


def _projection(layer: Any) -> None:
    layer.projections[0]["a"].register_forward_hook(lambda _, args, y: y + draw(*y.shape[1:]))


# The layer, a change, and the part of the refusal that names it; no refusal: the parts are called.
CHANGES: dict[str, tuple[bool, Callable[[Any], Any], str]] = {
    "subclass of a pair layer": (True, _class(Positions), r"Positions\.forward is not that of"),
    "pre-hook on a pair layer": (True, _pre_hook, "forward pre-hook, _pre_hook"),
    "hook on a pair layer": (True, _hook, "forward hook, _hook"),
    "forward of a pair layer": (True, _forward, r"forward: replaced on this instance"),
    "norms with positions": (True, _norms(PositionNorm), ""),
    "norms that mix tokens": (True, _norms(Mixing), ""),
    "hook on a projection": (True, _projection, ""),
    "subclass": (False, _class(Scaled), r"Scaled\.forward is not that of"),
    "inference": (False, _class(Inference), r"Inference\.inference is not that of"),
    "pre-hook": (False, _pre_hook, "forward pre-hook, _pre_hook"),
    "hook": (False, _hook, "forward hook, _hook"),
    "forward": (False, _forward, r"forward: replaced on this instance"),
}


def layer_of(pairs: bool) -> tuple[Any, list[Tensor]]:
    if pairs:
        return pair_layer().eval(), pair_inputs(LENGTHS, batch=1)
    return interaction_layer(CASE), CASE.inputs(torch.float64)


def returned(layer: Any, expert: int | None, inputs: Any, masks: Any) -> Tensor:
    """Logits in the layer's own result."""
    if isinstance(layer, Inference):
        experts, _, logits = layer.inference(inputs, masks)
        return logits if expert is None else experts[expert]
    out = layer(inputs, masks)
    if isinstance(layer, PairInteractionMoE):
        return out.logits if expert is None else out.expert_logits[:, expert]
    return out[2] if expert is None else out[0][expert][0][0]


@pytest.mark.parametrize("expert", [None, EXPERT])
@pytest.mark.parametrize("output", ["logit", "log_prob"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_explained_function_is_what_the_layer_returns(
    name: str, output: str, expert: int | None
) -> None:
    pairs, change, _ = CHANGES[name]
    layer, x = layer_of(pairs)
    options: dict[str, Any] = {"target": 1, "output": output}
    before = shapley_interactions(layer, x, expert=expert, **options)[0]
    change(layer)
    result = shapley_interactions(layer, x, expert=expert, **options)[0]
    truth = shapley_interactions(lambda *given: returned(layer, expert, *given), x, **options)[0]
    assert result.method == truth.method == "exact"
    np.testing.assert_allclose(result.values, truth.values, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.value, truth.value, rtol=0, atol=1e-12)
    assert np.abs(before.values - truth.values).max() > 1e-3, "control: the change has an effect"


@pytest.mark.parametrize("name", [name for name, case in CHANGES.items() if case[2]])
def test_functions_that_do_not_call_the_layer_refuse_it(name: str) -> None:
    pairs, change, message = CHANGES[name]
    layer, x = layer_of(pairs)
    methods = ["integrated_gradients"] if pairs else ["gradient_rollout", "integrated_gradients"]
    change(layer)
    for method in methods:
        with pytest.raises(ValueError, match=message):
            attribute(layer, x, method=method, n_steps=2)
    if pairs:
        with pytest.raises(ValueError, match=message):
            layer.explain(x)
        with pytest.raises(ValueError, match=message):
            TwoAdditiveGame(layer, x)
        with pytest.raises(ValueError, match=rf"closed_form'; model.*{message}"):
            probe_pairs(layer, x, indices=("SII",), method="closed_form")


@pytest.mark.parametrize("replacement", ["mean", "noise"])
def test_a_hook_adds_no_views_and_draws_nothing(replacement: str) -> None:
    layer, x = layer_of(False)
    layer.replacement = replacement
    expected = shapley_interactions(layer, x, target=1)[0]
    layer.register_forward_hook(lambda *_: None)
    state = torch.get_rng_state()
    result = shapley_interactions(layer, x, target=1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(result.values, expected.values, rtol=0, atol=1e-12)
    assert layer.interaction_loss


@pytest.mark.parametrize("pairs", [True, False])
def test_results_without_logits_are_refused_with_the_reason(pairs: bool) -> None:
    layer, x = layer_of(pairs)
    layer.register_forward_hook(lambda *_: (torch.zeros(1, 3), torch.zeros(1, 3)))
    for expert in (None, EXPERT):
        with pytest.raises(TypeError, match="got tuple; model: has a forward hook"):
            shapley_interactions(layer, x, expert=expert)


class Harmless(PairInteractionMoE):
    def __init__(self) -> None:
        super().__init__((5, 4), num_classes=3)
        self.double()

    def summary(self) -> str:
        return "a method that no call runs"


def _removed(layer: Any) -> None:
    layer.register_forward_hook(lambda *_: None).remove()
    layer.forward = layer.forward  # as tools leave it that restore a method


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "subclass": lambda layer: Harmless(),
    "pruned head": lambda layer: prune.l1_unstructured(layer, "head", 0.5),
    "parametrized": lambda layer: parametrizations.weight_norm(layer, "head"),
    "pruned projection": lambda layer: prune.l1_unstructured(
        layer.projections[0]["a"], "weight", 0.5
    ),
    "restored": _removed,
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    # As torch's register_fsdp_forward_method leaves it.
    "wrapped explain": lambda layer: setattr(layer, "explain", partial(type(layer).explain, layer)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_changes_keep_the_closed_form(name: str) -> None:
    layer, x = layer_of(True)
    changed = HARMLESS[name](layer)
    layer = changed if isinstance(changed, PairInteractionMoE) else layer
    result = shapley_interactions(layer, x, target=1)[0]
    truth = shapley_interactions(lambda *given: layer(*given).logits, x, target=1)[0]
    assert (result.method, truth.method) == ("closed_form", "exact")
    np.testing.assert_allclose(result.values, truth.values, rtol=0, atol=1e-12)
    assert is_plain_pair_layer(layer)
    assert not is_plain_pair_layer(interaction_layer(CASE))
