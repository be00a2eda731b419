"""Tests of `swap`: replaced layers, kept state, results of the fast layers."""

from __future__ import annotations

import copy
import functools
import re
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.build import build
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.published.report import SwapReport
from flmoe_kernels.published.swap import ROOT, swap
from tests.support.inputs import draw
from tests.support.lineage import fl, i2, make_layer, make_sparse_layer
from tests.support.lineage_sparse import GATES, lifted, make_mlp
from tests.support.swaps import Encoded

LENGTHS = {fl: (7, 5, 3), i2: (5, 5, 5)}


def tokens(variant: Any, modalities: int = 2, width: int = 16, batch: int = 3) -> list[Tensor]:
    lengths = LENGTHS[variant][:modalities]
    return [draw(batch, n, width, seed=7 + m) for m, n in enumerate(lengths)]


def masks_for(parts: list[Tensor]) -> list[Tensor]:
    masks = [torch.ones(x.shape[:2]) for x in parts]
    for mask in masks:
        mask[0, 2:] = 0
    masks[-1][1] = 0
    return masks


def assert_swapped(report: SwapReport, layers: int = 1, mlps: int = 0) -> None:
    assert [entry.reason for entry in report.left] == []
    assert (len(report.swapped), len(report.swapped_mlps)) == (layers, mlps)
    entries = (*report.swapped, *report.swapped_mlps)
    assert [entry.unrecognised for entry in entries] == [()] * len(entries)


PUBLISHED = [
    *((v, {"modalities": m, "sparse": m == 3}) for v in (fl, i2) for m in (2, 3)),
    *((fl, {"gate": gate, "num_routers": 2}) for gate in GATES),
    (i2, {"gate": "GShardGate", "num_routers": 2}),
]


@pytest.mark.parametrize(("variant", "options"), PUBLISHED)
def test_results_agree_with_the_original(variant: Any, options: dict[str, Any]) -> None:
    layer = (make_sparse_layer if "gate" in options else make_layer)(variant, **options).eval()
    modalities = layer.num_modalities
    original = copy.deepcopy(layer)
    before = dict(layer.named_parameters())
    report = swap(layer)
    assert_swapped(report)
    fast = report.model
    assert isinstance(fast, InteractionMoE)
    assert all(value is before[name] for name, value in fast.named_parameters())
    assert list(fast.state_dict()) == list(original.state_dict())
    entry = report.swapped[0]
    assert (entry.name, entry.experts, entry.inputs) == (ROOT, modalities + 2, "random")
    assert entry.compat == ("i2moe" if variant is i2 else "fl_i2moe")
    assert entry.speed_up is not None
    assert entry.speed_up > 0
    assert (entry.latents_error is None) == (variant is i2)

    inputs = tokens(variant, modalities)
    calls: list[tuple] = [(inputs,)]
    if variant is fl:
        calls.append((inputs, masks_for(inputs)))
    lifted(original), lifted(fast)
    with torch.no_grad():
        for call in calls:
            expected, found = original.inference(*call), fast.inference(*call)
            torch.testing.assert_close(found, expected)
            assert expected[2].std() > 0.01


@pytest.mark.parametrize("mode", [True, False])
def test_swaps_the_reference_layer_and_keeps_the_mode(mode: bool) -> None:
    spec = describe(make_layer())
    net = Encoded(build(spec, 2)).train(mode)
    report = swap(net)
    assert_swapped(report)
    assert report.model is net
    assert isinstance(net.moe, InteractionMoE)
    assert all(part.training is mode for part in net.modules())


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = make_layer(seed=1)
        self.deep = nn.Sequential(
            nn.Sequential(nn.ModuleDict({"net": Encoded(make_layer(seed=2))}))
        )
        self.several = nn.ModuleList([make_layer(i2, seed=3), nn.Identity(), shared])
        self.again = shared
        self.unregistered = [{"teacher": make_layer(seed=4)}, shared]
        self.called = functools.partial(print, layer=shared)
        self.plain = types.SimpleNamespace(layers=[shared])
        object.__setattr__(self, "shortcut", shared)


def test_finds_layers_anywhere_in_the_model() -> None:
    model = Holder()
    report = swap(model)
    assert_swapped(report, 4)
    assert report.model is model
    fast = model.again
    assert model.several[2] is fast
    assert model.unregistered[1] is fast
    assert vars(model)["shortcut"] is fast
    assert model.called.keywords["layer"] is model.plain.layers[0] is fast
    places = (
        fast,
        model.deep[0][0]["net"].moe,
        model.several[0],
        model.unregistered[0]["teacher"],
    )
    assert all(isinstance(place, InteractionMoE) for place in places)
    assert len({id(place) for place in places}) == 4
    names = {name for entry in report.swapped for name in entry.name.split(", ")}
    held = "several.0 several.2 again unregistered.1 shortcut unregistered.0.teacher"
    held += " called.keywords.layer plain.layers.0"
    assert names == {"deep.0.0.net.moe", *held.split()}


