"""Tests of layers with quantized or converted parts, which are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer, InteractionMoE, ReferenceInteractionMoE, swap
from flmoe_kernels.layers.parts import UnsupportedLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")

X = [torch.randn(2, 5, 16), torch.randn(2, 4, 16)]
# The refusal names a Linear by its path in the layer.
PART = r"(reweight\.mlp\.network|interaction_experts\.\d+\.fusion_model\.network)\.\d+"
Change = Callable[[Any], nn.Module]


def fusion() -> FusionTransformer:
    return FusionTransformer(2, 16, 3, num_layers=1, num_heads=2)


def fast() -> InteractionMoE:
    return InteractionMoE(2, fusion(), hidden_dim=16).eval()


def dynamic(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)


def converted(layer: Any) -> nn.Module:
    layer.qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.convert(torch.ao.quantization.prepare(layer))


class Packed(nn.Linear):
    """A quantized map: a Linear without the parameter `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


def packed(where: str) -> Change:
    def change(layer: nn.Module) -> nn.Module:
        for name, part in list(layer.named_modules()):
            for key, child in list(part.named_children()):
                if isinstance(child, nn.Linear) and where in f"{name}.{key}":
                    setattr(part, key, Packed(child))
        return layer

    return change


CHANGES: dict[str, Change] = {"dynamic": dynamic, "converted": converted}
CHANGES |= {place: packed(place) for place in ("attn.q", "attn.proj", "mlp.network", "fc")}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("call", ["forward", "inference"])
def test_quantized_maps_are_refused_by_name(name: str, call: str) -> None:
    layer = CHANGES[name](fast())
    with pytest.raises(UnsupportedLayer) as refused:
        getattr(layer, call)(X)
    assert re.search(PART, str(refused.value)), str(refused.value)
    assert "backend='reference'" in str(refused.value)


def test_the_published_layer_can_be_quantized_and_is_not_swapped() -> None:
    layer = ReferenceInteractionMoE(2, fusion(), hidden_dim=16, hidden_dim_rw=16).eval()
    expected = layer.inference(X)[2]
    model = dynamic(nn.ModuleDict({"layer": layer}))
    assert (model["layer"].inference(X)[2] - expected).abs().max() < 0.2
    report = swap(model)
    assert [entry.name for entry in report.left] == ["layer"]
    # Both classes are named Linear.
    assert "quantized" in report.left[0].reason, report.left[0].reason
    assert re.search(PART, report.left[0].reason)
