"""Layers in programs that trace, copy, patch or replicate modules."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer, InteractionMoE
from flmoe_kernels.layers.interaction_moe import fusion, reference
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.layers import FL, I2, SPARSE_FL, LayerCase, data, fast_layer, named_outputs

SPARSE = dataclasses.replace(SPARSE_FL, layers=1, gate="NaiveGate")


class Inference(nn.Module):
    def __init__(self, layer: InteractionMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *x: Tensor) -> Tensor:
        return self.layer.inference(list(x))[2]


def encoder(layer: Any, e: int = 1) -> Any:
    return layer.interaction_experts[e].fusion_model.network[0]


def cold(case: LayerCase) -> tuple[InteractionMoE, list[Tensor], Tensor]:
    """A layer that was never called, its inputs, and the expected logits."""
    layer = fast_layer(case).eval()
    x = case.inputs()
    return layer, x, copy.deepcopy(layer).inference(x)[2]


@pytest.mark.parametrize(("case", "strict"), [(FL, True), (I2, False), (SPARSE, False)], ids=str)
def test_a_layer_is_exported_before_its_first_call(case: LayerCase, strict: bool) -> None:
    layer, x, expected = cold(case)
    program = torch.export.export(Inference(layer), tuple(x), strict=strict)
    torch.testing.assert_close(program.module()(*x), expected)
    torch.testing.assert_close(layer.inference(x)[2], expected)


def test_a_layer_is_traced_before_its_first_call() -> None:
    layer, x, expected = cold(FL)
    with torch.no_grad():
        traced = torch.jit.trace(Inference(layer), tuple(x))
        torch.testing.assert_close(traced(*x), expected)


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_a_copy_notices_its_own_changes(how: str) -> None:
    layer, x, expected = cold(FL)
    layer.inference(x)
    if how == "pickle":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = getattr(copy, how)(layer)
    torch.testing.assert_close(other.inference(x)[2], expected)
    encoder(other).attn.q.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayer, match=r"attn\.q: has a forward hook"):
        other.inference(x)
    if how != "copy":  # which shares the parts
        torch.testing.assert_close(layer.inference(x)[2], expected)


def replica_of(layer: InteractionMoE) -> InteractionMoE:
    """As torch.nn.parallel.replicate does it."""
    modules = dict(layer.named_modules(remove_duplicate=False))
    replicas = {name: part._replicate_for_data_parallel() for name, part in modules.items()}
    for name, part in modules.items():
        for child in part._modules:
            replicas[name]._modules[child] = replicas[f"{name}.{child}" if name else child]
        for key, value in part._parameters.items():
            if value is None:
                replicas[name]._parameters[key] = None
            else:
                setattr(replicas[name], key, value.detach().clone())
    return replicas[""]  # type: ignore[return-value]


@pytest.mark.parametrize("case", [FL, I2], ids=str)
def test_replicas_of_data_parallel(case: LayerCase) -> None:
    layer, x, expected = cold(case)
    for _ in range(2):
        torch.testing.assert_close(replica_of(layer).inference(x)[2], expected)
        layer.inference(x)
    with torch.no_grad():
        changed, reference = copy.deepcopy(layer), case.reference()
        for each in (changed, reference):
            for parameter in each.parameters():
                parameter.mul_(1.5)
    changed.inference(x)
    replica = replica_of(changed)
    for parameter in changed.parameters():
        parameter.data.zero_()  # a replica has weights of its own
    torch.testing.assert_close(replica.inference(x)[2], reference.eval().inference(x)[2])
    encoder(layer).attn.scale = 2.0
    with pytest.raises(UnsupportedLayer, match=r"attn\.scale"):
        replica_of(layer).inference(x)


class Halved(torch.Tensor):
    """A weight whose linear map differs, as of weight-only quantization."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 0.5 if func is torch.nn.functional.linear else out


def test_tensor_subclasses_with_functions_of_their_own_are_refused() -> None:
    layer, x, _ = cold(FL)
    layer.inference(x)
    linear = encoder(layer).attn.q
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Halved), requires_grad=False)
    with pytest.raises(UnsupportedLayer, match=r"attn\.q\.weight: .*Halved"):
        layer.inference(x)


class OtherFusion(FusionTransformer):
    def forward(self, inputs: Any, masks: Any = None) -> Any:
        return super().forward([2 * x for x in inputs], masks)


def test_a_template_with_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"OtherFusion\.forward is not that of this package"):
        InteractionMoE(2, OtherFusion(2, 16, 3, 1, 2), hidden_dim=16)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (fusion.EncoderLayer, "forward"),
        (reference.InteractionExpert, "forward_multiple"),
        (nn.LayerNorm, "forward"),
    ],
)
def test_methods_replaced_on_a_class_are_refused(
    kind: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, expected = cold(FL)
    layer.inference(x)
    original = getattr(kind, name)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, lambda *args: original(*args))
        with pytest.raises(UnsupportedLayer, match=kind.__name__):
            layer.inference(x)
    torch.testing.assert_close(layer.inference(x)[2], expected)


def shapes_of_experts(layer: Any) -> None:
    mlp = encoder(layer).mlp
    for linear in (mlp.experts.htoh4, mlp.experts.h4toh):
        for name, value in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(torch.cat([value, value]).detach()))


def rows_of_q_and_kv(layer: Any) -> None:
    attn = encoder(layer).attn
    attn.q.weight, attn.kv.weight = attn.kv.weight, attn.q.weight


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (SPARSE, shapes_of_experts, r"experts\.1.*mlp"),
        (FL, rows_of_q_and_kv, r"attn\.q\.weight: expected shape \(16, 16\), got \(32, 16\)"),
        (I2, lambda x: setattr(x.interaction_experts[1].fusion_model, "pos_embed", None), "compat"),
    ],
)
def test_parameters_of_another_shape_are_refused_by_name(
    case: LayerCase, change: Any, message: str
) -> None:
    layer, x, _ = cold(case)
    layer.inference(x)
    change(layer)
    for _ in range(2):
        with pytest.raises(UnsupportedLayer, match=message):
            layer.inference(x)


def test_modes_of_parts_are_adopted() -> None:
    case = dataclasses.replace(FL, dropout=0.5)
    published = case.reference()
    published.interaction_experts.eval()
    layer = InteractionMoE.adopt(published)
    x, masks, noise = data(case)
    layer.reweight.eval()
    first = named_outputs(layer(x, masks, replacements=noise))
    again = named_outputs(layer(x, masks, replacements=noise))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert layer.training
    assert not encoder(layer).dropout1.training


def test_wrong_arguments_of_the_constructor_are_named() -> None:
    template = FusionTransformer(2, 16, 3, 1)
    with pytest.raises(
        ValueError, match="hidden_dim: expected 16, the fusion model's width, got 256"
    ):
        InteractionMoE(2, template)
    with pytest.raises(
        ValueError, match="num_modalities: expected 2, as in the fusion model, got 3"
    ):
        InteractionMoE(3, template, hidden_dim=16)
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda"):
        InteractionMoE(2, template, hidden_dim=16, backend="gpu")
