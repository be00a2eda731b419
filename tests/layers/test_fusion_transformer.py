"""Tests of FusionTransformer alone and of the published methods of InteractionMoE's experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import (
    FusionTransformer,
    InteractionMoE,
    use_backend,
)
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.inputs import as_dtype, draw, draw_masks, gradients
from tests.support.layers import (
    FL,
    I2,
    SPARSE_FL,
    SPARSE_I2,
    LayerCase,
    assert_all_within_budget,
    fast_layer,
    fusion_of,
)
from tests.support.lineage import fl, i2

CASES = {
    "one modality, padded": dataclasses.replace(FL, lengths=(9,), masks="partial"),
    "three modalities": dataclasses.replace(FL, lengths=(7, 5, 4), layers=2, masks="partial"),
    "learned positions": dataclasses.replace(I2, layers=2),
    "one modality, learned positions": dataclasses.replace(I2, lengths=(6,)),
    "sparse, dropped tokens": dataclasses.replace(SPARSE_FL, capacity=0.6, masks="partial"),
    "sparse, learned positions": SPARSE_I2,
    "Switch": dataclasses.replace(SPARSE_FL, gate="SwitchGate", masks="partial"),
    "Noisy": dataclasses.replace(SPARSE_FL, gate="NoisyGate"),
}
BOTH = pytest.mark.parametrize("case", [FL, I2], ids=["fl_i2moe", "i2moe"])
EVERY = pytest.mark.parametrize(
    "case", [FL, I2, SPARSE_FL, SPARSE_I2], ids=["fl", "i2", "sparse fl", "sparse i2"]
)


def results(fusion: FusionTransformer, x: Sequence[Tensor], masks: Any) -> dict[str, Tensor]:
    """Logits, latent, gate loss, and the gradients of all of them by parameters and inputs."""
    x = [each.detach().requires_grad_() for each in x]
    logits, latent = fusion(x, masks, return_latent=True)
    outputs = {"logits": logits, "latent": latent, "gate_loss": fusion.gate_loss()}
    leaves = {**dict(fusion.named_parameters()), **{f"inputs.{m}": v for m, v in enumerate(x)}}
    found = gradients(list(outputs.values()), list(leaves.values()))
    outputs = {name: value.detach() for name, value in outputs.items()}
    return outputs | dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    if dtype == torch.bfloat16 and case.gate is not None:
        pytest.skip("rounding changes the choice of experts")
    x, masks = case.inputs(dtype), draw_masks(case.masks, case.batch, case.lengths)
    fast, low = (results(fusion_of(case, b, dtype), x, masks) for b in ("cpu", "reference"))
    wide = as_dtype(x, torch.float64)
    exact = results(fusion_of(case, "reference", dtype).double(), wide, masks)
    assert_all_within_budget(fast, low, exact, name)
    assert (exact["gate_loss"] != 0) == (case.gate is not None)
    changed = fusion_of(case, "cpu", dtype)
    with torch.no_grad():
        changed.network[0].attn.proj.bias[0] += 0.5
    with pytest.raises(AssertionError, match="above the budget"):
        assert_all_within_budget(results(changed, x, masks), low, exact, name)


@BOTH
def test_returns_logits_or_logits_and_latent(case: LayerCase) -> None:
    fusion, x = fusion_of(case, None), case.inputs()
    logits = fusion(x)
    again, latent = fusion(x, None, True)
    assert torch.equal(logits, again)
    assert latent.shape == (case.batch, len(case.lengths) * case.dim)
    # As published, the latent of the older variant has no gradient.
    assert latent.requires_grad == (case.compat == "fl_i2moe")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", [fl, i2], ids=["fl_i2moe", "i2moe"])
def test_adopts_a_published_model(kind: Any, sparse: bool) -> None:
    published = kind.Transformer(3, 5, 16, 2, 3, mlp_sparse=sparse).eval()
    published.network[1].attn.training = True  # not that of its dropouts
    fast = FusionTransformer.adopt(published)
    x = [draw(2, 5, 16, seed=m) for m in range(3)]
    torch.testing.assert_close(fast(x), published(x), atol=1e-5, rtol=1e-5)
    own, theirs = (dict(m.named_parameters()) for m in (fast, published))
    assert all(own[name] is theirs[name] for name in own)
    assert list(fast.state_dict()) == list(published.state_dict())
    modes = [(m.network[0].attn.training, m.network[1].attn.training) for m in (fast, published)]
    assert modes[0] == modes[1]


def test_called_parts_keep_their_hooks_and_changes() -> None:
    fusion, x = fusion_of(SPARSE_FL, "cpu"), SPARSE_FL.inputs()
    seen: list[tuple[int, ...]] = []
    routed: Any = fusion.network[0].mlp

    def record(_part: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert routed.last_topk_indices.shape == (output[..., 0].numel(), 2)
        seen.append(tuple(output.shape))

    masks = draw_masks("partial", SPARSE_FL.batch, SPARSE_FL.lengths)
    with routed.register_forward_hook(record):
        fusion(x, masks)
    assert seen == [(3, 7, 16), (3, 5, 16)]
    fusion.network[-1].fc = nn.Linear(32, 9)
    assert fusion(x).shape == (3, 9)


def test_changes_are_refused() -> None:
    """The layer's tests change every part."""
    fusion, x = fusion_of(FL, "cpu"), FL.inputs()
    fusion(x)
    handle = fusion.network[0].attn.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"network\.0\.attn: has a forward"):
        fusion(x)
    handle.remove()
    fusion.num_modalities = 3
    with pytest.raises(ValueError, match=r"inputs: expected 3"):
        fusion(x)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("network.0.attn.proj", lambda x: x.to("meta"), "parameters differ in device"),
        ("network.0.attn.kv", lambda x: x.half(), "parameters differ in dtype"),
        ("network.3.fc", lambda x: x.double(), "differ in dtype"),
        ("network.0.mlp.experts", lambda x: x.double(), "differ in dtype"),
        ("network.0.dropout1", lambda x: setattr(x, "p", 1.5), "expected a probability"),
        ("network.0.dropout2", lambda x: setattr(x, "inplace", True), "expected False"),
    ],
)
def test_parts_of_another_kind_are_refused(part: str, change: Any, message: str) -> None:
    layer = fast_layer(SPARSE_FL)
    layer(SPARSE_FL.inputs())
    for expert in layer.interaction_experts:
        change(expert.fusion_model.get_submodule(part))
    with pytest.raises(UnsupportedLayer, match=message):
        layer(SPARSE_FL.inputs())


