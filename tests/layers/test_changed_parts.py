"""A part that is changed after construction is honoured or refused, never ignored."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.layers import FL, SPARSE_FL, LayerCase, data, fast_layer, named_outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")


class Wrapper(nn.Module):
    """A part inside another module, as adapters do it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for name, value in vars(inner).items():  # what the layer reads besides calling the part
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.inner)  # type: ignore[call-overload]

    def __getitem__(self, key: Any) -> Any:
        return self.inner[key]  # type: ignore[index]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return out * 1.5 if isinstance(out, torch.Tensor) else out


def subclass(part: nn.Module) -> None:
    part.__class__ = type(f"Other{type(part).__name__}", (type(part),), {})


def replace_forward(part: nn.Module) -> None:
    original = part.forward
    part.forward = lambda *args, **kwargs: original(*args, **kwargs)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda part: part.register_forward_hook(lambda *_: None),
    "forward pre hook": lambda part: part.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda part: part.register_full_backward_hook(lambda *_: None),
    "backward pre hook": lambda part: part.register_full_backward_pre_hook(lambda *_: None),
    "forward": replace_forward,
    "Other": subclass,
}


SPARSE = dataclasses.replace(SPARSE_FL, layers=1)


def parts_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The parts that the kernels do not call: those of one expert, and outside of the experts."""
    return {
        name: part
        for name, part in layer.named_modules()
        if name and not re.match(r"interaction_experts\.[023]|reweight\.mlp", name)
    }


def encoder(layer: Any, e: int = 1) -> Any:
    return layer.interaction_experts[e].fusion_model.network[0]


def assert_refused(layer: InteractionMoE, case: LayerCase, message: str) -> None:
    x, masks, _ = data(case)
    for run in (layer, layer.inference):
        with pytest.raises(UnsupportedLayer, match=message):
            run(x, masks)


def assert_honoured(layer: InteractionMoE, case: LayerCase) -> None:
    """The kernels and the reference backend give the same results."""
    x, masks, noise = data(case)
    actual = named_outputs(layer(x, masks, replacements=noise))
    layer.backend = "reference"
    expected = named_outputs(layer(x, masks, replacements=noise))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    layer.backend = "cpu"


@pytest.mark.parametrize("case", [FL, SPARSE], ids=["dense", "sparse"])
def test_a_hook_on_any_part_is_refused(case: LayerCase) -> None:
    layer = fast_layer(case)
    x, masks, _ = data(case)
    layer(x, masks)
    assert len(parts_of(layer)) > 20
    for path, part in parts_of(layer).items():
        with part.register_forward_hook(lambda *_: None), pytest.raises(UnsupportedLayer) as error:
            layer(x, masks)
        assert path in str(error.value)
        assert "backend='reference'" in str(error.value)
    layer(x, masks)


@pytest.mark.parametrize("kind", CHANGES)
def test_every_kind_of_change_is_refused(kind: str) -> None:
    layer = fast_layer(FL)
    layer(*data(FL)[:2])
    CHANGES[kind](encoder(layer).attn.q)
    assert_refused(layer, FL, rf"attn\.q.*{kind}")


def everywhere(layer: Any, kind: type[nn.Module]) -> list[Any]:
    return [part for part in layer.modules() if isinstance(part, kind)]


def quantize(layer: nn.Module) -> nn.Module:
    return quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8, inplace=True)


def convert(layer: Any) -> None:
    layer.qconfig = quantization.default_qconfig
    quantization.convert(quantization.prepare(layer, inplace=True), inplace=True)


# The refusal of a quantized layer names a Linear by its path.
LINEAR = r"(reweight\.mlp\.network|interaction_experts\.\d+\.fusion_model\.network)\.\d+"
REFUSED: list[tuple[Callable[[Any], object], str]] = [
    *((change, LINEAR) for change in (quantize, convert)),
    (lambda x: setattr(encoder(x).attn, "q", Wrapper(encoder(x).attn.q)), r"attn\.q"),
    (lambda x: setattr(encoder(x).mlp.network, "1", nn.ReLU()), "expected GELU"),
    (lambda x: setattr(encoder(x).mlp.network[1], "approximate", "tanh"), "tanh form"),
    (lambda x: setattr(encoder(x).norm2, "eps", 1e-3), r"norm2: eps is 0\.001"),
    (lambda x: setattr(encoder(x).attn, "scale", 1.0), r"attn\.scale: expected"),
    (lambda x: setattr(encoder(x).attn.q, "bias", nn.Parameter(torch.ones(16))), r"attn\.q"),
    (lambda x: setattr(encoder(x).attn.proj, "bias", None), r"attn\.proj: has no bias"),
    (lambda x: setattr(encoder(x).attn.attn_drop, "p", 0.9), r"experts\.1: dropout is"),
    (lambda x: encoder(x).dropout2.eval(), "rate or mode of dropout2 differs"),
    (lambda x: x.interaction_experts.__delitem__(3), "expected 4 experts"),
    (lambda x: prune.l1_unstructured(encoder(x).attn.q, "weight", 0.5), r"attn\.q"),
    (
        lambda x: parametrize.register_parametrization(encoder(x).attn.proj, "weight", nn.Tanh()),
        r"attn\.proj: .*ParametrizedLinear, which",
    ),
    (
        lambda x: encoder(x).attn.register_buffer("bias_table", torch.ones(2)),
        "bias_table: an unexpected parameter or buffer",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_changes_that_the_kernels_do_not_compute_are_refused(
    change: Callable[[Any], object], message: str
) -> None:
    case = LayerCase((7, 5), dim=16, batch=3, dropout=0.25)
    layer = fast_layer(case)
    layer(*data(case)[:1])
    change(layer)
    for run in (layer, layer.inference):
        with pytest.raises(ValueError, match=message) as error:
            run(*data(case)[:1])
        assert "backend='reference'" in str(error.value)


def test_the_reference_backend_computes_what_the_kernels_refuse() -> None:
    layer, calls = fast_layer(FL), list[Any]()
    encoder(layer).norm2 = nn.Identity()
    encoder(layer).attn.q.register_forward_hook(lambda part, *_: calls.append(part))
    layer.backend = "reference"
    layer(*data(FL)[:2])
    assert len(calls) == 3  # once per view


HONOURED: list[tuple[str, Callable[[Any], object]]] = [
    ("eps", lambda x: [setattr(part, "eps", 0.1) for part in everywhere(x, nn.LayerNorm)]),
    ("temperature", lambda x: setattr(x.reweight, "temperature", 0.1)),
    ("weight", lambda x: setattr(encoder(x).attn.q, "weight", nn.Parameter(torch.ones(16, 16)))),
    ("another activation of reweight", lambda x: x.reweight.mlp.network.__setitem__(1, nn.Tanh())),
    ("pruned reweight", lambda x: prune.l1_unstructured(x.reweight.mlp.network[0], "weight", 0.5)),
    ("wrapped reweight", lambda x: setattr(x.reweight, "mlp", Wrapper(x.reweight.mlp))),
    ("frozen", lambda x: x.interaction_experts.requires_grad_(False)),
    ("rates", lambda x: [setattr(part, "p", 0.0) for part in everywhere(x, nn.Dropout)]),
]


@pytest.mark.parametrize("change", [c[1] for c in HONOURED], ids=[c[0] for c in HONOURED])
def test_changes_that_the_kernels_compute_are_honoured(change: Callable[[Any], object]) -> None:
    layer = fast_layer(FL)
    x, masks, noise = data(FL)
    layer(x, masks, replacements=noise)
    change(layer)
    assert_honoured(layer, FL)


def test_a_hook_on_all_modules_is_refused_until_it_is_removed() -> None:
    layer = fast_layer(FL)
    layer(*data(FL)[:2])
    for name in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        handle = getattr(torch_module, f"register_module_{name}_hook")(lambda *_: None)
        try:
            assert_refused(layer, FL, "a hook on all modules")
        finally:
            handle.remove()
        layer(*data(FL)[:2])


def test_a_template_with_a_hook_is_refused_at_construction() -> None:
    template = FL.reference().interaction_experts[0].fusion_model
    template.network[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayer, match=r"network\.0\.attn: has a forward hook"):
        InteractionMoE(2, template, hidden_dim=16)


def test_hooks_and_a_replaced_forward_of_the_layer_itself_work() -> None:
    layer = fast_layer(FL)
    calls = itertools.count()
    layer.register_forward_hook(lambda *_: next(calls))
    original = layer.forward
    layer.forward = lambda *args: (next(calls), original(*args))[1]
    layer(*data(FL)[:2])
    assert next(calls) == 2


def test_changes_are_refused_while_compiling() -> None:
    layer = fast_layer(FL)
    encoder(layer).attn.q.register_forward_hook(lambda *_: None)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedLayer, match=r"attn\.q"):
        torch.compile(layer, backend="eager")(*data(FL)[:2])


@pytest.mark.parametrize("how", ["new head", "new weight", "no bias", "one without bias"])
@pytest.mark.parametrize("case", [FL, LayerCase((6, 6), "i2moe", dim=16)], ids=["fl", "i2"])
def test_a_replaced_head_is_honoured(case: LayerCase, how: str) -> None:
    layer = fast_layer(case)
    layer(*data(case)[:1])
    torch.manual_seed(0)
    for e, expert in enumerate(layer.interaction_experts):
        head = expert.fusion_model.network[-1]
        if how == "new head":
            head.fc = nn.Linear(32, 5)
        elif how == "new weight":
            head.fc.weight = nn.Parameter(torch.randn(7, 32))
            head.fc.bias = nn.Parameter(torch.randn(7))
        elif how == "no bias" or e == 1:
            head.fc.bias = None
    assert_honoured(layer, case)
    adopted = InteractionMoE.adopt(layer, backend="cpu")
    assert adopted.state_dict().keys() == layer.state_dict().keys()
    assert_honoured(adopted, case)
