"""Tests of layers with quantized, wrapped or converted parts: right, or refused by name."""

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


def fast(**options: Any) -> InteractionMoE:
    return InteractionMoE(2, fusion(), hidden_dim=16, **options).eval()


def dynamic(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)


def prepared(layer: Any) -> nn.Module:
    layer.qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.prepare(layer)


def converted(layer: Any) -> nn.Module:
    return torch.ao.quantization.convert(prepared(layer))


class Packed(nn.Linear):
    """A quantized map: a Linear without the parameter `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


class Adapted(nn.Module):
    """A low-rank adapter around a Linear, whose weight it shows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Hidden(nn.Module):
    """A wrapper that neither registers nor shows the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.held = (linear,)

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


def replaced(kind: type[nn.Module], where: str) -> Change:
    def change(layer: nn.Module) -> nn.Module:
        for name, part in list(layer.named_modules()):
            for key, child in list(part.named_children()):
                if isinstance(child, nn.Linear) and where in f"{name}.{key}":
                    setattr(part, key, kind(child))
        return layer

    return change


CHANGES: list[tuple[str, Change]] = [("dynamic", dynamic), ("prepared", prepared)]
CHANGES += [("converted", converted)]
CHANGES += [
    (f"{kind.__name__}, {where}", replaced(kind, f"fusion_model.network.{layer}.{where}"))
    for kind in (Packed, Adapted, Hidden)
    for layer, where in ((0, "attn.q"), (0, "attn.proj"), (0, "mlp.network"), (1, "fc"))
]


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in CHANGES])
@pytest.mark.parametrize("call", ["forward", "inference"])
def test_replaced_maps_are_refused_by_name(change: Change, call: str) -> None:
    layer = change(fast())
    with pytest.raises(UnsupportedLayer) as refused:
        getattr(layer, call)(X)
    assert re.search(PART, str(refused.value)), str(refused.value)
    assert "backend='reference'" in str(refused.value)


@pytest.mark.parametrize("kind", [Packed, Adapted, Hidden])
def test_replaced_maps_of_the_reweighting_are_called(kind: type[nn.Module]) -> None:
    layer = fast()
    before = layer.inference(X)[1]
    layer = replaced(kind, "reweight")(layer)
    found = layer.inference(X)[1]
    assert (found - before).abs().max() > 1e-4 or kind is not Adapted
    layer.backend = "reference"
    torch.testing.assert_close(found, layer.inference(X)[1])


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in CHANGES])
def test_the_reference_backend_calls_replaced_maps(change: Change) -> None:
    """The refusal recommends it."""
    if change is converted:
        pytest.skip("statically quantized maps take quantized tensors only")
    layer = fast(backend="reference")
    expected = layer.inference(X)[2]
    found = change(layer).inference(X)[2]
    # Adapters change the result, quantization by less than a rounding to 8 bits of each map.
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 1.0


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_converted_as_a_whole_computes_in_its_dtype(dtype: torch.dtype) -> None:
    layer = fast()
    expected = layer.inference(X)[2]
    found = layer.to(dtype).inference([x.to(dtype) for x in X])[2]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("part", ["reweight", "interaction_experts.1"])
def test_a_part_of_another_dtype_is_refused(part: str) -> None:
    layer = fast()
    layer.get_submodule(part).double()
    with pytest.raises((UnsupportedLayer, RuntimeError), match=r"dtype|float64"):
        layer.inference(X)


def test_fused_maps_are_honoured() -> None:
    """torch.nn.utils.fusion makes an ordinary Linear with other values."""
    layer = fast()
    network = layer.reweight.mlp.network
    before = layer.inference(X)[1]
    norm = nn.BatchNorm1d(network[0].out_features).eval()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    network[0] = nn.utils.fusion.fuse_linear_bn_eval(network[0], norm)
    found = layer.inference(X)[1]
    expected = InteractionMoE.adopt(layer, backend="reference").eval().inference(X)[1]
    torch.testing.assert_close(found, expected)
    assert (found - before).abs().max() > 1e-4
