"""Tests of missing modalities against a plain statement of the rule, and of modality dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flmoe_kernels import (
    FusionTransformer,
    InteractionMoE,
    InteractionMoERegression,
    PairInteractionMoE,
)
from flmoe_kernels.layers.interaction_moe.fusion import sinusoidal_positions
from flmoe_kernels.layers.modalities import drop_modalities
from tests.support.inputs import draw_replacements
from tests.support.layers import LayerCase, fast_layer, outputs_and_gradients

FL = LayerCase((5, 3, 4), dim=12, batch=4, layers=2)
I2 = LayerCase((4, 4, 4), "i2moe", dim=12, batch=4, layers=2)
BOTH = pytest.mark.parametrize("case", [FL, I2], ids=["fl_i2moe", "i2moe"])
# present[b][m]
PRESENT = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)


def masks_of(case: LayerCase, present: Tensor = PRESENT) -> list[Tensor]:
    return [present[:, m : m + 1].repeat(1, length) for m, length in enumerate(case.lengths)]


def plain_pass(fusion: Any, tokens: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor:
    """The latent (M * D) of one sample, from only the modalities that it has."""
    width = fusion.network[0].norm1.weight.shape[0]
    position = fusion.pos_embed
    if position is None:
        position = sinusoidal_positions(
            sum(lengths), width, torch.device("cpu"), torch.float64
        ).unsqueeze(0)
    places = position.split(list(lengths), dim=1)
    parts = [x + place for x, place in zip(tokens, places, strict=True) if x is not None]
    for layer in fusion.network[:-1]:
        parts = layer(parts)
    means = iter(part.mean(dim=1)[0] for part in parts)
    return torch.cat([torch.zeros(width) if x is None else next(means) for x in tokens]).double()


def plain_statement(
    layer: Any, inputs: Sequence[Tensor], noise: Sequence[Sequence[Tensor]], present: Tensor
) -> dict[str, Tensor]:
    """Results of the layer, sample by sample and view by view; a view that does not exist has latent 0."""
    batch, count = present.shape
    lengths = [x.shape[1] for x in inputs]
    latents, logits = [], []
    for e, expert in enumerate(layer.interaction_experts):
        fusion = expert.fusion_model
        views = []
        for v in range(count + 1):
            rows = []
            for b in range(batch):
                tokens = [
                    (noise[e][m] if m == v - 1 else x)[b : b + 1] if present[b, m] else None
                    for m, x in enumerate(inputs)
                ]
                exists = v == 0 or present[b, v - 1]
                latent = plain_pass(fusion, tokens, lengths)
                rows.append(latent if exists else torch.zeros_like(latent))
            views.append(torch.stack(rows))
        latents.append(torch.stack(views))
        logits.append(fusion.network[-1](latents[-1]))
    z, y = torch.stack(latents), torch.stack(logits)
    measured = z if layer.compat == "fl_i2moe" and not layer.regression else y
    losses = [plain_loss(measured[e], e, present, layer.regression) for e in range(len(measured))]
    features = []
    for m, x in enumerate(inputs):
        mean = x.sum(dim=1) / max(1, x.shape[1]) * present[:, m : m + 1]
        features.append(F.normalize(mean, dim=1) if layer.compat == "fl_i2moe" else mean)
    weights = (layer.reweight.mlp(torch.cat(features, dim=1)) / 1.5).softmax(dim=1)
    return {
        "expert_logits": y,
        "weights": weights,
        "logits": torch.einsum("be,ebc->bc", weights, y[:, 0]),
        "losses": torch.stack(losses),
    } | ({} if layer.compat == "i2moe" else {"expert_latents": z, "latents": z[:, 0]})


def plain_loss(views: Tensor, e: int, present: Tensor, regression: bool) -> Tensor:
    """The mean over (sample, view) pairs that exist, 0 without any."""
    count = present.shape[1]

    def compare(b: int, m: int) -> Tensor:
        z, other = views[0, b], views[1 + m, b]
        if regression:
            return (z - other).square().mean()
        return F.cosine_similarity(z, other, dim=0)

    terms = []
    for b in range(len(present)):
        for m in range(count):
            if not present[b, m] or (e < count and (m == e or not present[b, e])):
                continue
            if e < count and regression:
                terms.append(compare(b, m) - compare(b, e))
            elif e < count:
                near, far = ((views[0, b] - views[1 + n, b] + 1e-7).norm() for n in (m, e))
                terms.append((near - far + 1.0).clamp_min(0))
            else:
                synergy = regression or e == count
                terms.append(compare(b, m) if synergy else 1 - compare(b, m))
    return torch.stack(terms).mean() if terms else views.new_zeros(())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("regression", [False, True], ids=["classes", "regression"])
@BOTH
def test_missing_modalities_follow_the_rule(
    case: LayerCase, regression: bool, backend: str
) -> None:
    kind = InteractionMoERegression if regression else InteractionMoE
    layer = kind.adopt(case.reference(torch.float64), backend=backend)
    inputs = case.inputs(torch.float64)
    noise = draw_replacements(inputs, case.experts)
    expected = plain_statement(layer, inputs, noise, PRESENT)
    found, _ = outputs_and_gradients(layer, inputs, masks_of(case), noise)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-9, msg=name)
    logits, _, mixed = layer.eval().inference(inputs, masks_of(case))
    torch.testing.assert_close(mixed, expected["logits"])
    torch.testing.assert_close(torch.stack(logits), expected["expert_logits"][:, 0])
    other, _ = outputs_and_gradients(layer.train(), inputs, None, noise)
    assert (other["losses"] - expected["losses"]).abs().min() > 1e-4


@BOTH
def test_gradients_of_missing_modalities(case: LayerCase) -> None:
    """Those of the reference; a missing modality's tokens and noise have gradient 0, and may be NaN."""
    inputs, masks = case.inputs(torch.float64), masks_of(case)
    noise = draw_replacements(inputs, case.experts)
    dirty = [torch.where(m.unsqueeze(2), x, torch.nan) for x, m in zip(inputs, masks, strict=True)]
    reference = InteractionMoE.adopt(case.reference(torch.float64), backend="reference")
    expected = outputs_and_gradients(reference, inputs, masks, noise)
    found = outputs_and_gradients(fast_layer(case, torch.float64), dirty, masks, noise)
    for results, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(results[name], value, rtol=1e-8, atol=1e-9, msg=name)
    for m, mask in enumerate(masks):
        assert not found[1][f"inputs.{m}"][~mask].any()
        assert not found[1][f"replacements.0.{m}"][~mask].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("missing", [(1,), (0, 2)])
