"""Tests of the experts of transformers models on routed_mlp against transformers' own implementations."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from tests.support.inputs import draw, gradients

transformers = pytest.importorskip("transformers")
moe = importlib.import_module("transformers.integrations.moe")
importlib.import_module("flmoe_kernels.integrations.transformers").register()

EXPERTS, WIDTH, HIDDEN = 5, 12, 10


class Kind(NamedTuple):
    act: str = "silu"
    has_gate: bool = True
    is_transposed: bool = False
    has_bias: bool = False
    has_post_expert_norm: bool = False


KINDS = (
    Kind(),
    Kind("gelu_pytorch_tanh", is_transposed=True),
    Kind("gelu", has_bias=True),
    Kind("gelu_new", has_bias=True, is_transposed=True),
    Kind("relu", has_gate=False),
    Kind("swish", has_gate=False, has_bias=True, is_transposed=True),
)


def make_experts(kind: Kind, dtype: torch.dtype) -> nn.Module:
    """Experts like those of transformers models, with random parameters."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, transformers.activations.ACT2FN[kind.act]
            first, rows = ("gate_up_proj", 2 * HIDDEN) if kind.has_gate else ("up_proj", HIDDEN)
            for seed, (name, *shape) in enumerate(
                ((first, rows, WIDTH), ("down_proj", WIDTH, HIDDEN))
            ):
                weight = draw(EXPERTS, *shape, dtype=dtype, seed=seed, scale=shape[1] ** -0.5)
                weight = weight.mT.contiguous() if kind.is_transposed else weight
                setattr(self, name, nn.Parameter(weight))
                if kind.has_bias:
                    bias = draw(EXPERTS, shape[0], dtype=dtype, seed=seed + 9)
                    setattr(self, f"{name}_bias", nn.Parameter(bias))

        def forward(self, *args: Tensor) -> Tensor:
            raise NotImplementedError

    options = kind._asdict()
    options.pop("act")
    decorated = moe.use_experts_implementation(Experts, **options)
    return decorated(SimpleNamespace(_experts_implementation="batched_mm"))


def evaluate(experts: nn.Module, implementation: str, *inputs: Tensor) -> list[Tensor]:
    """Output and its gradients by hidden_states, top_k_weights and all parameters."""
    experts.config._experts_implementation = implementation
    x, index, weight = inputs
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    out = experts(leaves[0], index, leaves[1])
    return [out.detach(), *gradients([out], [*leaves, *experts.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "parallel"), [(30, False), (30, True), (0, False)])
def test_experts(kind: Kind, dtype: torch.dtype, tokens: int, parallel: bool) -> None:
    """One expert has no tokens; a part of the choices of expert-parallel models belongs to other ranks."""
    index = torch.rand(tokens, EXPERTS).topk(2).indices
    index[index == 1] = EXPERTS if parallel else 0
    inputs = draw(tokens, WIDTH, dtype=dtype, seed=20), index, draw(tokens, 2, dtype=dtype).abs()
    experts = make_experts(kind, dtype)
    experts._is_expert_parallel = parallel
    exact = copy.deepcopy(experts).double()
    found = evaluate(experts, "flmoe", *inputs)
    low = evaluate(experts, "batched_mm", *inputs)
    oracle = evaluate(exact, "batched_mm", inputs[0].double(), index, inputs[2].double())
    for i, triple in enumerate(zip(found, low, oracle, strict=True)):
        assert_within_budget(*triple, f"result {i}", may_vanish=tokens == 0)
    if tokens:
        first = next(exact.parameters())
        first.data = first.roll(HIDDEN // 2, dims=2 if kind.is_transposed else 1)
        wrong = evaluate(exact, "batched_mm", inputs[0].double(), index, inputs[2].double())
        assert_outside_budget(wrong[0], low[0], oracle[0], "experts with other hidden units")


def test_weights_determine_the_dtype() -> None:
    """As in grouped_mm: a router may compute in float32, and autocast gives bfloat16 rows to float32 experts."""
    x, index = draw(4, WIDTH), torch.tensor([[0, 1]] * 4)
    experts = make_experts(Kind(), torch.bfloat16)
    out, expected = (
        evaluate(experts, "flmoe", *inputs)[0]
        for inputs in ((x, index, x[:, :2]), (x.bfloat16(), index, x[:, :2].bfloat16()))
    )
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "pad_token_id": 0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(family: str, **options: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def results(model: nn.Module, implementation: str, compiled: bool = False) -> dict[str, Tensor]:
    """Logits and the gradients of all parameters."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(24).view(2, 12) % 17
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    out = call(ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "aria_text"])
def test_models(family: str, compiled: bool) -> None:
    model = make_model(family, experts_implementation="flmoe")
    assert model.config._experts_implementation == "flmoe"
    found = results(model, "flmoe", compiled)
    low, exact = results(model, "eager"), results(copy.deepcopy(model).double(), "eager")
    assert found.keys() == low.keys() == exact.keys()
    assert any("experts" in name for name in found)
    for name, result in found.items():
        assert_within_budget(result, low[name], exact[name], name)


REFUSED = [
    (Kind("quick_gelu"), "expected act_fn silu, gelu, .*, got QuickGELUActivation"),
    (Kind(has_post_expert_norm=True), "expected no norm after them, got that of Experts"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=str)
def test_other_experts_are_refused(kind: Kind, message: str) -> None:
    x = draw(3, WIDTH)
    experts = make_experts(kind, torch.float32)
    with pytest.raises(ValueError, match=message):
        evaluate(experts, "flmoe", x, torch.zeros(3, 2, dtype=torch.int64), x[:, :2])


def test_another_gate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the gate .*, got _apply_gate of GptOssExperts"):
        results(make_model("gpt_oss"), "flmoe")


def test_the_package_does_not_import_transformers() -> None:
    code = "import sys, flmoe_kernels; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
