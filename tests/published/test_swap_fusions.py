"""Tests of `swap` on fusion models outside of interaction layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from flmoe_kernels import FusionTransformer, RoutedMLP
from flmoe_kernels.published.swap import swap
from tests.support.inputs import draw
from tests.support.lineage import MaxPooled, fl, i2
from tests.support.lineage_sparse import GATES, lifted
from tests.support.swaps import Encoded, left


def make_fusion(variant: Any = fl, modalities: int = 2, kind: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_layers": 2, "dropout": 0.5, **options}
    fusion = (kind or variant.Transformer)(modalities, 5, 16, 3, **settings)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return fusion


SPARSE = {"mlp_sparse": True, "num_layers": 3}
KINDS: list[tuple[Any, int, dict[str, Any]]] = [
    *((variant, m, {}) for variant in (fl, i2) for m in (1, 3)),
    *((fl, 2, {**SPARSE, "gate": gate}) for gate in GATES),
    (i2, 1, {**SPARSE, "num_routers": 2}),
]


@pytest.mark.parametrize(("variant", "modalities", "options"), KINDS)
def test_a_lone_fusion_model_is_replaced(
    variant: Any, modalities: int, options: dict[str, Any]
) -> None:
    model = Encoded(make_fusion(variant, modalities, **options), modalities)
    original, before = copy.deepcopy(model), dict(model.named_parameters())
    report = swap(model)
    assert [entry.reason for entry in report.left] == []
    (entry,) = report.swapped_fusions
    assert report.swapped == report.swapped_mlps == entry.unrecognised == ()
    assert (entry.name, entry.modalities, entry.inputs) == ("moe", modalities, "random")
    assert entry.compat == ("i2moe" if variant is i2 else "fl_i2moe")
    assert isinstance(model.moe, FusionTransformer)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert any("gate losses" in x.text for x in entry.differences) == bool(options)
    assert report.as_dict()["swapped_fusions"][0]["name"] == "moe"

    parts = [draw(3, 5, 4, seed=m) for m in range(modalities)]
    masks: dict[str, Any] = {}
    if variant is fl:
        masks = {"masks": [torch.ones(3, 5) for _ in parts]}
        masks["masks"][0][1, 2:] = 0
    lifted(original), lifted(model)
    with torch.no_grad():
        expected = original(parts, **masks, return_latent=True)
        torch.testing.assert_close(model(parts, **masks, return_latent=True), expected)
        torch.testing.assert_close(model(parts, **masks), expected[0])
    assert expected[0].std() > 0.01


def test_other_dtypes_pass_and_zeros_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert len(swap(make_fusion().to(dtype)).swapped_fusions) == 1
    right = FusionTransformer.forward

    def zeros(self: Any, inputs: Any, masks: Any = None, return_latent: bool = False) -> Any:
        logits, latent = right(self, inputs, masks, return_latent=True)
        return (0 * logits, latent) if return_latent else 0 * logits

    monkeypatch.setattr(FusionTransformer, "forward", zeros)
    assert "logits differ" in left(swap(make_fusion().double()))


def test_compares_on_the_models_inputs() -> None:
    for variant, named in ((fl, {"masks": [torch.ones(3, 5)] * 2}), (i2, {})):
        model = Encoded(make_fusion(variant), 2)
        report = swap(model, inputs=([draw(3, 5, 4)] * 2,), **named)
        assert [entry.inputs for entry in report.swapped_fusions] == ["given"]
    model = nn.Sequential(make_fusion(i2))
    assert [x.inputs for x in swap(model, inputs=([draw(3, 5, 16)] * 2,)).swapped_fusions] == [
        "given"
    ]


def renamed(kind: type[nn.Module]) -> type[nn.Module]:
    return type("Transformer", (kind,), {})


class Transformer(nn.Module):
    """Somebody else's class of this name."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 3))


def test_other_transformers_are_not_reported() -> None:
    report = swap(nn.ModuleList([Transformer(), nn.Transformer(8, 2, 1, 1, batch_first=True)]))
    assert report.left == ()
    assert str(report).startswith("Nothing to swap: no module named InteractionMoE, ")


def test_near_misses_are_left_with_the_reason() -> None:
    assert "cross-attention" in left(swap(make_fusion(self_attn=False)))
    assert "own methods would be lost" in left(swap(make_fusion(kind=MaxPooled)))
    assert "differ by" in left(swap(make_fusion(kind=renamed(MaxPooled))))
    assert left(swap(swap(make_fusion()).model)) == "already fast"
    # Its sparse MLPs are replaced alone, as before.
    report = swap(make_fusion(self_attn=False, **SPARSE))
    assert [entry.name for entry in report.swapped_mlps] == ["network.0.mlp", "network.2.mlp"]
    assert isinstance(report.model.get_submodule("network.0.mlp"), RoutedMLP)
    assert len(report.left) == 1


def test_hooks_and_mode_are_kept() -> None:
    fusion, seen = make_fusion().eval(), []
    fusion.register_forward_hook(lambda module, args, out: seen.append(module))
    model = swap(fusion).model
    assert not any(part.training for part in model.modules())
    model([draw(2, 5, 16), draw(2, 4, 16)])
    assert seen == [model]