@BOTH
def test_none_is_a_modality_that_no_sample_has(
    case: LayerCase, missing: tuple[int, ...], backend: str
) -> None:
    """With sinusoidal positions, None has no tokens, so the positions of the others are those without it."""
    layer = InteractionMoE.adopt(case.reference(torch.float64), backend=backend)
    inputs = case.inputs(torch.float64)
    noise = draw_replacements(inputs, case.experts)
    if case.compat == "fl_i2moe":
        inputs = [x[:, :0] if m in missing else x for m, x in enumerate(inputs)]
    given = [None if m in missing else x for m, x in enumerate(inputs)]
    rows = [[None if m in missing else x for m, x in enumerate(row)] for row in noise]
    present = torch.ones(case.batch, 3, dtype=torch.bool)
    present[:, list(missing)] = False
    padded = [
        [x[:, :0] if m in missing and case.compat == "fl_i2moe" else x for m, x in enumerate(row)]
        for row in noise
    ]
    masks = [None if m in missing else mask for m, mask in enumerate(masks_of(case, present))]
    expected = plain_statement(layer, inputs, padded, present)
    result = layer(given, masks, replacements=rows)
    torch.testing.assert_close(result[2], expected["logits"])
    torch.testing.assert_close(torch.stack(result[3]), expected["losses"])


def test_a_fusion_model_without_a_modality() -> None:
    for case in (FL, I2):
        fusion = case.reference(torch.float64).interaction_experts[0].fusion_model
        inputs = case.inputs(torch.float64)
        results = []
        for backend in ("cpu", "reference"):
            fusion.backend = backend
            results.append(fusion([inputs[0], None, inputs[2]], None, True))
        torch.testing.assert_close(*results)
        latent = results[0][1].unflatten(1, (3, -1))
        assert not latent[:, 1].any()
        tokens = [inputs[0], None, inputs[2]]
        lengths = case.lengths if case is I2 else (5, 0, 4)
        for b in range(case.batch):
            sample = [None if x is None else x[b : b + 1] for x in tokens]
            expected = plain_pass(fusion, sample, lengths)
            torch.testing.assert_close(results[0][1][b], expected.detach())


def test_views_that_do_not_exist_are_not_computed() -> None:
    counts = []
    for masks in (None, masks_of(FL)):
        with FlopCounterMode(display=False) as counter:
            fast_layer(FL)(FL.inputs(), masks)
        counts.append(counter.get_total_flops())
    # 32 of 48 tokens and 103 of 192 rows of views are valid. Removing only padding would leave 128 rows.
    assert counts[1] < 0.57 * counts[0]


