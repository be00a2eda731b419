"""Tests of the Triton kernels of the reweighting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget
from flmoe_kernels.ops.reweighting import api, reference
from tests.support.inputs import SPECIAL_LOGITS, as_dtype, draw, draw_masks, gradients
from tests.support.operator_cases import OPS, compare

TRITON = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("none", "partial", "padded_sample", "padded_modality", "mixed")
# One block of tokens, and several, of which shorter modalities use fewer.
LENGTHS = (((5, 3), 32), ((37, 1, 20), 130), ((19, 7), 300))
FEATURES = [
    *((*each, pattern, torch.float32) for each in LENGTHS for pattern in PATTERNS),
    *((*LENGTHS[2], pattern, dtype) for pattern in ("none", "mixed") for dtype in DTYPES[1:]),
]
MIXES = [
    *((shape, torch.float32) for shape in ((4, 3, 23), (5, 33, 2), (7, 9, 300))),
    *(((5, 9, 3), dtype) for dtype in DTYPES[1:]),
]


def concatenated(masks: list[Tensor | None] | None, batch: int, lengths: tuple[int, ...]) -> Tensor:
    """Mask (batch, L) for the operator from a list of masks, some of which may be None."""
    found = masks or [None] * len(lengths)
    return torch.cat(
        [
            torch.ones((batch, length), dtype=torch.bool) if mask is None else mask.bool()
            for mask, length in zip(found, lengths, strict=True)
        ],
        dim=1,
    )


@pytest.mark.parametrize(("lengths", "width", "pattern", "dtype"), FEATURES, ids=str)
def test_features(lengths: tuple[int, ...], width: int, pattern: str, dtype: torch.dtype) -> None:
    batch = 3
    masks = draw_masks(pattern, batch, lengths)
    tokens = draw(batch, sum(lengths), width, seed=4)
    mask = None if masks is None else concatenated(masks, batch, lengths)

    def operator(x: Tensor) -> Tensor:
        normalized = [each is not None for each in masks or [None] * len(lengths)]
        inputs = x.split(list(lengths), 1)
        return api.reweighting_features(inputs, masks, normalized, x, mask, TRITON)

    def oracle(x: Tensor) -> Tensor:
        return reference.reweighting_features(x.split(list(lengths), dim=1), masks)

    found = compare(operator, oracle, [tokens], dtype)
    if dtype == torch.float32:
        other = OPS.reweighting_features(tokens, mask, lengths, 0 if masks else 3, TRITON)[0]
        assert_outside_budget(other, *found[0][1:], "another set of normalised modalities")


def test_features_read_nothing_of_padded_tokens() -> None:
    lengths, batch = (6, 5), 3
    masks = draw_masks("partial", batch, lengths)
    mask = concatenated(masks, batch, lengths)
    tokens = draw(batch, 11, 9, seed=4)
    results = []
    for padding in (0.0, float("nan")):
        leaf = torch.where(mask[..., None], tokens, padding).requires_grad_()
        out = OPS.reweighting_features(leaf, mask, lengths, 3, TRITON)[0]
        results.append([out, *gradients([out], [leaf])])
    assert all(map(torch.equal, *results))
    assert (results[0][1][~mask] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("shape", "dtype"), MIXES, ids=str)
def test_mix(shape: tuple[int, int, int], temperature: float, dtype: torch.dtype) -> None:
    experts, batch, classes = shape
    tensors = [draw(batch, experts, seed=1, scale=3.0), draw(experts, batch, classes, seed=2)]
    found = compare(
        lambda *x: api.mix_experts(*x, temperature, TRITON),
        lambda *x: reference.mix_experts(*x, temperature),
        tensors,
        dtype,
        outputs=2,
    )
    other = OPS.mix_experts(*as_dtype(tensors, dtype), 1.1 * temperature, TRITON)
    for wrong, (_, *exact) in zip(other, found[:2], strict=True):
        assert_outside_budget(wrong, *exact, "another temperature")


def test_infinite_and_nan_scores_act_as_in_torch() -> None:
    leaves = [torch.tensor(SPECIAL_LOGITS), draw(4, len(SPECIAL_LOGITS), 3, seed=2)]
    results = []
    for function in (
        lambda *x: api.mix_experts(*x, 1.5, TRITON),
        lambda *x: reference.mix_experts(*x, 1.5),
    ):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = function(*inputs)
        results.append([*(x.detach() for x in out), *gradients(out, inputs)])
    assert results[1][0].isnan().any()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_empty_batches() -> None:
    features, _ = OPS.reweighting_features(torch.empty(0, 5, 3), None, [2, 3], 0, TRITON)
    assert features.shape == (0, 6)
    weights, mixed = OPS.mix_experts(torch.empty(0, 4), torch.empty(4, 0, 3), 1.0, TRITON)
    assert (weights.shape, mixed.shape) == ((0, 4), (0, 3))
