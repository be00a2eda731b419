"""What `swap` must leave alone, untouched; what its check compares, catches, does not disturb."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.published import compare as swap_check
from flmoe_kernels.published import calls
from flmoe_kernels.published.agreement import Disagreement
from flmoe_kernels.published.report import SwapReport
from flmoe_kernels.published.swap import swap
from tests.support.lineage import LateFusion, MaxPooled, fl, i2, make_layer
from tests.support.lineage_sparse import make_mlp


class Around(nn.Module):
    """A model with dropout and buffers around the layer: a careless check would disturb them."""

    def __init__(self, layer: nn.Module, via: str = "forward") -> None:
        super().__init__()
        self.moe, self.via = layer, via
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, a: Tensor, b: Tensor, masks: Any = None, *, fail: bool = False) -> Any:
        if fail:
            raise ArithmeticError("the model's own")
        parts = [self.norm(self.drop(x).mT).mT for x in (a, b)]
        if self.via == "inference":
            return self.moe.inference(parts, masks)
        return self.moe(parts, masks=masks) if masks is not None else self.moe(parts)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a swap which leaves it alone must not change."""
    parts = list(model.named_modules())
    return {
        "modules": [(name, id(part), type(part), part.training) for name, part in parts],
        "attributes": [
            {key: id(value) for key, value in vars(part).items() if key != "training"}
            for _, part in parts
        ],
        "hooks": [
            {key: dict(value) for key, value in vars(part).items() if "_hooks" in key}
            for _, part in parts
        ],
        "tensors": [
            (name, id(t), t._version, t.grad)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ],
    }


def left(report: SwapReport) -> str:
    assert report.swapped == ()
    assert len(report.left) == 1
    return report.left[0].reason


def late_fusion_layer() -> nn.Module:
    return fl.InteractionMoE(2, LateFusion(2, 16, 3), False, 16, 16)


class OwnMethods(fl.InteractionMoE):
    def explain(self) -> str:
        return "what a fast layer would not have"


def subclassed() -> nn.Module:
    layer = make_layer()
    layer.__class__ = OwnMethods
    return layer


def hooked_inside() -> nn.Module:
    layer = make_layer()
    layer.interaction_experts[0].fusion_model.register_forward_hook(lambda *_: None)
    return layer


def mixed_mode() -> nn.Module:
    layer = make_layer().train()
    layer.interaction_experts.eval()
    return layer


class ZeroFilled(fl.InteractionMoE):
    """Replaces a modality by zeros: the fusion agrees, but the views that training sees differ."""

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


def disguised(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    """A layer with the published name and structure, and another forward."""

    def make() -> nn.Module:
        layer = make_layer()
        layer.__class__ = type("InteractionMoE", (kind,), {})
        return layer

    return make


def diverged() -> nn.Module:
    layer = make_layer()
    with torch.no_grad():
        layer.reweight.mlp.network[0].weight[0, 0] = float("nan")
    return layer


LEFT: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("unknown fusion", late_fusion_layer, "unknown fusion model, LateFusion"),
    (
        "sparse inside",
        lambda: make_layer(mlp_sparse=True, apart=True),
        r"network.0.mlp.experts: each has parameters of its own \(FastMoE",
    ),
    (
        "sparse alone",
        lambda: make_mlp(gate_hook=print),
        "gate_hook: set, and RoutedMLP has none",
    ),
    ("cross-attention", lambda: make_layer(self_attn=False), "cross-attention"),
    ("subclass", subclassed, "own methods would be lost"),
    ("hook inside", hooked_inside, "carries a hook"),
    ("mixed mode", mixed_mode, "one mode"),
    ("other pooling", lambda: make_layer(fusion=MaxPooled), "off by .* allowed"),
    ("other noise", disguised(ZeroFilled), "replacement with torch.randn_like per view"),
    ("other loss", disguised(OtherLoss), "its own losses are off by"),
    ("other inference", disguised(OtherInference), "logits are off by"),
    ("fewer outputs", disguised(FewerOutputs), "returns 3 values, expected 5"),
    ("fails", disguised(Fails), r"its own forward fails: KeyError: 'language\\nand more'"),
    ("diverged", diverged, "not finite"),
]


@pytest.mark.parametrize(("make", "reason"), [pytest.param(m, r, id=i) for i, m, r in LEFT])
def test_leaves_alone_and_untouched(make: Callable[[], nn.Module], reason: str) -> None:
    layer, neighbour = make(), make_layer(i2)
    layer.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"odd": layer, "good": neighbour, "odd again": layer})
    before = snapshot(layer)
    report = swap(model)
    assert snapshot(layer) == before
    assert model["odd"] is model["odd again"] is layer
    assert isinstance(model["good"], InteractionMoE)
    assert [entry.name for entry in report.swapped] == ["good"]
    assert [(entry.name, entry.class_name) for entry in report.left] == [
        ("odd, odd again", type(layer).__name__)
    ]
    pytest_match(reason, report.left[0].reason)
    assert "\n" not in report.left[0].reason

    alone = swap(layer)
    assert alone.model is layer
    pytest_match(reason, left(alone))