@pytest.mark.parametrize("masks", ["none", "partial"])
def test_a_batch_of_no_samples(masks: str) -> None:
    x = [each[:0] for each in SPARSE_FL.inputs()]
    given = draw_masks(masks, 3, SPARSE_FL.lengths)
    none = given and [mask[:0] for mask in given if mask is not None]
    assert fusion_of(SPARSE_FL, "cpu")(x, none).shape == (0, 3)


def test_results_under_autocast_have_the_dtype_of_the_parameters() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = fusion_of(FL, "cpu")(FL.inputs(), None, True)
    assert {x.dtype for x in results} == {torch.float32}
    assert torch.equal(results[1], results[1].bfloat16().float()), "computed in another precision"


# Attention maps.


def maps(layer: nn.Module) -> list[Any]:
    return [part.last_attn for part in layer.modules() if hasattr(part, "last_attn")]


def capture(layer: nn.Module, on: bool, gradient: bool = False) -> None:
    """Set the flags as the published evaluators do."""
    for part in layer.modules():
        if hasattr(part, "capture_attn") and hasattr(part, "require_attn_grad"):
            part.capture_attn, part.require_attn_grad = on, gradient  # type: ignore[assignment]


@EVERY
def test_maps_exist_only_while_requested(case: LayerCase) -> None:
    layer = InteractionMoE.adopt(case.reference()).eval()
    x = case.inputs()
    expected = layer.inference(x)[2]
    assert maps(layer) == [None] * 4 * case.layers
    capture(layer, True)
    actual = layer.inference(x)[2]
    torch.testing.assert_close(actual, expected)
    found = maps(layer)
    length = sum(case.lengths)
    assert all(a.shape == (3, case.heads, length, length) and not a.requires_grad for a in found)
    torch.testing.assert_close(torch.stack(found).sum(-1), torch.ones(len(found), 3, 2, length))
    capture(layer, False)
    for part in layer.modules():
        if hasattr(part, "last_attn"):
            part.last_attn = None  # type: ignore[assignment]
    assert torch.equal(layer.inference(x)[2], expected)
    assert maps(layer) == [None] * 4 * case.layers


