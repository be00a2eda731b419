"""Tests of named shapes: ragged lengths and loads of experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flmoe_kernels.profile.operators import interaction_moe, routed_mlp
from flmoe_kernels.profile.operators.draws import zipf_probabilities
from flmoe_kernels.profile.shapes import (
    GPU_BATCH,
    LayerShape,
    RoutedShape,
    by_name,
    named_shapes,
)

RAGGED = {"decor_mimic": (1, 1, 256), "mmhs150k": (0, 5, 60)}
ZIPF = [shape for shape in named_shapes("cuda").values() if getattr(shape, "load", "") == "zipf"]


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_lengths_pad_to_the_longest_sample(name: str) -> None:
    modality, least, most = RAGGED[name]
    shape = by_name(name, "cuda")
    assert isinstance(shape, LayerShape)
    assert shape.batch == GPU_BATCH
    assert shape.ragged
    lengths = shape.lengths[modality]
    assert len(set(lengths)) > GPU_BATCH // 2
    assert least <= min(lengths)
    assert max(lengths) == shape.padded_tokens[modality] <= most
    assert sum(shape.valid_tokens) == sum(map(sum, shape.lengths))
    inputs, masks = interaction_moe.make_inputs(dataclasses.replace(shape, dim=4), "cpu")
    assert [x.shape[1] for x in inputs] == list(shape.padded_tokens)
    assert [tuple(mask.sum(1).tolist()) for mask in masks] == list(shape.lengths)


def deviations(shape: RoutedShape) -> torch.Tensor:
    """Tokens per expert, largest first, less Zipf's, in standard deviations of independent tokens."""
    index, _ = routed_mlp.make_inputs(shape, False, "cpu")
    counts = torch.bincount(index.flatten(), minlength=shape.experts).sort(descending=True)[0]
    probability = zipf_probabilities(shape.experts, shape.choices)
    deviation = (shape.tokens * probability * (1 - probability)).sqrt().clamp(min=0.5)
    return (counts - shape.tokens * probability).abs() / deviation


@pytest.mark.parametrize("shape", ZIPF, ids=lambda shape: shape.name)
def test_zipf_loads(shape: RoutedShape) -> None:
    narrow = dataclasses.replace(shape, width=1, hidden=1)
    index, _ = routed_mlp.make_inputs(narrow, False, "cpu")
    ordered = index.sort(1)[0]
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert torch.equal(index, routed_mlp.make_inputs(narrow, False, "cpu")[0])
    assert deviations(narrow).max() < 5
    # Negative control.
    assert deviations(dataclasses.replace(narrow, load="uniform")).max() > 50


def test_zipf_probabilities() -> None:
    """Proportional to 1/r, except for experts that every token chooses."""
    for experts, choices in ((4, 2), (16, 2), (64, 8), (3, 3), (1, 1)):
        probability = zipf_probabilities(experts, choices)
        assert probability.max() <= 1
        torch.testing.assert_close(float(probability.sum()), float(choices))
        shares = (probability * torch.arange(1, experts + 1))[probability < 1]
        torch.testing.assert_close(shares, shares[:1].expand_as(shares))
    assert (zipf_probabilities(16, 2) < 1).all()
    assert (zipf_probabilities(64, 8) == 1).sum() == 1