def drop_counts(rate: float, present: Tensor | None) -> Tensor:
    torch.manual_seed(0)
    samples = 4000
    inputs = [torch.zeros(samples, 2, 3) for _ in range(3)]
    masks = None
    if present is not None:
        masks = [present[m].expand(samples, 2) for m in range(3)]
    kept = drop_modalities(inputs, masks, rate)
    return torch.stack([mask.any(dim=1) for mask in kept if mask is not None], dim=1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_modality_dropout_keeps_one_modality(rate: float) -> None:
    kept = drop_counts(rate, None)
    assert kept.any(dim=1).all()
    # Dropped with probability `rate`, unless all would be, which keeps each of three equally often.
    expected = 1 - rate + rate**3 / 3
    assert (kept.double().mean(dim=0) - expected).abs().max() < 0.03
    only = drop_counts(rate, torch.tensor([True, False, False]))
    assert only.tolist() == [[True, False, False]] * len(only)


@pytest.mark.parametrize("kind", ["layer", "fusion"])
@BOTH
def test_modality_dropout_in_training(case: LayerCase, kind: str) -> None:
    """The same on both backends, equal to masks of the same modalities; none in evaluation."""
    layer: Any = fast_layer(case, torch.float64)
    if kind == "fusion":
        layer = layer.interaction_experts[0].fusion_model
    layer.modality_dropout = 0.5
    inputs = case.inputs(torch.float64)

    def outputs(module: Any, masks: Any = None) -> Any:
        torch.manual_seed(5)
        result = module(inputs, masks) if kind == "fusion" else module(inputs, masks)[2]
        return result.detach()

    results = []
    for backend in ("cpu", "reference"):
        layer.backend = backend
        results.append(outputs(layer))
    torch.testing.assert_close(*results)
    torch.manual_seed(5)
    masks = drop_modalities(inputs, None, 0.5)
    layer.modality_dropout = 0.0
    if kind == "fusion" or case is I2:  # a mask of the caller normalizes the reweighting's input
        torch.testing.assert_close(outputs(layer, masks), results[0])
    complete = outputs(layer)
    assert (complete - results[0]).abs().max() > 1e-3
    layer.modality_dropout = 0.5
    torch.testing.assert_close(outputs(layer.eval()), complete)


def test_pair_layer_losses_and_modality_dropout() -> None:
    torch.manual_seed(0)
    layer = PairInteractionMoE((6, 5), num_classes=3, backend="cpu").double()
    inputs = [torch.randn(4, 3, 6).double(), torch.randn(4, 2, 5).double()]
    noise = [x.flip(0) for x in inputs]
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    masks = [present[:, m : m + 1].expand(x.shape[:2]) for m, x in enumerate(inputs)]

    def losses(rows: list[int]) -> Tensor:
        return layer(
            [x[rows] for x in inputs],
            [m[rows] for m in masks],
            interaction_losses=True,
            replacements=[x[rows] for x in noise],
        ).losses

    # Uniqueness losses need both views; the others average 2 + 1 + 1 + 2 of them.
    both, first, second = losses([0, 3]), losses([1]), losses([2])
    expected = torch.cat([both[:2], (4 * both[2:] + first[2:] + second[2:]) / 6])
    torch.testing.assert_close(losses([0, 1, 2, 3]), expected)
    layer.modality_dropout = 1.0
    torch.manual_seed(1)
    found = layer(inputs).logits
    torch.manual_seed(1)
    dropped = drop_modalities(inputs, None, 1.0)
    layer.modality_dropout = 0.0
    torch.testing.assert_close(found, layer(inputs, dropped).logits)
    assert "modality_dropout" not in repr(layer)


def test_compiled_layer_without_a_modality() -> None:
    layer, (a, _, c) = fast_layer(FL).eval(), FL.inputs()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = [a, None, c]
    noise = [[a.flip(0), None, c.flip(0)] for _ in range(FL.experts)]
    found, expected = (each(given, replacements=noise) for each in (compiled, layer))
    torch.testing.assert_close(found[2], expected[2])
    torch.testing.assert_close(torch.stack(found[3]), torch.stack(expected[3]))


def test_errors() -> None:
    layer = fast_layer(FL)
    a, b, c = FL.inputs()
    with pytest.raises(ValueError, match=r"replacements\[0\]\[1\]: expected \(4, 0, 12\)"):
        layer([a, None, c], replacements=draw_replacements([a, b, c], 5))
    fusion = FusionTransformer(3, 12, 3, 1, 2, modality_dropout=0.2)
    with pytest.raises(ValueError, match=r"fusion_model\.modality_dropout: expected 0, got 0\.2"):
        InteractionMoE(3, fusion, hidden_dim=12)