def test_maps_and_their_gradients_equal_the_published_ones() -> None:
    published = fl.InteractionMoE(2, fl.Transformer(2, 5, 16, 3), False, 16, 16).double().eval()
    fast = InteractionMoE.adopt(copy.deepcopy(published))
    x = as_dtype(FL.inputs(), torch.float64)
    masks = [
        mask.double() for mask in draw_masks("partial", 3, FL.lengths) or () if mask is not None
    ]
    found = []
    for layer in (published, fast):
        capture(layer, True, gradient=True)
        for part in layer.modules():
            if hasattr(part, "require_attn_grad"):
                part.require_attn_grad = True  # the stand-in has no capture_attn
        experts = [expert.fusion_model for expert in layer.interaction_experts]
        logits = [fusion(x, masks, return_latent=False) for fusion in experts]
        weights = layer.reweight(x, masks)
        mixed = (torch.stack(logits, dim=1) * weights.detach().unsqueeze(2)).sum(dim=1)
        stored = maps(layer)
        for each in stored:
            each.retain_grad()
        mixed[:, 1].sum().backward()
        found.append(
            [mixed.detach(), *(a.detach() for a in stored), *(each.grad for each in stored)]
        )
    assert len(found[0]) == 1 + 2 * 4 * 2
    for actual, expected in zip(*found[::-1], strict=True):
        # The stand-in, like the published code, computes positions in float32.
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
        assert float(expected.abs().max()) > 1e-6


def test_maps_are_refused_with_a_requested_backend() -> None:
    layer = fast_layer(FL)
    capture(layer, True)
    with pytest.raises(
        UnsupportedLayer, match=r"attn\.capture_attn: is set, but the kernels store"
    ):
        layer(FL.inputs())


def test_models_with_maps_can_be_copied_and_keep_their_flags() -> None:
    fusion = fusion_of(FL, None)
    capture(fusion, True, gradient=True)
    fusion(FL.inputs())
    assert maps(fusion)[0].requires_grad
    layer = InteractionMoE(2, fusion, hidden_dim=16)
    for each in (copy.deepcopy(fusion), layer.interaction_experts[0].fusion_model):
        attention = each.network[0].attn
        assert (attention.capture_attn, attention.last_attn) == (True, None)


# Experts.


@EVERY
def test_experts_have_the_published_methods(case: LayerCase) -> None:
    layer = InteractionMoE.adopt(case.reference()).eval()
    expert, x = layer.interaction_experts[1], case.inputs()
    masks = draw_masks("partial", 3, case.lengths) if case.compat == "fl_i2moe" else None

    def tensors(view: Any) -> list[Tensor]:
        return [view] if isinstance(view, Tensor) else [y for part in view for y in tensors(part)]

    found = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            torch.manual_seed(3)
            views = expert.forward_multiple(x, masks)
            losses = None
            if case.sparse:
                views, losses = views
                assert len(losses) == 3
            torch.manual_seed(3)
            single = [expert(x, masks), expert.forward_with_replacement(x, masks, replace_index=0)]
        found.append([*tensors(views), *tensors(losses or []), *tensors(single)])
        width = 1 + (case.compat == "fl_i2moe")
        assert [len(tensors(view)) for view in views] == [width] * 3
        assert [len(tensors(view)) for view in single] == [width + case.sparse] * 2
        for view, same in zip(views, single, strict=False):
            for a, b in zip(tensors(view), tensors(same), strict=False):
                assert torch.equal(a, b)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    full, replaced = (tensors(view)[0] for view in single)
    assert not torch.equal(full, replaced)


# Programs around the model.


def test_compiles_without_a_break() -> None:
    fusion, x = fusion_of(FL, None).eval(), FL.inputs()
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fusion(x))
    torch._dynamo.reset()
