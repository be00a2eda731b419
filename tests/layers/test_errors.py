"""Tests of error messages of layers: argument, expected value, actual value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels import BackendUnavailable, InteractionMoE, PairInteractionMoE
from flmoe_kernels.ops.pair_moe.kinds import KINDS
from tests.support.inputs import draw_replacements
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_inputs, pair_layer


def test_an_explicit_backend_never_falls_back() -> None:
    layer = pair_layer(backend="cuda")
    with pytest.raises(BackendUnavailable, match=r"pair_moe: backend 'cuda' was requested, but"):
        layer(pair_inputs((3, 2)))


CONSTRUCTION: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, r"dims: expected a list of widths, got int", {"dims": 5}),
    (ValueError, r"dims: expected at least 2 modalities, got 1", {"dims": [4]}),
    (ValueError, r"dims\[1\]: expected an int from 2, got 1", {"dims": [2, 1]}),
    (ValueError, r"num_classes: expected an int from 1, got 0", {"num_classes": 0}),
    (
        ValueError,
        r"num_classes: expected an int, as token_outputs is False; got None",
        {"num_classes": None},
    ),
    (ValueError, r"kinds: expected names among .*'xor'", {"kinds": ["xor"]}),
    (ValueError, r"kinds: expected 1 to 8 names, got 9", {"kinds": ["null"] * 9}),
    (ValueError, r"rank: expected an int from 1, got 0", {"rank": 0}),
    (ValueError, r"top_k: expected an int from 1 to 4, got 5", {"top_k": 5}),
    (ValueError, r"temperature: expected a positive number", {"temperature": 0.0}),
]


@pytest.mark.parametrize(("error", "message", "changed"), CONSTRUCTION)
def test_mistakes_in_construction(
    error: type[Exception], message: str, changed: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        PairInteractionMoE(**{"dims": [4, 3], "num_classes": 2, **changed})


CASE = LayerCase((5, 4), dim=8, batch=2)
A, B = CASE.inputs()
NOISE = draw_replacements([A, B], 4)
ONES = torch.ones(2, 5, dtype=torch.bool)
Mistake = tuple[dict[str, Any], type[Exception], str]
# Changed arguments of a call, error and message, of both layers.
CALLS: list[Mistake] = [
    ({"inputs": A}, TypeError, r"inputs: expected a list of Tensors, got Tensor"),
    ({"inputs": [A]}, ValueError, r"inputs: expected 2 modalities, got 1"),
    ({"inputs": [None, None]}, ValueError, r"inputs: expected at least one modality, got None"),
    (
        {"inputs": [A[0], B]},
        ValueError,
        r"inputs\[0\]: expected \(batch, tokens, 8\), got \(5, 8\)",
    ),
    ({"inputs": [A, B[..., :7]]}, ValueError, r"inputs\[1\]: .* tokens, 8\), got \(2, 4, 7\)"),
    ({"inputs": [A, B[:1]]}, ValueError, r"inputs\[1\]: expected batch 2 as inputs\[0\], got 1"),
    (
        {"inputs": [A.double(), B]},
        TypeError,
        r"inputs\[0\]: expected dtype torch\.float32 as .*float64",
    ),
    ({"inputs": [A, B.to("meta")]}, ValueError, r"inputs\[1\]: expected device cpu as .* got meta"),
    ({"masks": ONES}, TypeError, r"masks: expected a list .*got Tensor"),
    ({"masks": [ONES, None, None]}, ValueError, r"masks: expected 2, got 3"),
    (
        {"masks": [None, ONES]},
        ValueError,
        r"masks\[1\]: expected \(2, 4\) as inputs\[1\], got \(2, 5\)",
    ),
    ({"masks": [ONES * 0.5, None]}, ValueError, r"masks\[0\]: expected 0 \(padding\) and 1"),
]


def make_layer(name: str) -> tuple[Any, str]:
    """A layer, and the name of a second method with the same arguments."""
    if name == "pairs":
        return pair_layer((8, 8), torch.float32), "explain"
    return InteractionMoE.adopt(CASE.reference(), backend="cpu"), "inference"


@pytest.mark.parametrize("name", ["pairs", "interactions"])
@pytest.mark.parametrize(("changed", "error", "message"), CALLS)
def test_mistakes_in_a_call(
    name: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer, method = make_layer(name)
    for call in (layer, getattr(layer, method)):
        with pytest.raises(error, match=f"^{message}"):
            call(**{"inputs": [A, B], "masks": None, **changed})


REPLACEMENTS: list[tuple[Any, type[Exception], str]] = [
    ([*NOISE[:3], [A.double(), B]], TypeError, r"\[3\]\[0\]: expected dtype torch\.float32"),
    (NOISE[:3], ValueError, r": expected one list per expert, 4, got 3"),
    ([[A, A], *NOISE[1:]], ValueError, r"\[0\]\[1\]: expected \(2, 4, 8\) as"),
]


@pytest.mark.parametrize(("replacements", "error", "message"), REPLACEMENTS)
def test_mistakes_in_replacements(replacements: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^replacements{message}"):
        make_layer("interactions")[0]([A, B], replacements=replacements)


def test_mistakes_in_losses_of_pairs() -> None:
    layer = make_layer("pairs")[0]
    with pytest.raises(ValueError, match=r"replacements: expected None, as interaction_losses is"):
        layer([A, B], replacements=[A, B])
    with pytest.raises(ValueError, match=r"replacements\[1\]: expected \(2, 4, 8\) as inputs\[1\]"):
        layer([A, B], interaction_losses=True, replacements=[A, A])
    with pytest.raises(ValueError, match=rf"once each .* got {', '.join(KINDS[:3])}"):
        pair_layer((8, 8), torch.float32, kinds=KINDS[:3])([A, B], interaction_losses=True)
