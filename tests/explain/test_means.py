"""Tests of token_means, the mean of the valid tokens of a data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels.explain import token_means
from flmoe_kernels.explain.games.tokens import candidates, valid_tokens
from tests.support.inputs import draw_masks
from tests.support.layers import LayerCase

CASE = LayerCase(lengths=(5, 4))


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


def test_token_means_without_the_exempt_tokens() -> None:
    """The mean is over the tokens that faithfulness may mask; a single token is included."""
    masks = draw_masks("partial", 2, CASE.lengths)
    masks[0][0, 0] = False
    batches: list[Any] = [(CASE.inputs(), masks), ([CASE.inputs(seed=1)[0][:, :1], None], None)]
    for exempt in ((), (0,), (1, 0)):
        found = token_means(batches, exempt=exempt)
        for m in range(2):
            kept = []
            for x, given in batches:
                if x[m] is not None:
                    kept.append(x[m][candidates(valid_tokens(x, given), exempt)[m]])
            torch.testing.assert_close(found[m], torch.cat(kept).mean(dim=0))
    assert not torch.allclose(token_means(batches)[0], token_means(batches, exempt=[0])[0])
    for exempt, kind, message in (
        ([2], ValueError, r"exempt: expected an int from 0 to 1, got 2"),
        ([0, 0], ValueError, r"exempt: expected distinct modalities, got \(0, 0\)"),
        (["a"], TypeError, r"exempt: expected an int, got str"),
    ):
        with pytest.raises(kind, match=message):
            token_means(batches, exempt=exempt)
    alone = [([torch.ones(2, 3, 4)], [torch.tensor([[True, False, False]] * 2)])]
    with pytest.raises(ValueError, match=r"expected a valid token of modality 0, got none"):
        token_means(alone, exempt=[0])


def test_token_means_of_other_shapes() -> None:
    x = torch.randn(2, 3, 3, 5)  # as many tokens as features, which a wrong broadcast would confuse
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    [mean] = token_means([([x], [mask])])
    torch.testing.assert_close(mean, x[mask.bool()].mean(dim=0))
    for samples, kind, message in (
        ([([x], None), ([x, x], None)], ValueError, r"samples: expected 1 modalities, got 2"),
        ([([x[0, 0]], None)], ValueError, r"inputs\[0\]: expected \(batch, tokens, features\)"),
        ([([x], [mask[:1]])], ValueError, r"masks\[0\]: expected \(2, 3\) as inputs"),
    ):
        with pytest.raises(kind, match=message):
            token_means(samples)