def test_shares_parameters_so_that_an_older_optimizer_trains_the_layer() -> None:
    net = Encoded(make_layer(dropout=0.0))
    before = dict(net.named_parameters())
    net.moe.reweight.requires_grad_(False)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.02)
    assert_swapped(swap(net))
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert {name for name, p in after.items() if not p.requires_grad} == frozen
    assert frozen

    kept = {name: p.detach().clone() for name, p in after.items()}
    batch, target = tokens(fl, width=4, batch=6), torch.arange(6) % 3
    losses = []
    for _ in range(12):
        out = net(batch)
        loss = nn.functional.cross_entropy(out[2], target) + 0.1 * sum(out[3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, p in after.items() if not torch.equal(p, kept[name])}
    assert changed == after.keys() - frozen


def called_by_each_kind_of_hook(layer: nn.Module, seen: list) -> list:
    """Register hooks of every kind; each records its kind and its module."""

    def note(kind: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            seen.append((kind, module))

        return hook

    return [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(note("forward with kwargs"), with_kwargs=True),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state_dict pre")),
        layer.register_state_dict_post_hook(note("state_dict post")),
        layer.register_load_state_dict_pre_hook(note("load pre")),
        layer.register_load_state_dict_post_hook(note("load post")),
    ]


def test_hooks_of_every_kind_fire_after_the_swap_with_the_fast_layer() -> None:
    net, seen = Encoded(make_layer(dropout=0.0)), []
    handles = called_by_each_kind_of_hook(net.moe, seen)
    net.moe.tag = "text and image"
    assert_swapped(swap(net))
    fast = net.moe
    assert isinstance(fast, InteractionMoE)
    assert fast.tag == "text and image", "attributes are kept too"
    assert seen == []

    inputs = tokens(fl, width=4)
    net(inputs)[2].sum().backward()
    net.load_state_dict(net.state_dict())
    assert {kind for kind, _ in seen} == {
        *("pre", "pre with kwargs", "forward", "forward with kwargs", "backward pre", "backward"),
        *("state_dict pre", "state_dict post", "load pre", "load post"),
    }
    assert {id(module) for _, module in seen} == {id(fast)}

    for handle in handles:
        handle.remove()
    seen.clear()
    net(inputs)[2].sum().backward()
    net.load_state_dict(net.state_dict())
    assert seen == []


def test_the_report_has_each_kind() -> None:
    model = nn.ModuleDict({"moe": make_layer(), "odd": make_layer(self_attn=False)})
    model.update({"a": make_mlp(), "b": make_mlp("SwitchGate")})
    report = swap(model)
    assert str(report).startswith("3 layers swapped, 1 left as is.")
    entry = report.as_dict()
    assert set(entry) == {"swapped", "swapped_fusions", "swapped_mlps", "left"}
    assert entry["swapped"][0]["name"] == "moe"
    assert entry["swapped_mlps"][1]["gate"] == "SwitchGate"
    assert entry["left"][0]["class_name"] == "InteractionMoE"


def test_nothing_to_swap() -> None:
    model = nn.Linear(2, 2)
    report = swap(model)
    assert report.model is model
    assert report.swapped == report.left == ()
    assert re.match(
        "Nothing to swap: .*Transformer .*FMoETransformerMLP in this Linear", str(report)
    )
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        swap([make_layer()])
    net = Encoded(make_layer())
    swap(net)
    fast = net.moe
    report = swap(net)
    assert net.moe is fast
    assert [(entry.name, entry.reason) for entry in report.left] == [("moe", "already fast")]
    assert report.swapped == ()


def test_without_check_nothing_is_compared() -> None:
    report = swap(nn.ModuleList([make_layer(), make_mlp()]), check=False)
    assert_swapped(report, 1, 1)
    assert isinstance(report.model[0], ReferenceInteractionMoE)
    layer, mlp = report.swapped[0], report.swapped_mlps[0]
    assert (layer.inputs, layer.logits_error, layer.speed_up) == ("-", None, None)
    assert (mlp.inputs, mlp.output_error, mlp.speed_up) == ("-", None, None)
