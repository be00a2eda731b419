"""The layer against the reference, interleaved, with the gate on their ratio, see bench.measure.gate_ratio."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.layers import (
    FAST,
    REFERENCE,
    contestant,
    inference,
    make_inputs,
    make_reference,
    training_step,
)
from bench.measure import gate_ratio, peak_growth
from bench.shapes import ENRICO, LAYER_SHAPES, MIMIC, MMIMDB, LayerShape

MAKERS = {"training": training_step, "inference": inference}

# (shape, pass) -> the ratio below which this gate fails, and rounds. Floors stand well below what is measured
# (bench/results) so that only a real regression trips them.
FLOORS = {
    ("mmimdb", "training"): (4.0, 3),
    ("mmimdb", "inference"): (1.8, 10),
    ("enrico", "training"): (2.5, 3),
    ("enrico", "inference"): (1.2, 10),
    ("mimic", "training"): (1.5, 20),
    ("mimic", "inference"): (1.0, 30),
    ("mmimdb_sparse", "training"): (4.0, 3),
    ("mmimdb_sparse", "inference"): (1.8, 10),
}
MEMORY_FRACTION = 1 / 3


def make_call(shape: LayerShape, name: str, kind: str) -> Any:
    inputs, masks = make_inputs(shape)
    return MAKERS[kind](contestant(name, make_reference(shape), shape), inputs, masks)


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("shape", LAYER_SHAPES, ids=lambda shape: shape.name)
def test_layer(benchmark: Any, shape: LayerShape, kind: str) -> None:
    floor, rounds = FLOORS[shape.name, kind]
    peer, fast = (make_call(shape, name, kind) for name in (REFERENCE, FAST))
    what = f"interaction_moe {kind} at {shape.name}"
    gate_ratio(benchmark, fast, peer, floor=floor, rounds=rounds, what=what, peer_name=REFERENCE)


def test_training_memory() -> None:
    """Peak memory of a training step at mmimdb: at most a third of the reference's."""
    fast, peer = (peak_growth(make_call, MMIMDB, name, "training") for name in (FAST, REFERENCE))
    assert fast <= MEMORY_FRACTION * peer, (
        f"interaction_moe training at mmimdb: expected at most {MEMORY_FRACTION:.2f} of the "
        f"reference's {peer / 2**20:.0f} MiB, measured {fast / 2**20:.0f} MiB"
    )


@pytest.mark.parametrize("shape", [MIMIC, ENRICO], ids=lambda shape: shape.name)
def test_same_answers(shape: LayerShape) -> None:
    """What is timed computes the same: logits of the two contestants agree."""
    inputs, masks = make_inputs(shape)
    reference = make_reference(shape).eval()
    fast = contestant(FAST, reference, shape).eval()
    with torch.no_grad():
        expected = reference.inference(inputs, masks)[2]
        actual = fast.inference(inputs, masks)[2]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.zeros_like(expected), expected, rtol=1e-4, atol=1e-5)
