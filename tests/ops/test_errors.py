"""Tests of error messages of the operators, which name the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flmoe_kernels
from flmoe_kernels import BackendUnavailable, pair_map, pair_moe, top_pairs
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import draw

# Error -> (message, changed arguments).
Table = dict[type[Exception], list[tuple[str, dict[str, Any]]]]

Q, K, A, C = draw(2, 3, 4, 5), draw(2, 3, 6, 5), draw(2, 3, 4, 7), draw(2, 3, 6, 7)
KINDS = ("unique_a", "synergy", "null")
MASK = torch.ones(2, 4, dtype=torch.bool)
PAIR: dict[str, Any] = {"q": Q, "k": K, "a": A, "c": C, "kinds": KINDS}
X, INDEX, WEIGHT = draw(5, 4), torch.tensor([[0, 1]] * 5), draw(5, 2)
W_IN, B_IN, W_OUT, B_OUT = draw(3, 6, 4), draw(3, 6), draw(3, 4, 6), draw(3, 4)
MLP: dict[str, Any] = {
    **{"x": X, "index": INDEX, "weight": WEIGHT},
    **{"w_in": W_IN, "b_in": B_IN, "w_out": W_OUT, "b_out": B_OUT},
}
LOGITS = draw(5, 3)

PAIR_MISTAKES: Table = {
    TypeError: [
        (r"c: expected a Tensor, got NoneType", {"c": None}),
        (r"q: expected a floating-point dtype", {"q": Q.long()}),
        (r"c: expected dtype torch\.float32 as q, got torch\.float64", {"c": C.double()}),
        (r"kinds: expected a sequence of names, got str", {"kinds": "abc"}),
        (
            r"gate_bias: expected dtype torch\.float32 as q or torch\.float32, got torch\.float64",
            {"gate_bias": torch.zeros(3).double()},
        ),
        (r"mask_a: expected bool, True = valid, got torch\.float32", {"mask_a": MASK.float()}),
        (r"q: expected a dense \(strided\) Tensor", {"q": Q.to_sparse()}),
    ],
    ValueError: [
        (r"q: expected \(B, E, La, R\).*got \(3, 4, 5\)", {"q": Q[0]}),
        (r"q: .*E from 1 to 8.*got \(2, 9, 4, 5\)", {"q": Q.repeat(1, 3, 1, 1)}),
        (r"k: expected \(B, E, Lb, R\) = \(2, 3, 6, 5\), got \(2, 3, 6, 4\)", {"k": K[..., :4]}),
        (r"a: expected \(B, E, La, V\) = \(2, 3, 4, 7\), got \(2, 3, 3, 7\)", {"a": A[:, :, :3]}),
        (r"c: expected \(B, E, Lb, V\) = \(2, 3, 6, 7\), got \(2, 3, 6, 6\)", {"c": C[..., :6]}),
        (r"k: expected device cpu as q, got meta", {"k": K.to("meta")}),
        (
            r"kinds: expected names among unique_a, .*null, got 'unique'",
            {"kinds": ("unique", "null", "null")},
        ),
        (r"kinds: expected 3 names, one per expert of q, got 2", {"kinds": KINDS[:2]}),
        (r"gate_bias: expected \(3,\), got \(2,\)", {"gate_bias": torch.zeros(2)}),
        (r"mask_b: expected \(2, 6\), got \(2, 4\)", {"mask_b": MASK}),
        (r"top_k: expected an int from 1 to 3, got 4", {"top_k": 4}),
        (r"temperature: expected a positive number .*, got 0", {"temperature": 0}),
        (r"backend: expected one of .*got 'gpu'", {"backend": "gpu"}),
    ],
    BackendUnavailable: [
        (r"pair_moe: .*'cuda'", {"backend": "cuda"}),
    ],
}
HEAD_MISTAKES: Table = {
    TypeError: [
        (
            r"target: expected integers, got torch\.float32",
            {"head": draw(3, 7, 2), "target": torch.zeros(2)},
        ),
        (
            r"head: expected dtype torch\.float32 as q, got torch\.float64",
            {"head": draw(3, 7).double()},
        ),
    ],
    ValueError: [
        (r"head: expected \(E, V\) = \(3, 7\), got \(3, 6\)", {"head": draw(3, 6)}),
        (
            r"head: expected \(E, V, C\) = \(3, 7, any\), got \(3, 7\)",
            {"target": torch.zeros(2).long()},
        ),
        (
            r"target: expected shape \(2,\), got \(3,\)",
            {"head": draw(3, 7, 2), "target": torch.zeros(3).long()},
        ),
        (
            r"target: expected values from 0 to 1, got 0 to 2",
            {"head": draw(3, 7, 2), "target": torch.tensor([0, 2])},
        ),
    ],
}
MLP_MISTAKES: Table = {
    TypeError: [
        (r"x: expected a floating-point dtype", {"x": X.long()}),
        (r"index: expected int64 or int32, got torch\.float32", {"index": INDEX.float()}),
        (
            r"weight: expected dtype torch\.float32 as x, got torch\.float64",
            {"weight": WEIGHT.double()},
        ),
        (r"b_out: expected dtype torch\.float32 as x, got torch\.float16", {"b_out": B_OUT.half()}),
    ],
    ValueError: [
        (r"x: expected \(N, D\).*got \(1, 5, 4\)", {"x": X[None]}),
        (r"index: expected \(N, K\) with K from 1, got \(5,\)", {"index": INDEX[:, 0]}),
        (r"index: expected \(5, 2\) as weight, got \(4, 2\)", {"index": INDEX[:4]}),
        (
            r"index: expected -1 or experts from 0 to 2, got values from 0 to 3",
            {"index": INDEX * 3},
        ),
        (r"weight: expected \(N, K\) = \(5, 2\), got \(4, 2\)", {"weight": WEIGHT[:4]}),
        (
            r"w_in: expected \(E, F, 4\) with E and F from 1, got \(3, 6, 3\)",
            {"w_in": W_IN[..., :3]},
        ),
        (r"w_out: expected \(E, D, F\) = \(3, 4, 6\), got \(3, 6, 4\)", {"w_out": W_OUT.mT}),
        (r"w_gate: expected \(E, F, D\) = \(3, 6, 4\), got \(3, 4, 6\)", {"w_gate": W_OUT}),
        (
            r"b_gate: expected \(E, F\) = \(3, 6\), got \(3, 4\)",
            {"w_gate": W_IN, "b_gate": B_OUT},
        ),
        (r"b_gate: expected None without w_gate, got a Tensor", {"b_gate": B_IN}),
        (r"act: expected one of gelu, gelu_tanh, relu, silu, got 'tanh'", {"act": "tanh"}),
        (r"weight: expected device meta as x, got cpu", {"x": X.to("meta")}),
    ],
    BackendUnavailable: [
        (r"routed_mlp: .*'cuda'", {"backend": "cuda"}),
    ],
}
GATE_MISTAKES: Table = {
    ValueError: [
        (r"logits: expected \(N, E\) with E from 1, got \(5,\)", {"logits": LOGITS[:, 0]}),
        (r"top_k: expected an int from 1 to 3, got 4", {"top_k": 4}),
        (r"top_k: expected an int from 1 to 3, got 0", {"top_k": 0}),
        (r"over: expected 'selected' or 'all', got 'k'", {"over": "k"}),
        (r"capacity: expected an int from 0, got -1", {"capacity": -1}),
        (r"mask: expected \(5,\), got \(4,\)", {"mask": torch.ones(4, dtype=torch.bool)}),
    ],
    TypeError: [
        (r"logits: expected a floating-point dtype", {"logits": LOGITS.long()}),
        (r"capacity: expected an int, got float", {"capacity": 1.2}),
        (r"mask: expected bool, True = valid, got torch\.float32", {"mask": torch.ones(5)}),
    ],
}

HEAD = {"head": draw(3, 7)}
CALLS: list[tuple[str, Callable[..., Any], dict[str, Any], list[Table]]] = [
    ("pair_moe", pair_moe, PAIR, [PAIR_MISTAKES]),
    ("pair_map", pair_map, {**PAIR, **HEAD}, [PAIR_MISTAKES, HEAD_MISTAKES]),
    ("top_pairs", top_pairs, {**PAIR, **HEAD, "n_pairs": 2}, [PAIR_MISTAKES, HEAD_MISTAKES]),
    ("routed_mlp", routed_mlp, MLP, [MLP_MISTAKES]),
    ("gate", gate, {"logits": LOGITS, "top_k": 2}, [GATE_MISTAKES]),
]


def mistakes() -> Iterator[Any]:
    for name, call, arguments, tables in CALLS:
        for table in tables:
            for error, cases in table.items():
                for message, changes in cases:
                    values = (call, {**arguments, **changes}, error, message)
                    yield pytest.param(*values, id=f"{name}-{message}")


@pytest.mark.parametrize(("call", "arguments", "error", "message"), list(mistakes()))
def test_mistakes(
    call: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(("name", "call", "arguments", "_"), CALLS)
def test_calls_without_a_mistake_run(
    name: str, call: Callable[..., Any], arguments: dict[str, Any], _: object
) -> None:
    call(**arguments)


@pytest.mark.parametrize("n_pairs", [0, -1, 1.5, True, None])
def test_number_of_pairs(n_pairs: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="n_pairs: expected an int"):
        top_pairs(**PAIR, **HEAD, n_pairs=n_pairs)


def test_reduction() -> None:
    with pytest.raises(ValueError, match=r"reduce: expected one of none, experts, pool, got 'sum'"):
        pair_moe(**PAIR, reduce="sum")


def test_context_and_argument_choose_the_same_backend() -> None:
    with flmoe_kernels.use_backend("reference"):
        y = pair_moe(**PAIR).y
    assert torch.equal(y, pair_moe(**PAIR, backend="reference").y)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dispatch(backend: str) -> None:
    for index in (INDEX + 2, INDEX - 3):
        with pytest.raises(ValueError, match="index: expected -1 or experts from 0 to 2"):
            dispatch(index, 3, backend=backend)
    with pytest.raises(ValueError, match="num_experts: expected an int from 1, got 0"):
        dispatch(INDEX, 0, backend=backend)


def test_operator_and_compiled_code_refuse_an_index_out_of_range() -> None:
    with pytest.raises(ValueError, match="got values from 0 to 9"):
        torch.ops.flmoe.routing_dispatch(INDEX * 9, 3, "cpu")
    compiled = torch.compile(routed_mlp, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="index: expected -1 or experts"):
        compiled(X, INDEX * 9, WEIGHT, W_IN, B_IN, W_OUT, B_OUT)
    offsets, permutation = torch.tensor([0, 5, 5, 99]).int(), torch.arange(10).int()
    inputs = X, WEIGHT, W_IN, B_IN, W_OUT, B_OUT, None, None
    with pytest.raises(ValueError, match="offsets: expected non-decreasing"):
        torch.ops.flmoe.routed_mlp(*inputs, offsets, permutation, 0, False, "cpu")
    with pytest.raises(ValueError, match="permutation: expected ascending"):
        torch.ops.flmoe.routed_mlp(
            *inputs, offsets.clamp(max=10), permutation.flip(0), 0, False, "cpu"
        )
