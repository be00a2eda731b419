"""Tests of the differences by design that the report of `swap` lists."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from flmoe_kernels.published.swap import swap
from tests.support.inputs import draw
from tests.support.lineage import fl, i2, make_layer, make_sparse_layer
from tests.support.lineage_sparse import make_mlp

GATE_LOSSES = r"gate losses in evaluation: \S+ in the original, \S+ in the swapped layer"
CAPACITY = [
    rf"capacity in {mode}: \d+ choices of valid tokens dropped before swap, \d+ after; outputs differ .*"
    for mode in ("evaluation", "training")
]
ROUTING = r"random routing in evaluation only in the original: outputs differ by up to \S+"
PADDING = "20 padded tokens use capacity .*"


def with_settings(layer: nn.Module, **settings: Any) -> nn.Module:
    for part in layer.modules():
        for name, value in settings.items():
            if hasattr(part, name):
                setattr(part, name, value)
    return layer


def differences(layer: nn.Module, **call: Any) -> dict[str, float]:
    report = swap(layer, **call)
    (entry,) = (*report.swapped, *report.swapped_mlps)
    (values,) = (x for key in ("swapped", "swapped_mlps") for x in report.as_dict()[key])
    assert [(x["text"], x["size"]) for x in values["differences"]] == [
        (x.text, x.size) for x in entry.differences
    ]
    assert all(f"\n{entry.name}: {x.text}\n" in str(report) for x in entry.differences)
    assert ("docs/fastmoe.md" in str(report)) == bool(entry.differences)
    return {x.text: x.size for x in entry.differences}


LAST = "; original: only the last modality, no gradients; swapped: all modalities, with gradients"
CASES: list[tuple[Any, list[str]]] = [
    (lambda: make_layer(), []),
    (lambda: make_sparse_layer(fl), [GATE_LOSSES + LAST, *CAPACITY, PADDING]),
    (
        lambda: make_sparse_layer(i2, "SwitchGate"),
        [GATE_LOSSES + LAST, *CAPACITY],
    ),
    (
        lambda: make_sparse_layer(i2, "AddtionalNoisyGate"),
        [GATE_LOSSES + LAST.replace("only the last modality", "all modalities")],
    ),
    (lambda: with_settings(make_mlp(), random_routing=True), [ROUTING, *CAPACITY]),
    (lambda: make_mlp("SwitchGate"), [GATE_LOSSES, *CAPACITY]),
    (lambda: make_mlp("NaiveGate"), []),
]


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_every_difference_is_listed(make: Any, expected: list[str]) -> None:
    found = list(differences(make()))
    assert len(found) == len(expected), found
    for text, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, text), text


def test_the_sizes_are_those_of_the_layers_own_settings() -> None:
    """A capacity below the load drops choices, and the report states how many; without limits none are dropped."""
    x = (draw(2, 9, 16),)
    sizes = []
    for rate in (0.3, 9.0):
        mlp = with_settings(make_mlp("GShardGate", num_expert=2), capacity=(rate, rate)).eval()
        dropped = (mlp.gate(x[0].flatten(0, 1))[0] < 0).sum()
        text = next(x for x in differences(mlp, inputs=x) if "capacity in evaluation" in x)
        published, here = map(int, re.findall(r"(\d+) (?:choices|after)", text))
        assert published == dropped
        sizes.append((published, here))
    assert sizes[0][0] > 0
    assert sizes[1] == (0, 0)


def test_padded_tokens_do_not_count_as_dropped() -> None:
    layer = make_sparse_layer(fl, layers=1)
    found = differences(with_settings(layer, capacity=(9.0, 9.0)))
    assert sum(" 0 choices of valid tokens dropped before swap, 0 after" in x for x in found) == 2


def test_samples_without_tokens_are_counted() -> None:
    inputs = [draw(3, 4, 16), draw(3, 5, 16)]
    masks = [torch.ones(3, 4), torch.ones(3, 5)]
    assert differences(make_layer(), inputs=inputs, masks=masks) == {}
    masks[0][1] = masks[1][1] = 0
    text = "samples without a valid token (1): NaN in the original, latent 0 after swap"
    assert differences(make_layer(), inputs=inputs, masks=masks) == {text: 1}
