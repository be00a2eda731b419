"""Tests of value functions: inputs of a coalition, outputs, errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.explain import (
    Run,
    TokenGame,
    TwoAdditiveGame,
    probe_game,
    probe_pairs,
    shapley_interactions,
    token_means,
)
from tests.support.explain_games import Planted, drawn, interaction_layer
from tests.support.inputs import draw_masks
from tests.support.layers import LayerCase
from tests.support.pair_layers import DIMS, pair_inputs, pair_layer
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(5, 4))


def test_outputs_and_targets() -> None:
    x = CASE.inputs(torch.float64)
    layer = interaction_layer(CASE)
    with torch.no_grad():
        experts, _, mixed = layer.inference(x)
    everything = np.ones((1, 9), dtype=np.bool_)
    for sample in range(2):
        game = TokenGame(layer, x, fill="zero", sample=sample)
        assert game.target == int(mixed[sample].argmax())
        assert game(everything)[0] == pytest.approx(float(mixed[sample].max()), abs=1e-12)
        game = TokenGame(layer, x, fill="zero", sample=sample, output="log_prob", target=0)
        expected = float(mixed[sample].log_softmax(0)[0])
        assert game(everything)[0] == pytest.approx(expected, abs=1e-12)
        game = TokenGame(layer, x, fill="zero", sample=sample, expert="redundancy")
        assert game.target == int(mixed[sample].argmax())
        expected = float(experts[3][sample, game.target])
        assert game(everything)[0] == pytest.approx(expected, abs=1e-12)
    targets = torch.tensor([2, 0])
    found = shapley_interactions(layer, x, target=targets, fill="zero")
    assert [each.game["target"] for each in found] == [2, 0]
    for sample, each in enumerate(found):
        assert each.value == pytest.approx(float(mixed[sample, targets[sample]]), abs=1e-12)


def test_two_additive_games_agree_with_their_layers() -> None:
    lengths = (3, 2, 4)
    layer, x = pair_layer(DIMS), pair_inputs(lengths)
    masks = draw_masks("partial", 2, lengths)
    for sample, expert in ((0, None), (1, "synergy"), (1, 0)):
        options = {"expert": expert, "sample": sample}
        closed, played = (
            TwoAdditiveGame(layer, x, masks, **options),
            TokenGame(layer, x, masks, **options),
        )
        np.testing.assert_array_equal(closed.tokens, played.tokens)
        assert closed.describe() == played.describe()
        inside = drawn(64, closed.players)
        np.testing.assert_allclose(closed(inside), played(inside), atol=1e-12)
        assert closed(inside).std() > 1e-3
        ends = closed(np.array([[True], [False]]).repeat(closed.players, axis=1))
        np.testing.assert_allclose(ends, [closed.value, closed.baseline], atol=1e-12)


@pytest.mark.parametrize("fill", ["drop", "zero", "mean"])
def test_half_precision(fill: str) -> None:
    """Values equal the layer's logits in its dtype, up to its last bits."""
    layer, x = interaction_layer(CASE, torch.bfloat16), CASE.inputs(torch.bfloat16)
    means = token_means([(x, None)]) if fill == "mean" else None
    options: dict[str, Any] = {"fill": fill, "baseline": means, "target": 1, "sample": 1}
    inside = np.concatenate([np.ones((1, 9), dtype=np.bool_), drawn(7, 9)])
    game = TokenGame(layer, x, **options)
    values = game(inside)
    with torch.no_grad():
        given = game._masked.present(*game._absent(inside))
        _, _, logits = layer.inference(*given)
    assert logits.dtype == torch.bfloat16
    np.testing.assert_allclose(values, logits[:, 1].double().numpy(), rtol=2**-6)
    wide = interaction_layer(CASE, torch.float32)
    wide.load_state_dict(layer.state_dict())
    if means is not None:
        options["baseline"] = [each.float() for each in means]
    exact = TokenGame(wide, [each.float() for each in x], **options)(inside)
    assert np.abs(values - exact).max() < 0.1 * np.abs(exact).max() < np.abs(exact - exact[0]).max()


