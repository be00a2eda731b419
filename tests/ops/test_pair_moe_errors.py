"""Every mistake that a caller of pair_moe, pair_map and top_pairs can make gets its own message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flmoe_kernels
from flmoe_kernels import BackendUnavailable, pair_map, pair_moe, top_pairs
from tests.support.inputs import draw

Q, K = draw(2, 3, 4, 5), draw(2, 3, 6, 5)
A, C = draw(2, 3, 4, 7), draw(2, 3, 6, 7)
KINDS = ("unique_a", "synergy", "null")
MASK = torch.ones(2, 4, dtype=torch.bool)

Mistake = tuple[type[Exception], str, dict[str, Any]]
CALLS: dict[str, Mistake] = {
    "q no tensor": (TypeError, r"q: expected a Tensor, got list", {"q": [1.0]}),
    "c no tensor": (TypeError, r"c: expected a Tensor, got NoneType", {"c": None}),
    "q of integers": (TypeError, r"q: expected a floating-point dtype", {"q": Q.long()}),
    "q of 3 dimensions": (ValueError, r"q: expected \(B, E, La, R\).*got \(3, 4, 5\)", {"q": Q[0]}),
    "nine experts": (
        ValueError,
        r"q: .*E from 1 to 8.*got \(2, 9, 4, 5\)",
        {"q": Q.repeat(1, 3, 1, 1)},
    ),
    "no experts": (ValueError, r"q: .*E from 1 to 8.*got \(2, 0, 4, 5\)", {"q": Q[:, :0]}),
    "rank 0": (ValueError, r"q: .*R from 1.*got \(2, 3, 4, 0\)", {"q": Q[..., :0]}),
    "k of 3 dimensions": (
        ValueError,
        r"k: expected \(B, E, Lb, R\) = \(2, 3, any, 5\), got \(3, 6, 5\)",
        {"k": K[0]},
    ),
    "k of another rank": (
        ValueError,
        r"k: expected \(B, E, Lb, R\) = \(2, 3, 6, 5\), got \(2, 3, 6, 4\)",
        {"k": K[..., :4]},
    ),
    "a of other tokens": (
        ValueError,
        r"a: expected \(B, E, La, V\) = \(2, 3, 4, 7\), got \(2, 3, 3, 7\)",
        {"a": A[:, :, :3]},
    ),
    "a of width 0": (ValueError, r"a: .*with V from 1, got \(2, 3, 4, 0\)", {"a": A[..., :0]}),
    "c of another width": (
        ValueError,
        r"c: expected \(B, E, Lb, V\) = \(2, 3, 6, 7\), got \(2, 3, 6, 6\)",
        {"c": C[..., :6]},
    ),
    "c of another dtype": (
        TypeError,
        r"c: expected dtype torch\.float32 as q, got torch\.float64",
        {"c": C.double()},
    ),
    "k on another device": (
        ValueError,
        r"k: expected device cpu as q, got meta",
        {"k": K.to("meta")},
    ),
    "kinds a string": (
        TypeError,
        r"kinds: expected a sequence of names, got str",
        {"kinds": "abc"},
    ),
    "kinds a number": (TypeError, r"kinds: expected a sequence of names, got int", {"kinds": 3}),
    "kinds unknown": (
        ValueError,
        r"kinds: expected names among unique_a, .*null, got 'unique'",
        {"kinds": ("unique", "null", "null")},
    ),
    "kinds too few": (
        ValueError,
        r"kinds: expected 3 names, one per expert of q, got 2",
        {"kinds": KINDS[:2]},
    ),
    "bias of another length": (
        ValueError,
        r"gate_bias: expected \(3,\), got \(2,\)",
        {"gate_bias": torch.zeros(2)},
    ),
    "bias of another dtype": (
        TypeError,
        r"gate_bias: expected dtype torch\.float32 as q or torch\.float32, got torch\.float64",
        {"gate_bias": torch.zeros(3).double()},
    ),
    "bias no tensor": (TypeError, r"gate_bias: expected a Tensor, got float", {"gate_bias": 0.0}),
    "mask no tensor": (TypeError, r"mask_a: expected a Tensor, got list", {"mask_a": [True]}),
    "mask of numbers": (
        TypeError,
        r"mask_a: expected bool, True = valid, got torch\.float32",
        {"mask_a": MASK.float()},
    ),
    "mask of the other side": (
        ValueError,
        r"mask_b: expected \(2, 6\), got \(2, 4\)",
        {"mask_b": MASK},
    ),
    "mask on another device": (
        ValueError,
        r"mask_a: expected device cpu as q, got meta",
        {"mask_a": MASK.to("meta")},
    ),
    "top_k 0": (ValueError, r"top_k: expected an int from 1 to 3, got 0", {"top_k": 0}),
    "top_k above E": (ValueError, r"top_k: expected an int from 1 to 3, got 4", {"top_k": 4}),
    "top_k no int": (TypeError, r"top_k: expected an int, got float", {"top_k": 2.0}),
    "temperature 0": (
        ValueError,
        r"temperature: expected a positive number .*, got 0",
        {"temperature": 0},
    ),
    "temperature NaN": (
        ValueError,
        r"temperature: expected a positive number .*, got nan",
        {"temperature": float("nan")},
    ),
    "temperature too large for a float": (
        ValueError,
        r"temperature: expected a positive number .*, got 1000",
        {"temperature": 10**400},
    ),
    "temperature whose inverse overflows": (
        ValueError,
        r"temperature: expected a positive number .*, got 1e-40",
        {"temperature": 1e-40},
    ),
    "q sparse": (TypeError, r"q: expected a dense \(strided\) Tensor", {"q": Q.to_sparse()}),
    "temperature a string": (
        TypeError,
        r"temperature: expected a number, got str",
        {"temperature": "1"},
    ),
    "unknown backend": (ValueError, r"backend: expected one of .*got 'gpu'", {"backend": "gpu"}),
    "no CUDA kernels": (BackendUnavailable, r"pair_moe: .*'cuda'", {"backend": "cuda"}),
}
HEADS: dict[str, Mistake] = {
    "head no tensor": (TypeError, r"head: expected a Tensor, got list", {"head": [1]}),
    "head of another width": (
        ValueError,
        r"head: expected \(E, V\) = \(3, 7\), got \(3, 6\)",
        {"head": draw(3, 6)},
    ),
    "head with classes but no target": (
        ValueError,
        r"head: expected \(E, V\) = \(3, 7\), got \(3, 7, 2\)",
        {"head": draw(3, 7, 2)},
    ),
    "target without classes": (
        ValueError,
        r"head: expected \(E, V, C\) = \(3, 7, any\), got \(3, 7\)",
        {"target": torch.zeros(2).long()},
    ),
    "target of another dtype": (
        TypeError,
        r"target: expected int64, got torch\.int32",
        {"head": draw(3, 7, 2), "target": torch.zeros(2).int()},
    ),
    "target of another batch": (
        ValueError,
        r"target: expected shape \(2,\), got \(3,\)",
        {"head": draw(3, 7, 2), "target": torch.zeros(3).long()},
    ),
    "target out of range": (
        ValueError,
        r"target: expected values from 0 to 1, got 0 to 2",
        {"head": draw(3, 7, 2), "target": torch.tensor([0, 2])},
    ),
    "target negative": (
        ValueError,
        r"target: expected values from 0 to 1, got -1 to 1",
        {"head": draw(3, 7, 2), "target": torch.tensor([-1, 1])},
    ),
    "head of another dtype": (
        TypeError,
        r"head: expected dtype torch\.float32 as q, got torch\.float64",
        {"head": draw(3, 7).double()},
    ),
}


def arguments(changes: dict[str, Any]) -> dict[str, Any]:
    return {"q": Q, "k": K, "a": A, "c": C, "kinds": KINDS, **changes}


@pytest.mark.parametrize("name", list(CALLS))
def test_mistakes(name: str) -> None:
    error, message, changes = CALLS[name]
    for call, rest in (
        (pair_moe, {}),
        (pair_map, {"head": draw(3, 7)}),
        (top_pairs, {"head": draw(3, 7), "n_pairs": 2}),
    ):
        with pytest.raises(error, match=message):
            call(**arguments(changes), **rest)  # type: ignore[operator]


@pytest.mark.parametrize("name", list(HEADS))
def test_mistakes_with_a_head(name: str) -> None:
    error, message, changes = HEADS[name]
    for call, rest in ((pair_map, {}), (top_pairs, {"n_pairs": 2})):
        with pytest.raises(error, match=message):
            call(**{**arguments({"head": draw(3, 7)}), **changes, **rest})  # type: ignore[operator]


def test_the_call_without_a_mistake_runs() -> None:
    assert pair_moe(**arguments({})).y.shape == A.shape


@pytest.mark.parametrize("n_pairs", [0, -1, 1.5, True, None])
def test_number_of_pairs(n_pairs: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="n_pairs: expected an int"):
        top_pairs(**arguments({"head": draw(3, 7)}), n_pairs=n_pairs)


def test_reduction() -> None:
    with pytest.raises(ValueError, match=r"reduce: expected one of none, experts, pool, got 'sum'"):
        pair_moe(**arguments({"reduce": "sum"}))


def test_backends_are_told_apart() -> None:
    """An explicit choice is kept: by argument and by context."""
    with flmoe_kernels.use_backend("reference"):
        y: Tensor = pair_moe(**arguments({})).y
    assert torch.equal(y, pair_moe(**arguments({"backend": "reference"})).y)
