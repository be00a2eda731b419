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
    (TypeError, r"dims\[1\]: expected an int, got float", {"dims": [4, 2.0]}),
    (ValueError, r"dims\[0\]: expected an int from 2, got 0", {"dims": [0, 2]}),
    (ValueError, r"dims\[1\]: expected an int from 2, got 1", {"dims": [2, 1]}),
    (ValueError, r"num_classes: expected an int from 1, got 0", {"num_classes": 0}),
    (
        ValueError,
        r"num_classes: expected an int, as token_outputs is False; got None",
        {"num_classes": None},
    ),
    (TypeError, r"kinds: expected a list of names, got str", {"kinds": "synergy"}),
    (ValueError, r"kinds: expected names among .*'xor'", {"kinds": ["xor"]}),
    (ValueError, r"kinds: expected 1 to 8 names, got 0", {"kinds": []}),
    (ValueError, r"kinds: expected 1 to 8 names, got 9", {"kinds": ["null"] * 9}),
    (ValueError, r"rank: expected an int from 1, got 0", {"rank": 0}),
    (ValueError, r"value_dim: expected an int from 1, got 0", {"value_dim": 0}),
    (ValueError, r"top_k: expected an int from 1 to 4, got 5", {"top_k": 5}),
    (ValueError, r"temperature: expected a positive number", {"temperature": 0.0}),
    (
        ValueError,
        r"backend: expected one of reference, cpu, triton, cuda, got 'gpu'",
        {"backend": "gpu"},
    ),
    (TypeError, r"token_outputs: expected a bool, got str", {"token_outputs": "all"}),
    (TypeError, r"normalizer: expected a number, got str", {"normalizer": "mean"}),
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
    ({"inputs": [A, 3]}, TypeError, r"inputs\[1\]: expected a Tensor, got int"),
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
    (
        {"inputs": [A.long(), B]},
        TypeError,
        r"inputs\[0\]: expected dtype torch\.float32 as .*int64",
    ),
    ({"inputs": [A, B.to("meta")]}, ValueError, r"inputs\[1\]: expected device cpu as .* got meta"),
    ({"masks": ONES}, TypeError, r"masks: expected a list .*got Tensor"),
    ({"masks": [ONES, None, None]}, ValueError, r"masks: expected 2, got 3"),
    ({"masks": [5, None]}, TypeError, r"masks\[0\]: expected a Tensor, got int"),
    (
        {"inputs": [None, B], "masks": [ONES, None]},
        ValueError,
        r"masks\[0\]: expected None as inputs\[0\] is",
    ),
    (
        {"masks": [None, ONES]},
        ValueError,
        r"masks\[1\]: expected \(2, 4\) as inputs\[1\], got \(2, 5\)",
    ),
    ({"masks": [ONES.to("meta"), None]}, ValueError, r"masks\[0\]: expected device cpu, got meta"),
    ({"masks": [ONES * 0.5, None]}, ValueError, r"masks\[0\]: expected 0 \(padding\) and 1"),
    (
        {"masks": [ONES * float("nan"), None]},
        ValueError,
        r"masks\[0\]: expected 0 \(padding\) and 1",
    ),
]


def layers() -> dict[str, tuple[Any, str]]:
    """Layers, and the name of a second method with the same arguments."""
    backends = ("cpu", "reference")
    moe = {x: InteractionMoE.adopt(CASE.reference(), backend=x) for x in backends}
    return {"pairs": (pair_layer((8, 8), torch.float32), "explain")} | {
        name: (layer, "inference") for name, layer in moe.items()
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize(("changed", "error", "message"), CALLS)
def test_mistakes_in_a_call(
    name: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer, method = layers()[name]
    for call in (layer, getattr(layer, method)):
        with pytest.raises(error, match=f"^{message}"):
            call(**{"inputs": [A, B], "masks": None, **changed})


REPLACEMENTS: list[tuple[Any, type[Exception], str]] = [
    ([NOISE[0], ["a", B], *NOISE[2:]], TypeError, r"\[1\]\[0\]: expected a Tensor, got str"),
    ([*NOISE[:3], [A.double(), B]], TypeError, r"\[3\]\[0\]: expected dtype torch\.float32"),
    (NOISE[:3], ValueError, r": expected one list per expert, 4, got 3"),
    ([*NOISE[:2], [A], NOISE[3]], ValueError, r"\[2\]: expected 2 modalities, got 1"),
    ([[A, A], *NOISE[1:]], ValueError, r"\[0\]\[1\]: expected \(2, 4, 8\) as"),
]


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(("replacements", "error", "message"), REPLACEMENTS)
def test_mistakes_in_replacements_of_each_expert(
    name: str, replacements: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^replacements{message}"):
        layers()[name][0]([A, B], replacements=replacements)


@pytest.mark.parametrize(
    ("replacements", "error", "message"),
    [
        (A, TypeError, r"replacements: expected a list of Tensors, got Tensor"),
        ([A], ValueError, r"replacements: expected 2 modalities, got 1"),
        ([A, None], TypeError, r"replacements\[1\]: expected a Tensor, got NoneType"),
        ([A, A], ValueError, r"replacements\[1\]: expected \(2, 4, 8\) as inputs\[1\]"),
        ([A, B.long()], TypeError, r"replacements\[1\]: expected dtype torch\.float32 as"),
    ],
)
def test_mistakes_in_replacements(replacements: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layers()["pairs"][0]([A, B], interaction_losses=True, replacements=replacements)


def test_mistakes_in_losses() -> None:
    with pytest.raises(ValueError, match=r"replacements: expected None, as interaction_losses is"):
        layers()["pairs"][0]([A, B], replacements=[A, B])
    with pytest.raises(ValueError, match=r"replacements\[0\]: expected None as inputs\[0\] is"):
        layers()["pairs"][0]([None, B], interaction_losses=True, replacements=[A, B])
    for kinds in (KINDS[:3], ("synergy", *KINDS)):
        with pytest.raises(ValueError, match=rf"once each .* got {', '.join(kinds)}"):
            pair_layer((8, 8), torch.float32, kinds=kinds)([A, B], interaction_losses=True)