def test_the_callers_autocast_applies() -> None:
    """The model runs under the caller's autocast, and its half-precision logits are converted to float64."""
    linear = torch.nn.Linear(4, 3).eval()
    x = [torch.randn(1, 6, 4)]
    game = TokenGame(lambda inputs, masks: linear(inputs[0]).tanh().sum(dim=1), x, fill="zero")
    inside = drawn(8, 6)
    exact = game(inside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = game(inside)
    assert cast.dtype == np.float64
    assert 0 < np.abs(cast - exact).max() < 0.05 * np.abs(exact).max()


def test_a_closed_form_has_finite_terms() -> None:
    x = pair_inputs((3, 2))
    masks = [torch.tensor([[True, True, False]] * 2), None]
    layer = pair_layer()
    clean = TwoAdditiveGame(layer, x, masks, target=0)
    x[0][:, 2] = torch.nan
    assert TwoAdditiveGame(layer, x, masks, target=0).value == clean.value, "padding"
    x[0][0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"inputs: expected valid tokens that are finite"):
        shapley_interactions(layer, x, masks, target=0)
    with pytest.raises(ValueError, match=r"coalitions: expected \(coalitions, 4\), got \(2, 3\)"):
        clean(np.ones((2, 3)))
    with pytest.raises(
        TypeError, match=r"model: expected a PairInteractionMoE, got InteractionMoE"
    ):
        TwoAdditiveGame(interaction_layer(CASE), CASE.inputs(torch.float64))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("fill", ["drop", "zero", "mean"])
def test_values_on_a_gpu(fill: str, tmp_path: Path) -> None:
    """Samples stay on the GPU, and results are on the host."""
    layer, x = pair_layer(DIMS, backend="reference"), pair_inputs((6, 3, 4))
    masks = draw_masks("partial", 2, (6, 3, 4))
    found = []
    for device in ("cpu", "cuda"):
        there, given = layer.to(device), [each.to(device) for each in x]
        valid = [each.to(device) for each in masks]
        means = token_means([(given, valid)], exempt=[0]) if fill == "mean" else None
        options: dict[str, Any] = {"fill": fill, "baseline": means, "target": 1}
        game = TokenGame(there, given, valid, sample=1, **options)
        run = Run(checkpoint=tmp_path / device)
        both = [probe_pairs(there, given, valid, run=run, **options)[1] for _ in range(2)]
        assert both[0]["RG"].to_dict() == both[1]["RG"].to_dict()
        found.append([game(drawn(32, game.players)), both[0]["SII"].values, both[0]["RG"].values])
    for mine, other in zip(*found, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-10)
        assert float(mine.std()) > 1e-4


X = torch.ones(5, dtype=torch.float64)
A, B = (0, 1), (1, 1)
# (options of a call, message of the error, with its type unless it is a ValueError)
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"output": "p"}, r"output: expected one of logit, log_prob, got 'p'"),
    ({"fill": "x"}, r"fill: expected one of zero, mean, drop, got 'x'"),
    ({"method": "x"}, r"method: expected one of closed_form, auto"),
    ({"indices": ["SV"]}, r"indices: expected distinct names of SII, k-SII"),
    ({"indices": "SII"}, r"indices: .* such as \('SII',\), got 'SII'"),
    ({"expert": "x"}, r"expert: expected one of unique_0, unique_1, s"),
    ({"expert": 4}, r"expert: expected an int from 0 to 3, got 4"),
    ({"target": torch.zeros(3).long()}, r"target: expected shape \(2,\), got \(3,\)"),
    ({"fill": "mean"}, r"baseline: expected 2 Tensors with fill='mean'"),
    ({"baseline": []}, r"baseline: expected None with fill='drop'"),
    (
        {"fill": "mean", "baseline": [X[:3]] * 2},
        r"baseline\[0\]: expected \(8,\) or \(5, 8\), got \(3,\)",
    ),
    ({"pairs": "x"}, r"pairs: expected one of all, across, screened, got 'x'"),
    ({"pairs": [A]}, r"pairs: expected a list of \(\(m, i\), \(n, j\)\), got int64 \(1, 2\)"),
    ({"pairs": [(A, (0, 9))]}, r"pairs: expected valid tokens, got \(modality, token\) \(0, 9\)"),
    ({"pairs": [(A, A)]}, r"pairs: expected pairs of two tokens, got \(0, 1\) twice"),
    ({"pairs": [(A, B), (B, A)]}, r"pairs: expected distinct pairs"),
    ({"top": 3}, r"top: expected both scores and top"),
    ({"top": 3, "scores": [X] * 2}, r"scores\[0\]: expected \(2, tokens\), got \(5,\)"),
    ({"top": 3, "scores": [X.expand(2, 5) * torch.nan, X[:4].expand(2, 4)]}, "finite scores"),
    ({"run": Run(distributed=True)}, r"distributed: expected an initialised process group"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    layer, x = interaction_layer(CASE), CASE.inputs(torch.float64)
    assert_refused(lambda: probe_pairs(layer, x, **options), message)


def test_mistakes_of_models_and_inputs() -> None:
    x, layer = CASE.inputs(torch.float64), interaction_layer(CASE)
    game, ones = TokenGame(interaction_layer(CASE), x), np.ones((2, 8))
    layer.interaction_experts[1].fusion_model.network[0].dropout1.train()
    message = r"model: expected eval mode, got interaction_experts\.1.*dropout1 in training mode"
    assert_refused(lambda: probe_pairs(layer, x), message)
    layer.eval()
    learned = LayerCase(lengths=(4, 4), compat="i2moe")
    fixed, its = interaction_layer(learned), learned.inputs(torch.float64)
    assert len(shapley_interactions(fixed, its, fill="zero")) == 2
    in_training = TokenGame(changed := interaction_layer(CASE), x)
    changed.train()
    wrong: list[tuple[Any, Any, str]] = [
        (fixed, its, r"fill: expected 'zero' or 'mean' for a layer with learned positions"),
        (None, x, r"TypeError: model: expected a Module or a callable, got NoneType"),
        (lambda x, m: (1, 2), x, r"TypeError: model: expected logits .* got tuple; swap"),
        (lambda x, m: x[0], x, r"model: expected logits \(B, C\), got \(1"),
        (layer, [None, None], r"inputs: expected at least one modality, got none"),
        (layer, [torch.ones(2, 3)], r"inputs\[0\]: expected \(batch, tokens, features\), got \(2"),
        (layer, [x[0], x[1][:1]], r"inputs\[1\]: expected \(2, tokens, features\), got \(1, 4"),
    ]
    for model, inputs, text in wrong:
        assert_refused(partial(probe_pairs, model, inputs), text)
    assert_refused(
        lambda: in_training(np.ones((1, 9))), "model: expected eval mode, got InteractionMoE"
    )
    dropping = PairInteractionMoE((8, 8), num_classes=2, modality_dropout=0.5).train()
    text = "model: expected eval mode, got PairInteractionMoE"
    assert_refused(lambda: probe_pairs(dropping, [torch.ones(1, 2, 8)] * 2), text)
    assert_refused(lambda: game(ones), r"coalitions: expected \(coalitions, 9\), got \(2, 8\)")
    large = Planted(20, lambda inside: inside.sum(axis=1))
    text = r"method: .* for 20 tokens; 'exact' enumerates .* 16"
    assert_refused(lambda: probe_game(large, method="exact"), text)
