"""Tests of layers that `swap` does not replace, and of its reasons."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import RoutedMLP
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.published.swap import swap
from tests.support import lineage_sparse
from tests.support.lineage import MaxPooled, fl, make_layer, make_sparse_layer
from tests.support.lineage_sparse import FMoETransformerMLP, make_mlp
from tests.support.swaps import Make, left, snapshot


def changed(change: Callable[[Any], Any], make: Make = make_layer, **options: Any) -> Make:
    """Make a layer and change it."""

    def made() -> nn.Module:
        layer = make(**options)
        with torch.no_grad():
            change(layer)
        return layer

    return made


def changed_mlp(change: Callable[[Any], Any], gate: str = "GShardGate", **options: Any) -> Make:
    return changed(change, make_mlp, gate=gate, **options)


def disguised(kind: type[nn.Module]) -> Make:
    """A layer with the published name and structure but another forward."""
    return changed(lambda layer: setattr(layer, "__class__", type("InteractionMoE", (kind,), {})))


def as_gate(kind: type[nn.Module], name: str = "GShardGate", make: Make = make_mlp) -> Make:
    """The same for gates of a sparse MLP or layer."""

    def change(layer: nn.Module) -> None:
        for part in layer.modules():
            if type(part) is lineage_sparse.GShardGate:
                part.__class__ = type(name, (kind,), {})

    return changed(change, make)


def put(module: nn.Module, owner: str, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(module.get_submodule(owner), name, value)


class OwnMethods(fl.InteractionMoE):
    def explain(self) -> str:
        return "what a fast layer would not have"


class OwnMLP(FMoETransformerMLP):
    pass


class ZeroFilled(fl.InteractionMoE):
    """Replaces a modality by zeros: the fusion agrees, but the views in training differ."""

    def forward(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
        class Zeros(torch.overrides.TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                func = torch.zeros_like if func is torch.randn_like else func
                return func(*args, **(kwargs or {}))

        with Zeros():
            return super().forward(inputs, masks)


class OtherLoss(fl.InteractionMoE):
    def forward(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
        *head, losses, latents = super().forward(inputs, masks)
        return (*head, [*losses[:-1], 1.01 * losses[-1]], latents)


class OtherInference(fl.InteractionMoE):
    def inference(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
        logits, weights, mixed = super().inference(inputs, masks)
        return logits, weights, mixed.softmax(dim=1)


class FewerOutputs(fl.InteractionMoE):
    def forward(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
        return super().forward(inputs, masks)[:3]


class Fails(fl.InteractionMoE):
    def forward(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
        raise KeyError("language\nand more")


class UniformWeights(lineage_sparse.GShardGate):
    """Chooses like the published gate but computes other weights."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = super().forward(x)
        return index, torch.full_like(weight, 0.5)


other_pooling = functools.partial(make_layer, fusion=MaxPooled)
other_gate = as_gate(UniformWeights, make=functools.partial(make_sparse_layer, num_experts=2))
LAYERS: list[tuple[Make, str]] = [
    (
        lambda: make_layer(mlp_sparse=True, apart=True),
        r"network.0.mlp.experts: every expert has separate parameters \(FastMoE",
    ),
    (lambda: make_layer(self_attn=False), "cross-attention"),
    (changed(lambda x: setattr(x, "__class__", OwnMethods)), "own methods would be"),
    (
        changed(lambda x: x.interaction_experts[0].fusion_model.register_forward_hook(print)),
        "has a forward hook",
    ),
    (
        changed(lambda x: x.reweight.register_load_state_dict_post_hook(print)),
        "reweight: has a hook, which would never run",
    ),
    (changed(lambda x: x.interaction_experts.eval()), "one mode"),
    (changed(lambda x: x.compile(backend="eager")), "swap first, then compile"),
    (other_pooling, "differ by .* allowed"),
    (other_gate, "differ by .* allowed"),
    (disguised(ZeroFilled), "replacement with torch.randn_like per view"),
    (disguised(OtherLoss), "the layer's losses differ by"),
    (disguised(OtherInference), "logits differ by"),
    (disguised(FewerOutputs), "returns 3 values, expected 5"),
    (disguised(Fails), r"the layer's forward fails: KeyError: 'language\\nand more'"),
    (changed(lambda x: x.reweight.mlp.network[0].weight[0, 0].fill_(float("nan"))), "not finite"),
]
MLPS: list[tuple[Make, str]] = [
    (lambda: make_mlp(apart=True), "experts: every expert has separate"),
    (lambda: make_mlp(gate_hook=print), "gate_hook: set, but RoutedMLP does"),
    (lambda: make_mlp(mask=torch.zeros(3)), "mask: set"),
    (changed_mlp(lambda m: put(m, "", world_size=2)), "world_size: expected 1, got 2"),
    (changed_mlp(lambda m: setattr(m, "__class__", OwnMLP)), "own methods"),
    (as_gate(lineage_sparse.GShardGate, "DCGate"), "gate: expected one of NaiveGate, .* DCGate"),
    (as_gate(UniformWeights), "outputs differ by"),
    (
        changed_mlp(lambda m: [put(m, path, top_k=1) for path in ("", "gate")]),
        "top_k: expected 2, got 1",
    ),
    (
        changed_mlp(lambda m: put(m, "experts", activation=nn.Tanh())),
        "experts.activation: expected nn.GELU, .* got Tanh",
    ),
    (
        changed_mlp(lambda m: delattr(m.gate, "switch_eps"), "SwitchGate"),
        "all_gates.0.switch_eps: missing, but a SwitchGate needs it",
    ),
    (changed_mlp(lambda m: put(m, "experts.htoh4", bias=None)), "htoh4.bias"),
    (
        changed_mlp(lambda m: put(m, "gate", temperature=nn.Parameter(torch.ones(1)))),
        r"(gate|all_gates.0).temperature: an unexpected parameter",
    ),
    (
        changed_mlp(lambda m: m.all_gates.update({"1": lineage_sparse.NaiveGate(16, 5, 1)})),
        "all_gates.1: expected GShardGate, got NaiveGate",
    ),
    (
        changed_mlp(lambda m: setattr(m, "gate", lineage_sparse.GShardGate(16, 5, 1))),
        "all_gates.0: not the gate itself",
    ),
    (changed_mlp(lambda m: m.gate.double()), "parameters differ in dtype"),
    (changed_mlp(lambda m: m.gate.eval()), "in eval mode while the layer is in tr"),
    (changed_mlp(lambda m: setattr(m.gate, "forward", print)), "forward: replaced"),
]


