"""Tests of the Triton kernels of losses, reweighting features and mixed logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.core.error_budget import assert_outside_budget
from flmoe_kernels.layers.interaction_moe.reference import reweighting_features
from flmoe_kernels.ops.interaction_losses import op as _op  # noqa: F401  registers the operators
from flmoe_kernels.ops.interaction_losses.triton import launch as launches
from tests.support.inputs import as_dtype, draw, draw_masks, gradients
from tests.support.operator_cases import OPS, compare, evaluate, on_triton, reference_losses

TRITON = "triton"
QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In float32 every shape; in half precision, whose own part is a cast on either side, few.
SPREADS = (0.05, 4.0)
LOSSES = [
    *(
        (s, x, torch.float32)
        for s in ((2, 7, 3), (3, 1, 17), (4, 3, 64), (2, 17, 63))
        for x in SPREADS
    ),
    *(((2, 2, 700), spread, dtype) for spread in SPREADS for dtype in DTYPES),
]
PATTERNS = ("none", "partial", "padded_sample", "padded_modality", "mixed")
# One block of tokens, and several, in which the shorter modalities have fewer.
LENGTHS = (((5, 3), 32), ((37, 1, 20), 130), ((19, 7), 300))
FEATURES = [
    *((*each, pattern, torch.float32) for each in LENGTHS for pattern in PATTERNS),
    *((*LENGTHS[2], pattern, dtype) for pattern in ("none", "mixed") for dtype in DTYPES[1:]),
]
MIXES = [
    *((shape, torch.float32) for shape in ((4, 3, 23), (5, 33, 2), (7, 9, 300))),
    *(((5, 9, 3), dtype) for dtype in DTYPES[1:]),
]

losses = on_triton("interaction_losses")


def concatenated(masks: list[Tensor | None] | None, batch: int, lengths: tuple[int, ...]) -> Tensor:
    """(batch, L): what the operator takes of masks of which some may be None."""
    found = masks or [None] * len(lengths)
    return torch.cat(
        [
            torch.ones((batch, length), dtype=torch.bool) if mask is None else mask.bool()
            for mask, length in zip(found, lengths, strict=True)
        ],
        dim=1,
    )


def normalized(masks: list[Tensor | None] | None) -> int:
    return sum(1 << m for m, mask in enumerate(masks or []) if mask is not None)


def mix_reference(scores: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(scores / temperature, dim=1)
    return weights, torch.einsum("be,ebc->bc", weights, logits)


@pytest.mark.parametrize(("shape", "spread", "dtype"), LOSSES, ids=str)
def test_losses(shape: tuple[int, int, int], spread: float, dtype: torch.dtype) -> None:
    """Several chunks of columns, several blocks of samples, triplets inside and outside the margin."""
    modalities, batch, width = shape
    latents = draw(modalities + 2, modalities + 1, batch, width, seed=5, scale=spread)
    # A triplet's loss is a difference of distances.
    size = spread * (2 * width) ** 0.5 if dtype == torch.float32 else 0.0
    compare(losses, reference_losses, [latents], dtype, magnitude=size)


def test_losses_of_one_column() -> None:
    """A cosine of two numbers is a sign; its gradient is rounding alone, but that of the distances is not."""
    latents = draw(5, 4, 7, 1, seed=5).requires_grad_()
    pair = [evaluate(function, [latents], 1) for function in (losses, reference_losses)]
    for (out, grad), (want, want_grad) in [pair]:
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(grad[:3], want_grad[:3])


@pytest.mark.parametrize("active", [True, False])
def test_triplet_margin(active: bool) -> None:
    latents = torch.zeros(4, 3, 1, 4)
    latents[:, 1, 0, 0], latents[:, 2, 0, 0] = 1.0, 1.5 if active else 2.5
    (found, *_), (grad, *_) = compare(losses, reference_losses, [latents], torch.float32)
    expected = torch.tensor([1.5, 0.5] if active else [2.5, 0.0])
    torch.testing.assert_close(found[:2], expected, atol=1e-6, rtol=0)
    assert bool((grad[1] != 0).any()) == active


def test_losses_of_zero_latents_and_identical_views() -> None:
    shape = (4, 3, 3, 6)
    one_zero_view = draw(*shape, seed=1)
    one_zero_view[:, 2] = 0
    zero_anchor = draw(*shape, seed=2)
    zero_anchor[:, 0] = 0
    zero_sample = draw(*shape, seed=3)
    zero_sample[:, :, 1] = 0
    same_views = draw(4, 1, 3, 6, seed=4).expand(shape)
    for latents in (one_zero_view, zero_anchor, zero_sample, same_views, torch.zeros(shape)):
        compare(losses, reference_losses, [latents], torch.float32)


def test_wrong_losses_fail() -> None:
    """The control: another view order, another expert order, and one sample fewer are seen."""
    latents = draw(4, 3, 6, 20, seed=5)
    found = compare(losses, reference_losses, [latents], torch.float32)
    wrong = (latents.flip(1), latents.flip(0), latents[:, :, :5], torch.zeros_like(latents))
    for each in wrong:
        results = evaluate(losses, [each.clone().requires_grad_()], 1)
        for result, (_, *exact) in zip(results, found, strict=True):
            if result.shape == exact[1].shape:
                assert_outside_budget(result, *exact, "wrong losses")


def test_nan_and_infinity_reach_their_own_expert_alone() -> None:
    for value in (float("nan"), float("inf")):
        latents = draw(4, 3, 5, 7, seed=3)
        latents[1, 0, 2, 4] = latents[2, 1, 4, 0] = value
        leaf = latents.requires_grad_()
        found = losses(leaf)
        want = reference_losses(leaf.detach())
        assert torch.equal(found.isfinite(), want.isfinite())
        assert found.isfinite().tolist() == [True, False, False, True]
        (grad,) = gradients([found], [leaf])
        assert grad[0].isfinite().all()
        assert grad[1, :, [0, 1, 3, 4]].isfinite().all()
        assert not grad[1, :, 2].isfinite().all()


def test_the_same_bits_again() -> None:
    latents = draw(4, 3, 9, 70, seed=3, dtype=torch.bfloat16).requires_grad_()
    assert all(map(torch.equal, *(evaluate(losses, [latents], 1) for _ in range(2))))


@pytest.mark.parametrize(("lengths", "width", "pattern", "dtype"), FEATURES, ids=str)
def test_features(lengths: tuple[int, ...], width: int, pattern: str, dtype: torch.dtype) -> None:
    batch = 3
    masks = draw_masks(pattern, batch, lengths)
    tokens = draw(batch, sum(lengths), width, seed=4)
    mask = None if masks is None else concatenated(masks, batch, lengths)

    def operator(x: Tensor) -> Tensor:
        return OPS.reweighting_features(x, mask, lengths, normalized(masks), TRITON)[0]

    def oracle(x: Tensor) -> Tensor:
        return reweighting_features(x.split(list(lengths), dim=1), masks)

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
        lambda *x: OPS.mix_experts(*x, temperature, TRITON),
        lambda *x: mix_reference(*x, temperature),
        tensors,
        dtype,
        outputs=2,
    )
    other = OPS.mix_experts(*as_dtype(tensors, dtype), 1.1 * temperature, TRITON)
    for wrong, (_, *exact) in zip(other, found[:2], strict=True):
        assert_outside_budget(wrong, *exact, "another temperature")


def test_mix_of_a_slice_and_one_gradient_alone() -> None:
    whole = draw(4, 3, 5, 6, seed=2).requires_grad_()
    scores = draw(5, 4, seed=1).requires_grad_()
    for wanted in ([0], [1], [0, 1]):
        results = []
        for function in (
            lambda *x: OPS.mix_experts(*x, 1.5, TRITON),
            lambda *x: mix_reference(*x, 1.5),
        ):
            out = function(scores, whole[:, 0])
            results.append(gradients([out[i] for i in wanted], [scores, whole]))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
        assert (results[0][0] != 0).any()


def test_empty_batches() -> None:
    assert losses(torch.empty(4, 3, 0, 5)).isnan().all()
    grad = OPS.interaction_losses_backward(torch.ones(4), torch.empty(4, 3, 0, 5), TRITON)
    assert grad.shape == (4, 3, 0, 5)
    features, _ = OPS.reweighting_features(torch.empty(0, 5, 3), None, [2, 3], 0, TRITON)
    assert features.shape == (0, 6)
    weights, mixed = OPS.mix_experts(torch.empty(0, 4), torch.empty(4, 0, 3), 1.0, TRITON)
    assert (weights.shape, mixed.shape) == ((0, 4), (0, 3))


def test_refusals() -> None:
    """Calls of the registered operators that would read past a tensor."""
    latents, tokens = draw(4, 3, 2, 5), draw(2, 5, 3)
    features, statistics = draw(2, 6), draw(2, 2, 2)
    mask, scores, logits = torch.ones(2, 5, dtype=torch.bool), draw(2, 4), draw(4, 2, 3)
    for name, arguments, message in (
        ("interaction_losses", (latents[:, :2],), "latents: expected"),
        ("interaction_losses", (latents.double(),), "latents: expected float32"),
        ("interaction_losses_backward", (draw(3), latents), "grad_losses: expected"),
        ("reweighting_features", (tokens, None, [2, 2], 0), "lengths: expected"),
        ("reweighting_features", (tokens, None, [5, 0], 0), "lengths: expected"),
        ("reweighting_features", (tokens, mask[:, :4], [2, 3], 0), "mask: expected"),
        ("reweighting_features", (tokens, mask.int(), [2, 3], 0), "mask: expected"),
        ("reweighting_features", (tokens.double(), None, [2, 3], 0), "tokens: expected float32"),
        (
            "reweighting_features_backward",
            (features, features, statistics[:1], None, [2, 3]),
            "statistics: expected",
        ),
        (
            "reweighting_features_backward",
            (features[:, :5], features, statistics, None, [2, 3]),
            "grad_features: expected",
        ),
        ("mix_experts", (scores[:, :3], logits, 1.0), "scores: expected"),
        ("mix_experts", (scores[:, :0], logits[:0], 1.0), "logits: expected"),
        ("mix_experts", (scores.half(), logits, 1.0), "scores: expected"),
        ("mix_experts_backward", (scores, logits[0, :1], scores, logits, 1.0), "grad_mixed: "),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(OPS, name)(*arguments, TRITON)
    for name, arguments in (
        ("mix_experts", (scores, logits, 1.0)),
        ("reweighting_features", (tokens, None, [2, 3], 0)),
    ):
        with pytest.raises(BackendUnavailable, match=f"{name}: this operator has no cpu kernels"):
            getattr(OPS, name)(*arguments)


def test_opcheck() -> None:
    latents, tokens = draw(4, 3, 2, 5).requires_grad_(), draw(2, 5, 3).requires_grad_()
    scores, logits = draw(2, 4).requires_grad_(), draw(4, 2, 3).requires_grad_()
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    features, statistics = OPS.reweighting_features(tokens, mask, [2, 3], 1, TRITON)
    weights, mixed = OPS.mix_experts(scores, logits, 1.5, TRITON)
    kept = [x.detach() for x in (features, statistics, weights, mixed, latents, logits)]
    features, statistics, weights, mixed, plain, parts = kept
    for op, arguments in (
        (OPS.interaction_losses, (latents,)),
        (OPS.interaction_losses_backward, (draw(4), plain)),
        (OPS.reweighting_features, (tokens, mask, [2, 3], 1)),
        (OPS.reweighting_features_backward, (features, features, statistics, mask, [2, 3])),
        (OPS.mix_experts, (scores, logits, 1.5)),
        (OPS.mix_experts_backward, (weights, mixed, weights, parts, 1.5)),
    ):
        # Tracing a backward on its own adds nothing to what the compiled forward traces.
        tests = QUICK if "backward" in str(op) else (*QUICK, "test_aot_dispatch_dynamic")
        torch.library.opcheck(op.default, (*arguments, TRITON), test_utils=tests)


def test_the_table_names_every_kernel() -> None:
    meta = torch.device("meta")
    calls = launches.call_launches(
        torch.empty(4, 3, 32, 512, device=meta),
        torch.empty(32, 516, 256, device=meta),
        None,
        (320, 196),
        torch.empty(4, 32, 23, device=meta),
    )
    assert set(calls) == set(launches.TABLE)