def pytest_match(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_the_check_is_what_catches_another_forward() -> None:
    report = swap(make_layer(fusion=MaxPooled), check=False)
    assert isinstance(report.model, InteractionMoE)


def test_compiled_layers_are_left() -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="eager")
    assert "swap first" in left(swap(compiled))
    assert compiled._orig_mod is layer
    layer.compile(backend="eager")
    assert "swap first" in left(swap(nn.Sequential(layer)))


Change = Callable[[tuple], tuple]
CHANGES: list[tuple[str, Change]] = [
    ("logits are off", lambda out: (out[0], out[1], torch.zeros_like(out[2]), *out[3:])),
    ("logits are off", lambda out: (out[0], out[1], out[2] * 1.0001, *out[3:])),
    ("logits are off", lambda out: (out[0], out[1], out[2] * float("nan"), *out[3:])),
    ("logits are off", lambda out: ([out[0][0], *out[0][:-1]], *out[1:])),
    ("weights are off", lambda out: (out[0], out[1].flip(1), *out[2:])),
    (
        "fast layer's losses are off",
        lambda out: (*out[:3], [*out[3][:-1], 0 * out[3][0]], *out[4:]),
    ),
    ("fast layer's losses are off", lambda out: (*out[:3], [1.0001 * x for x in out[3]], *out[4:])),
    ("fast layer's losses: 3, expected 4", lambda out: (*out[:3], out[3][1:], *out[4:])),
    ("latents are off", lambda out: (*out[:-1], [z + 1e-4 for z in out[-1]])),
    ("logits: the shapes", lambda out: (out[0], out[1], out[2][:, :1], *out[3:])),
    ("fast layer fails: ZeroDivisionError", lambda out: (1 // 0,)),
]


@pytest.mark.parametrize(("reason", "change"), CHANGES)
def test_a_wrong_fast_layer_is_caught(
    monkeypatch: pytest.MonkeyPatch, reason: str, change: Change
) -> None:
    right = InteractionMoE.forward
    monkeypatch.setattr(
        InteractionMoE, "forward", lambda self, *a, **k: change(right(self, *a, **k))
    )
    layer = make_layer()
    before = snapshot(layer)
    assert reason in left(swap(layer))
    assert snapshot(layer) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_fail_in_half_precision_too(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    right = InteractionMoE.inference

    def zeros(self: Any, *a: Any) -> Any:
        logits, weights, mixed = right(self, *a)
        return [0 * x for x in logits], weights, mixed

    monkeypatch.setattr(InteractionMoE, "inference", zeros)
    assert "logits are off" in left(swap(make_layer(i2).to(dtype)))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_disturbs_nothing(given: bool, mode: bool) -> None:
    model = Around(make_layer()).train(mode)
    model.drop.eval()
    attention = model.moe.interaction_experts[0].fusion_model.network[0].attn
    attention.require_attn_grad = True
    parts = (torch.randn(2, 6, 16), torch.randn(2, 4, 16))
    model(*parts)
    # A map with a gradient history is what deepcopy refuses.
    kept_map = attention.last_attn
    assert kept_map.grad_fn is not None
    for parameter in model.parameters():
        parameter.grad = None
    modes = {name: part.training for name, part in model.named_modules() if name != "moe"}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    values = {name: value.detach().clone() for name, value in model.named_parameters()}

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    report = swap(model, inputs=parts if given else None)
    assert [entry.inputs for entry in report.swapped] == ["given" if given else "random"]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert attention.last_attn is kept_map
    assert model.moe.training is mode
    now = {n: part.training for n, part in model.named_modules()}
    assert all(now[name] == mode for name, mode in modes.items() if not name.startswith("moe"))
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        assert torch.equal(value, (buffers | values)[name]), name
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("via", ["forward", "inference"])
def test_compares_on_the_inputs_that_the_model_gives(
    monkeypatch: pytest.MonkeyPatch, via: str
) -> None:
    seen = []
    compare = swap_check.compare
    # By sys.modules: in the package, the name is that of the function.
    monkeypatch.setattr(
        sys.modules["flmoe_kernels.published.swap"],
        "compare",
        lambda *a: (seen.append(a[-1]), compare(*a))[1],
    )
    a, b = torch.randn(7, 6, 16), torch.randn(7, 4, 16)
    masks = [torch.ones(7, 6), torch.ones(7, 4)]
    masks[0][0, 3:] = 0
    for mask in masks:
        mask[1] = 0  # The published layer makes NaN of this sample, so it cannot be compared.
    model = Around(make_layer(), via).eval()
    expected = model.norm(model.drop(a).mT).mT.detach()
    report = swap(model, inputs=(a, b), masks=masks)
    assert [entry.inputs for entry in report.swapped] == ["given"]
    torch.testing.assert_close(seen[0].inputs[0], expected)
    torch.testing.assert_close(seen[0].masks, masks)
    assert "inference" not in vars(model.moe)
    assert "forward" not in vars(model.moe)

    named = swap(Around(make_layer(), via), inputs={"a": a, "b": b, "masks": masks})
    assert [entry.inputs for entry in named.swapped] == ["given"]


def test_inputs_of_the_layer_itself_and_of_one_that_is_not_reached() -> None:
    inputs = [torch.randn(2, 6, 16), torch.randn(2, 4, 16)]
    masks = [torch.ones(2, 6), torch.ones(2, 4)]
    assert swap(make_layer(), inputs=inputs, masks=masks).swapped[0].inputs == "given"
    model = Around(make_layer())
    model.spare = make_layer(seed=1)
    report = swap(model, inputs=tuple(inputs))
    assert {entry.name: entry.inputs for entry in report.swapped} == {
        "moe": "given",
        "spare": "random",
    }


def test_a_failing_model_stops_the_swap_before_it_changes_anything() -> None:
    model = Around(make_layer()).train()
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="the model's own"):
        swap(model, inputs={"a": None, "b": None, "fail": True})
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (calls.Case([torch.randn(2, 4, 16)], None), "inputs of shapes"),
        (calls.Case([], None), r"inputs of shapes \[\]"),
        (calls.Case([torch.randn(2, 16)] * 2, None), r"\(2, 16\)"),
        (calls.Case([torch.randn(2, 4, 16)] * 2, [None]), "1 masks for 2 modalities"),
        (
            calls.Case([torch.randn(2, 4, 16)] * 2, [torch.zeros(2, 4)] * 2),
            "no sample with a valid token",
        ),
    ],
)
def test_captured_calls_that_cannot_be_compared(case: calls.Case, reason: str) -> None:
    layer = make_layer()
    with pytest.raises(Disagreement, match=reason):
        swap_check.compare(layer, describe(layer), case)