@pytest.mark.parametrize(("make", "reason"), LAYERS + MLPS)
def test_refused_layers_are_unchanged(make: Make, reason: str) -> None:
    layer, neighbour = make(), make_mlp(seed=3)
    layer.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"odd": layer, "good": neighbour, "odd again": layer})
    before = snapshot(layer)
    report = swap(model, strict=False)
    assert snapshot(layer) == before
    assert model["odd"] is model["odd again"] is layer
    assert isinstance(model["good"], RoutedMLP)
    assert [entry.name for entry in report.swapped_mlps] == ["good"]
    assert [(entry.name, entry.class_name) for entry in report.left] == [
        ("odd, odd again", type(layer).__name__)
    ]
    assert re.search(reason, report.left[0].reason), report.left[0].reason

    alone = swap(layer, strict=False)
    assert alone.model is layer
    assert re.search(reason, left(alone))


@pytest.mark.parametrize("make", [other_pooling, other_gate])
def test_only_the_check_detects_another_forward(make: Make) -> None:
    assert isinstance(swap(make(), check=False, strict=False).model, InteractionMoE)


@dataclasses.dataclass
class Box:
    layer: Any


def calling(layer: nn.Module) -> Callable[[Any], Any]:
    return lambda x: layer(x)


HOLDERS: list[tuple[Callable[[nn.Module], Any], str, str]] = [
    (lambda x: (1, x), "held.1", "in a tuple"),
    (lambda x: {"a": [(0, x)]}, "held.a.0.1", "in a tuple"),
    (Box, "held.layer", "held by a Box"),
    (lambda x: x.forward, "held", "held by its method forward"),
    (calling, "held.layer", "held by the function calling"),
    (functools.partial, "held.func", "held by a functools.partial"),
]


@pytest.mark.parametrize(("hold", "path", "reason"), HOLDERS)
def test_layers_at_places_that_cannot_be_changed_are_reported(
    hold: Callable[[nn.Module], Any], path: str, reason: str
) -> None:
    """The holder would keep the original, which train() no longer reaches."""
    model, layer = nn.Module(), make_layer()
    model.layer = layer
    # Not by setattr, which would register a module.
    model.__dict__["held"] = held = hold(layer)
    report = swap(model, check=False)
    assert re.search(f"^{path}: {reason}", left(report)), left(report)
    assert report.left[0].name == f"layer, {path}"
    assert model.held is held
    assert model.layer is layer


def test_a_hook_that_calls_the_layer_is_reported() -> None:
    model = nn.Module()
    model.layer, model.other = make_layer(), nn.Linear(2, 2)
    model.other.register_forward_hook(calling(model.layer))
    assert "other._forward_hooks.layer: held by the function" in left(swap(model, check=False))


def test_models_that_refer_to_themselves_end() -> None:
    model = nn.Module()
    model.layer = make_layer()
    model.held = (model, Box(model), [model])
    model.held[2].append(model.held)
    assert [entry.name for entry in swap(model, check=False).swapped] == ["layer"]


def test_layers_in_data_parallel_wrappers_are_replaced() -> None:
    for model in (nn.DataParallel(make_layer()), nn.DataParallel(nn.Sequential(make_layer()))):
        report = swap(model, check=False)
        assert len(report.swapped) == 1
        assert report.left == ()


def test_layers_inside_compiled_modules_are_not_replaced() -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="eager")
    assert "swap first" in left(swap(compiled))
    assert compiled._orig_mod is layer
