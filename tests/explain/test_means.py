"""Tests of token_means, the mean of the valid tokens of a data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels.explain import token_means
from flmoe_kernels.explain.games.tokens import candidates, valid_tokens
from tests.support.inputs import draw_masks
from tests.support.layers import LayerCase
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(5, 4))
X = torch.ones(3, 5)


def batches_of(padding: float) -> list[Any]:
    """Batches with masks, without, with a missing modality and with a single token."""
    batches: list[Any] = [([CASE.inputs()[0], None], None)]
    batches.append(([CASE.inputs(seed=3)[0][:, :1], None], None))
    for seed in (1, 2):
        x, masks = CASE.inputs(seed=seed), draw_masks("mixed", 2, CASE.lengths, seed=seed)
        for each, mask in zip(x, masks, strict=True):
            if mask is not None:
                each[~mask] = padding
        batches.append((x, masks))
    return batches


@pytest.mark.parametrize("exempt", [(), (0,), (1, 0)])
def test_token_means(exempt: tuple[int, ...]) -> None:
    """The mean is over the tokens that faithfulness may mask; a single token is included."""
    found = token_means(batches_of(torch.nan), exempt=exempt)
    for m in range(2):
        kept = [
            x[m][candidates(valid_tokens(x, masks), exempt)[m]]
            for x, masks in batches_of(0.0)
            if x[m] is not None
        ]
        torch.testing.assert_close(found[m], torch.cat(kept).mean(dim=0))
        if m in exempt or not exempt:
            others = token_means(batches_of(0.0), exempt=() if exempt else (0, 1))
            assert not torch.allclose(found[m], others[m])


ONES = ([torch.ones(2, 3, 4)], [torch.tensor([[True, False, False]] * 2)])
PAIR = ([torch.ones(2, 3, 4), torch.ones(2, 5, 4)], None)
MISTAKES: list[tuple[Any, Any, str]] = [
    ([], (), r"samples: expected batches of \(inputs, masks\), got none"),
    ([([None], None)], (), r"samples: expected a valid token of modality 0, got none"),
    ([ONES], [0], r"expected a valid token of modality 0, got none"),
    ([PAIR], [2], r"exempt: expected an int from 0 to 1, got 2"),
    ([PAIR], [0, 0], r"exempt: expected distinct modalities, got \(0, 0\)"),
    ([PAIR], ["a"], r"TypeError: exempt: expected an int, got str"),
    ([ONES, PAIR], (), r"samples: expected 1 modalities, got 2"),
    ([([X], None)], (), r"inputs\[0\]: expected \(batch, tokens, features\)"),
    ([(ONES[0], [X[:1]])], (), r"masks\[0\]: expected \(2, 3\) as inputs"),
]


@pytest.mark.parametrize(("samples", "exempt", "message"), MISTAKES)
def test_mistakes(samples: Any, exempt: Any, message: str) -> None:
    assert_refused(lambda: token_means(samples, exempt=exempt), message)


def test_token_means_of_other_shapes() -> None:
    x = torch.randn(2, 3, 3, 5)  # as many tokens as features, which a wrong broadcast would confuse
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    [mean] = token_means([([x], [mask])])
    torch.testing.assert_close(mean, x[mask.bool()].mean(dim=0))
