"""Tests of PairInteractionMoE's error messages: argument, expected value, actual value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels import BackendUnavailable, PairInteractionMoE
from flmoe_kernels.ops.pair_moe.kinds import KINDS
from tests.support.pair_layers import pair_inputs, pair_layer


def test_an_explicit_backend_never_falls_back() -> None:
    layer = pair_layer(backend="cuda")
    with pytest.raises(BackendUnavailable, match=r"pair_moe: backend 'cuda' was requested, but"):
        layer(pair_inputs((3, 2)))


CONSTRUCTION: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "dims no list": (TypeError, r"dims: expected a list of widths, got int", {"dims": 5}),
    "one modality": (ValueError, r"dims: expected at least 2 modalities, got 1", {"dims": [4]}),
    "width no int": (TypeError, r"dims\[1\]: expected an int, got float", {"dims": [4, 2.0]}),
    "no width": (ValueError, r"dims\[0\]: expected an int from 2, got 0", {"dims": [0, 2]}),
    "width 1": (ValueError, r"dims\[1\]: expected an int from 2, got 1", {"dims": [2, 1]}),
    "no class": (ValueError, r"num_classes: expected an int from 1, got 0", {"num_classes": 0}),
    "nothing to return": (
        ValueError,
        r"num_classes: expected an int, as token_outputs is False; got None",
        {"num_classes": None},
    ),
    "kinds a name": (TypeError, r"kinds: expected a list of names, got str", {"kinds": "synergy"}),
    "unknown kind": (ValueError, r"kinds: expected names among .*'xor'", {"kinds": ["xor"]}),
    "no kind": (ValueError, r"kinds: expected 1 to 8 names, got 0", {"kinds": []}),
    "nine kinds": (ValueError, r"kinds: expected 1 to 8 names, got 9", {"kinds": ["null"] * 9}),
    "rank 0": (ValueError, r"rank: expected an int from 1, got 0", {"rank": 0}),
    "value_dim 0": (ValueError, r"value_dim: expected an int from 1, got 0", {"value_dim": 0}),
    "top 5 of 4": (ValueError, r"top_k: expected an int from 1 to 4, got 5", {"top_k": 5}),
    "cold": (ValueError, r"temperature: expected a positive number", {"temperature": 0.0}),
    "backend": (
        ValueError,
        r"backend: expected one of reference, cpu, triton, cuda, got 'gpu'",
        {"backend": "gpu"},
    ),
    "token_outputs": (
        TypeError,
        r"token_outputs: expected a bool, got str",
        {"token_outputs": "all"},
    ),
    "normalizer": (TypeError, r"normalizer: expected a number, got str", {"normalizer": "mean"}),
}


@pytest.mark.parametrize("mistake", CONSTRUCTION)
def test_mistakes_in_construction(mistake: str) -> None:
    error, message, changed = CONSTRUCTION[mistake]
    with pytest.raises(error, match=message):
        PairInteractionMoE(**{"dims": [4, 3], "num_classes": 2, **changed})


A, B = pair_inputs((3, 2))
ONES = torch.ones(2, 3, dtype=torch.bool)
CALLS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "inputs no list": (TypeError, r"inputs: expected a list of Tensors, got Tensor", {"inputs": A}),
    "one input": (ValueError, r"inputs: expected 2 modalities, got 1", {"inputs": [A]}),
    "all missing": (
        ValueError,
        r"inputs: expected at least one modality, got None for all",
        {"inputs": [None, None]},
    ),
    "no tensor": (TypeError, r"inputs\[1\]: expected a Tensor, got int", {"inputs": [A, 3]}),
    "2 dimensions": (
        ValueError,
        r"inputs\[0\]: expected \(batch, tokens, 5\), got \(3, 5\)",
        {"inputs": [A[0], B]},
    ),
    "width": (
        ValueError,
        r"inputs\[1\]: expected \(batch, tokens, 4\), got \(2, 3, 5\)",
        {"inputs": [A, A]},
    ),
    "batch": (
        ValueError,
        r"inputs\[1\]: expected batch 2 as inputs\[0\], got 1",
        {"inputs": [A, B[:1]]},
    ),
    "dtype": (
        TypeError,
        r"inputs\[0\]: expected dtype torch\.float64 as the layer's parameters, got torch\.int64",
        {"inputs": [A.long(), B]},
    ),
    "device": (
        ValueError,
        r"inputs\[0\]: expected device cpu as the layer's parameters, got meta",
        {"inputs": [A.to("meta"), B]},
    ),
    "masks no list": (TypeError, r"masks: expected a list .*got Tensor", {"masks": ONES}),
    "three masks": (ValueError, r"masks: expected 2, got 3", {"masks": [ONES, None, None]}),
    "mask no tensor": (
        TypeError,
        r"masks\[1\]: expected a Tensor, got str",
        {"masks": [ONES, "a"]},
    ),
    "mask of nothing": (
        ValueError,
        r"masks\[0\]: expected None as inputs\[0\] is, got \(2, 3\)",
        {"inputs": [None, B], "masks": [ONES, None]},
    ),
    "mask's shape": (
        ValueError,
        r"masks\[1\]: expected \(2, 2\) as inputs\[1\], got \(2, 3\)",
        {"masks": [None, ONES]},
    ),
    "mask's device": (
        ValueError,
        r"masks\[0\]: expected device cpu, got meta",
        {"masks": [ONES.to("meta"), None]},
    ),
    "mask's values": (
        ValueError,
        r"masks\[0\]: expected 0 \(padding\) and 1",
        {"masks": [ONES * 0.5, None]},
    ),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_mistakes_in_a_call(mistake: str) -> None:
    error, message, changed = CALLS[mistake]
    layer = pair_layer()
    arguments = {"inputs": [A, B], "masks": None, **changed}
    for call in (layer, layer.explain):
        with pytest.raises(error, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("replacements", "error", "message"),
    [
        (A, TypeError, r"replacements: expected a list of Tensors, got Tensor"),
        ([A], ValueError, r"replacements: expected 2 modalities, got 1"),
        ([A, None], TypeError, r"replacements\[1\]: expected a Tensor, got NoneType"),
        ([A, A], ValueError, r"replacements\[1\]: expected \(2, 2, 4\) as inputs\[1\]"),
        ([A, B.long()], TypeError, r"replacements\[1\]: expected dtype torch\.float64 as"),
    ],
)
def test_mistakes_in_replacements(replacements: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pair_layer()([A, B], interaction_losses=True, replacements=replacements)


def test_mistakes_in_losses() -> None:
    with pytest.raises(ValueError, match=r"replacements: expected None, as interaction_losses is"):
        pair_layer()([A, B], replacements=[A, B])
    with pytest.raises(ValueError, match=r"replacements\[0\]: expected None as inputs\[0\] is"):
        pair_layer()([None, B], interaction_losses=True, replacements=[A, B])
    for kinds in (KINDS[:3], ("synergy", *KINDS)):
        with pytest.raises(ValueError, match=rf"once each .* got {', '.join(kinds)}"):
            pair_layer(kinds=kinds)([A, B], interaction_losses=True)
