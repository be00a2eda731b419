"""Value functions: what a model sees of a coalition, which of its outputs counts, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from explain_games import Planted, drawn, interaction_layer
from pair_layers import DIMS, pair_inputs, pair_layer
from torch import Tensor, nn

from flmoe_kernels.explain import (
    Run,
    TokenGame,
    TwoAdditiveGame,
    probe_game,
    probe_pairs,
    shapley_interactions,
    token_means,
)
from flmoe_kernels.testing import LayerCase, draw_masks

CASE = LayerCase(lengths=(5, 4))


class Recorder(nn.Module):
    """Keeps what it is given; logits are sums of valid features, times 1, 2 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        self.calls.append((inputs, masks))
        total = torch.zeros(len(inputs[0]), dtype=inputs[0].dtype)
        for m, x in enumerate(inputs):
            if x is not None:
                kept = x if masks is None or masks[m] is None else x * masks[m].unsqueeze(2)
                total = total + kept.sum(dim=(1, 2))
        return total.unsqueeze(1) * torch.tensor([1.0, 2.0, 3.0], dtype=total.dtype)


@pytest.mark.parametrize("fill", ["drop", "zero", "mean", "mean by position"])
def test_what_the_model_sees(fill: str) -> None:
    x = [torch.randn(2, 3, 4), None, torch.randn(2, 2, 4)]
    masks = [torch.tensor([[1, 1, 1], [1, 0, 1]]), None, None]
    shape = (4,) if fill == "mean" else (-1, 4)
    baseline = None
    if fill.startswith("mean"):
        lengths = (3, 0, 2)
        baseline = [torch.randn(n, 4) if shape[0] < 0 else torch.randn(4) for n in lengths]
        baseline[1] = None
    model = Recorder().eval()
    game = TokenGame(
        model, x, masks, target=1, fill=fill.split()[0], baseline=baseline, sample=1, max_batch=3
    )
    assert game.tokens.tolist() == [[0, 0], [0, 2], [2, 0], [2, 1]]
    assert (game.players, game.lengths, game.target) == (4, (3, 0, 2), 1)
    model.calls.clear()
    inside = drawn(8, 4)
    values = game(inside)
    assert values.dtype == np.float64
    assert [len(inputs[0]) for inputs, _ in model.calls] == [3, 3, 2]
    for k, row in enumerate(inside):
        inputs, given = model.calls[k // 3]
        there = {(int(m), int(i)): bool(row[p]) for p, (m, i) in enumerate(game.tokens)}
        assert inputs[1] is None
        for m, length in ((0, 3), (2, 2)):
            for i in range(length):
                original = x[m][1, i]
                present = there.get((m, i))
                token = inputs[m][k % 3, i]
                if fill == "drop":
                    assert torch.equal(token, original)
                    assert bool(given[m][k % 3, i]) == bool(present)
                    continue
                if present is False:
                    original = {
                        "zero": torch.zeros(4),
                        "mean": baseline and baseline[m],
                        "mean by position": baseline and baseline[m][min(i, len(baseline[m]) - 1)],
                    }[fill]
                assert torch.equal(token, original), "padded tokens stay as they are"
        if fill != "drop":
            assert torch.equal(given[0][k % 3], masks[0][1])
            assert given[2] is None
        with torch.no_grad():
            own = [None if t is None else t[k % 3 : k % 3 + 1] for t in inputs]
            logit = model(own, [None if t is None else t[k % 3 : k % 3 + 1] for t in given])
        model.calls.pop()
        assert values[k] == pytest.approx(float(logit[0, 1]), rel=1e-5)
    assert TokenGame(model, x, fill="zero").describe()["fill"] == "zero"


def test_masks_stay_away_where_none_were_given() -> None:
    model = Recorder().eval()
    game = TokenGame(model, [torch.randn(1, 3, 4)], [None], target=0, fill="zero")
    game(np.zeros((1, 3), dtype=np.bool_))
    assert [masks for _, masks in model.calls] == [None, None]


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
    pair = pair_layer(DIMS[:2])
    x = pair_inputs((3, 2))
    with torch.no_grad():
        out = pair(x)
    game = TokenGame(pair, x, expert="synergy", target=1)
    assert game(np.ones((1, 5)))[0] == pytest.approx(float(out.expert_logits[0, 2, 1]), abs=1e-12)


def test_the_fast_layer_computes_no_absent_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from flmoe_kernels.interaction_moe import module

    rows = []
    plan = module.plan_tokens

    def spy(*args: Any, **options: Any) -> Any:
        found = plan(*args, **options)
        rows.append(found.rows)
        return found

    monkeypatch.setattr(module, "plan_tokens", spy)
    masks = draw_masks("partial", 2, CASE.lengths)
    game = TokenGame(interaction_layer(CASE), CASE.inputs(torch.float64), masks, target=0)
    rows.clear()
    inside = drawn(20, game.players)
    game(inside)
    assert rows == [int(inside.sum())]


def test_two_additive_games_are_their_layers() -> None:
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


def test_token_means() -> None:
    batches: list[Any] = []
    for seed in range(3):
        x = CASE.inputs(seed=seed)
        masks = draw_masks("mixed", 2, CASE.lengths, seed=seed)
        for m, mask in enumerate(masks):
            if mask is not None:
                x[m][~mask] = torch.nan
        batches.append((x if seed else [x[0], None], masks if seed else None))
    found = token_means(batches)
    for m in range(2):
        kept = []
        for x, masks in batches:
            if x[m] is not None:
                mask = None if masks is None else masks[m]
                kept.append(x[m].flatten(0, 1) if mask is None else x[m][mask])
        torch.testing.assert_close(found[m], torch.cat(kept).mean(dim=0))
    for samples, message in (
        ([], r"samples: expected batches of \(inputs, masks\), got none"),
        ([([None], None)], r"samples: expected a valid token of modality 0, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            token_means(samples)


MISTAKES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "output": (ValueError, r"output: expected one of logit, log_prob, got 'p'", {"output": "p"}),
    "fill": (ValueError, r"fill: expected one of zero, mean, drop, got 'x'", {"fill": "x"}),
    "method": (ValueError, r"method: expected one of closed_form, auto", {"method": "x"}),
    "index": (ValueError, r"indices: expected one or more of SII, RG", {"indices": ["SV"]}),
    "expert": (ValueError, r"expert: expected one of unique_0, unique_1, s", {"expert": "x"}),
    "expert 4": (ValueError, r"expert: expected an int from 0 to 3, got 4", {"expert": 4}),
    "target": (ValueError, r"target: expected an int from 0 to 2, got 3", {"target": 3}),
    "target kind": (TypeError, r"target: expected an int, got float", {"target": 1.0}),
    "targets": (
        ValueError,
        r"target: expected an int or \(2,\) int64, got \(3,\)",
        {"target": torch.zeros(3, dtype=torch.int64)},
    ),
    "no baseline": (ValueError, r"baseline: expected 2 Tensors with fill='mean'", {"fill": "mean"}),
    "baseline": (ValueError, r"baseline: expected None with fill='drop'", {"baseline": []}),
    "baseline shape": (
        ValueError,
        r"baseline\[0\]: expected \(8,\) or \(5, 8\), got \(3,\)",
        {"fill": "mean", "baseline": [torch.zeros(3, dtype=torch.float64)] * 2},
    ),
    "pairs": (ValueError, r"pairs: expected one of all, across, got 'x'", {"pairs": "x"}),
    "pairs shape": (ValueError, r"pairs: expected 'all', 'across' or a list", {"pairs": [(0, 1)]}),
    "padded": (
        ValueError,
        r"pairs: expected valid tokens, got \(modality, token\) \[0, 9\]",
        {"pairs": [((0, 1), (0, 9))]},
    ),
    "one token": (
        ValueError,
        r"pairs: expected two players each",
        {"pairs": [((0, 1), (0, 1))]},
    ),
    "twice": (
        ValueError,
        r"pairs: expected each pair once",
        {"pairs": [((0, 1), (1, 1)), ((1, 1), (0, 1))]},
    ),
    "top alone": (ValueError, r"top: expected both scores and top", {"top": 3}),
    "scores": (
        ValueError,
        r"scores\[0\]: expected \(batch, tokens\), got \(5,\)",
        {"top": 3, "scores": [torch.ones(5)] * 2},
    ),
    "distributed": (
        ValueError,
        r"distributed: expected an initialised process group",
        {"run": Run(distributed=True)},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    kind, message, options = MISTAKES[name]
    with pytest.raises(kind, match=message):
        probe_pairs(interaction_layer(CASE), CASE.inputs(torch.float64), **options)


def test_mistakes_of_models_and_inputs() -> None:
    x = CASE.inputs(torch.float64)
    layer = interaction_layer(CASE)
    layer.interaction_experts[1].fusion_model.network[0].dropout1.train()
    message = r"model: expected eval mode, got interaction_experts\.1.*dropout1 in training mode"
    with pytest.raises(ValueError, match=message):
        probe_pairs(layer, x)
    layer.eval()
    game = TokenGame(layer, x)
    layer.train()
    with pytest.raises(ValueError, match=r"model: expected eval mode, got InteractionMoE in"):
        game(np.ones((1, 9)))
    learned = LayerCase(lengths=(4, 4), compat="i2moe")
    fixed, its = interaction_layer(learned), learned.inputs(torch.float64)
    with pytest.raises(ValueError, match=r"fill: expected 'zero' or 'mean' for a layer with lear"):
        probe_pairs(fixed, its)
    assert len(shapley_interactions(fixed, its, fill="zero")) == 2
    for model, error, text in (
        (None, TypeError, r"model: expected a Module or a callable, got NoneType"),
        (lambda inputs, masks: (1, 2), TypeError, r"model: expected logits .* got tuple; swap"),
        (lambda inputs, masks: inputs[0], ValueError, r"model: expected logits \(B, C\), got \(1"),
    ):
        with pytest.raises(error, match=text):
            probe_pairs(model, x)
    layer.eval()
    for inputs, text in (
        ([None, None], r"inputs: expected at least one modality, got none"),
        ([torch.ones(2, 3)], r"inputs\[0\]: expected \(batch, tokens, features\), got \(2, 3\)"),
        ([x[0], x[1][:1]], r"inputs\[1\]: expected \(2, tokens, features\), got \(1, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=text):
            probe_pairs(layer, inputs)
    with pytest.raises(ValueError, match=r"coalitions: expected \(coalitions, 9\), got \(2, 8\)"):
        game(np.ones((2, 8)))
    with pytest.raises(ValueError, match=r"method: .* for 20 tokens; 'exact' enumerates .* 16"):
        probe_game(Planted(20, lambda inside: inside.sum(axis=1)), method="exact")
