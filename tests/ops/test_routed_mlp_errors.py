"""Every mistake that a caller of gate, dispatch and routed_mlp can make gets its own message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import draw

X, INDEX, WEIGHT = draw(5, 4), torch.tensor([[0, 1]] * 5), draw(5, 2)
W_IN, B_IN, W_OUT, B_OUT = draw(3, 6, 4), draw(3, 6), draw(3, 4, 6), draw(3, 4)
LOGITS = draw(5, 3)

Mistake = tuple[type[Exception], str, dict[str, Any]]
MLP: dict[str, Mistake] = {
    "x no tensor": (TypeError, r"x: expected a Tensor, got list", {"x": [1.0]}),
    "x of integers": (TypeError, r"x: expected a floating-point dtype", {"x": X.long()}),
    "x of 3 dimensions": (ValueError, r"x: expected \(N, D\).*got \(1, 5, 4\)", {"x": X[None]}),
    "index of floats": (
        TypeError,
        r"index: expected int64 or int32, got torch\.float32",
        {"index": INDEX.float()},
    ),
    "index of 1 dimension": (
        ValueError,
        r"index: expected \(N, K\) with K from 1, got \(5,\)",
        {"index": INDEX[:, 0]},
    ),
    "index of other tokens": (
        ValueError,
        r"index: expected \(5, 2\) as weight, got \(4, 2\)",
        {"index": INDEX[:4]},
    ),
    "index too large": (
        ValueError,
        r"index: expected -1 or experts from 0 to 2, got values from 0 to 3",
        {"index": INDEX * 3},
    ),
    "index too small": (
        ValueError,
        r"index: expected -1 or experts from 0 to 2, got values from -2 to 0",
        {"index": INDEX * -2},
    ),
    "weight of other tokens": (
        ValueError,
        r"weight: expected \(N, K\) = \(5, 2\), got \(4, 2\)",
        {"weight": WEIGHT[:4]},
    ),
    "weight of another dtype": (
        TypeError,
        r"weight: expected dtype torch\.float32 as x, got torch\.float64",
        {"weight": WEIGHT.double()},
    ),
    "w_in of another width": (
        ValueError,
        r"w_in: expected \(E, F, 4\) with E and F from 1, got \(3, 6, 3\)",
        {"w_in": W_IN[..., :3]},
    ),
    "w_out of another width": (
        ValueError,
        r"w_out: expected \(E, D, F\) = \(3, 4, 6\), got \(3, 6, 4\)",
        {"w_out": W_OUT.mT},
    ),
    "b_in of other experts": (
        ValueError,
        r"b_in: expected \(E, F\) = \(3, 6\), got \(2, 6\)",
        {"b_in": B_IN[:2]},
    ),
    "b_out of another dtype": (
        TypeError,
        r"b_out: expected dtype torch\.float32 as x, got torch\.float16",
        {"b_out": B_OUT.half()},
    ),
    "unknown activation": (
        ValueError,
        r"act: expected one of gelu, gelu_tanh, relu, silu, got 'tanh'",
        {"act": "tanh"},
    ),
    "x on another device": (
        ValueError,
        r"weight: expected device meta as x, got cpu",
        {"x": X.to("meta")},
    ),
    "no CUDA kernels": (BackendUnavailable, r"routed_mlp: .*'cuda'", {"backend": "cuda"}),
}
GATE: dict[str, Mistake] = {
    "logits of 1 dimension": (
        ValueError,
        r"logits: expected \(N, E\) with E from 1, got \(5,\)",
        {"logits": LOGITS[:, 0]},
    ),
    "logits of integers": (
        TypeError,
        r"logits: expected a floating-point dtype",
        {"logits": LOGITS.long()},
    ),
    "top_k above E": (ValueError, r"top_k: expected an int from 1 to 3, got 4", {"top_k": 4}),
    "top_k 0": (ValueError, r"top_k: expected an int from 1 to 3, got 0", {"top_k": 0}),
    "over unknown": (ValueError, r"over: expected 'selected' or 'all', got 'k'", {"over": "k"}),
    "capacity negative": (
        ValueError,
        r"capacity: expected an int from 0, got -1",
        {"capacity": -1},
    ),
    "capacity no int": (TypeError, r"capacity: expected an int, got float", {"capacity": 1.2}),
    "mask of numbers": (
        TypeError,
        r"mask: expected bool, True = valid, got torch\.float32",
        {"mask": torch.ones(5)},
    ),
    "mask of other tokens": (
        ValueError,
        r"mask: expected \(5,\), got \(4,\)",
        {"mask": torch.ones(4, dtype=torch.bool)},
    ),
}


@pytest.mark.parametrize("name", list(MLP))
def test_routed_mlp(name: str) -> None:
    error, message, changes = MLP[name]
    arguments = {
        **{"x": X, "index": INDEX, "weight": WEIGHT},
        **{"w_in": W_IN, "b_in": B_IN, "w_out": W_OUT, "b_out": B_OUT},
    }
    assert routed_mlp(**arguments).shape == X.shape
    with pytest.raises(error, match=message):
        routed_mlp(**{**arguments, **changes})


@pytest.mark.parametrize("name", list(GATE))
def test_gate(name: str) -> None:
    error, message, changes = GATE[name]
    with pytest.raises(error, match=message):
        gate(**{"logits": LOGITS, "top_k": 2, **changes})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dispatch(backend: str) -> None:
    for index in (INDEX + 2, INDEX - 3):
        with pytest.raises(ValueError, match="index: expected -1 or experts from 0 to 2"):
            dispatch(index, 3, backend=backend)
    with pytest.raises(ValueError, match="num_experts: expected an int from 1, got 0"):
        dispatch(INDEX, 0, backend=backend)


def test_an_index_out_of_range_is_refused_past_the_door_and_in_compiled_code() -> None:
    with pytest.raises(ValueError, match="got values from 0 to 9"):
        torch.ops.flmoe.routing_dispatch(INDEX * 9, 3, "cpu")
    compiled = torch.compile(routed_mlp, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="index: expected -1 or experts"):
        compiled(X, INDEX * 9, WEIGHT, W_IN, B_IN, W_OUT, B_OUT)
    offsets, permutation = torch.tensor([0, 5, 5, 99]).int(), torch.arange(10).int()
    with pytest.raises(ValueError, match="offsets: expected non-decreasing"):
        torch.ops.flmoe.routed_mlp(
            *(X, WEIGHT, W_IN, B_IN, W_OUT, B_OUT, offsets, permutation), 0, "cpu"
        )