def test_captured_calls_are_compared_on_their_first_samples_with_tokens() -> None:
    inputs = [torch.arange(9.0).view(9, 1, 1).expand(9, 4, 16)] * 2
    masks = [torch.ones(9, 4), torch.ones(9, 4)]
    masks[0][:2] = masks[1][1] = 0
    few = calls.few_samples(calls.Case(inputs, [masks[0], None]), describe(make_layer()))
    assert few.inputs[0][:, 0, 0].tolist() == [0, 1, 2, 3]
    few = calls.few_samples(calls.Case(inputs, list(masks)), describe(make_layer()))
    assert few.inputs[1][:, 0, 0].tolist() == [0, 2, 3, 4]
    assert few.masks is not None
    assert [mask.shape[0] for mask in few.masks] == [4, 4]


def test_masks_given_to_the_variant_without_them_are_a_reason() -> None:
    layer, inputs = make_layer(i2), [torch.randn(2, 5, 16)] * 2
    case = calls.Case(inputs, [torch.ones(2, 5)] * 2)
    with pytest.raises(Disagreement, match="does not take"):
        swap_check.compare(layer, describe(layer), case)


def test_random_cases_have_ragged_and_wholly_padded_parts() -> None:
    masked, plain = calls.random_cases(describe(make_layer(modalities=3)))
    assert plain.masks is None
    assert masked.masks is not None
    lengths = [x.shape[1] for x in masked.inputs]
    assert len(set(lengths)) == 3
    counts = [mask.sum(dim=1).tolist() for mask in masked.masks]
    assert [full for full, _ in counts] == lengths
    assert counts[-1][1] == 0
    assert all(0 < some < n for (_, some), n in zip(counts[:-1], lengths[:-1], strict=True))
    (only,) = calls.random_cases(describe(make_layer(i2, patches=5)))
    assert (only.masks, [x.shape[1] for x in only.inputs]) == (None, [5, 5])


def test_a_bare_copy_has_parameters_of_its_own_and_no_hooks() -> None:
    layer = make_layer()
    layer.register_forward_hook(lambda *_: None)
    clone = calls.bare_copy(layer)
    assert not clone._forward_hooks
    assert len(layer._forward_hooks) == 1
    assert {id(p) for p in clone.parameters()}.isdisjoint(id(p) for p in layer.parameters())
    expected = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer.state_dict(), expected, rtol=0, atol=0)
