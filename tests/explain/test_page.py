"""Tests of the page: findings first, names of modalities and classes, ties and unknown errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")


from flmoe_kernels.explain import PairValues
from flmoe_kernels.explain.report.features import Features
from flmoe_kernels.explain.report.findings import Findings
from flmoe_kernels.explain.report.request import Request
from flmoe_kernels.explain.report.sentences import interaction, of_sample, overall
from tests.support.explain_results import attribution, masking_drops, pair_values

EXPERTS = ("unique_0", "unique_1", "synergy", "redundancy")
NAMES: dict[str, Any] = {"modality_names": ("text", "image <b>"), "class_names": ("cat", "<i>dog")}


def findings(
    pairs: PairValues, samples: int = 1, weights: Any = (0.1, 0.2, 0.6, 0.1), **options: Any
) -> Findings:
    """Findings of modalities with 3 and 2 tokens, two classes, all samples alike."""
    x = [torch.tensor([[0.4, -0.2, 0.1]] * samples), torch.tensor([[0.1347, 0.134]] * samples)]
    tokens = attribution(
        *(v.double().unsqueeze(1).expand(-1, 4, -1) for v in x),
        experts=EXPERTS,
        mixture=tuple(v.double() for v in x),
        weights=torch.tensor([weights] * samples, dtype=torch.float64),
    )
    features = Features(
        inputs=[torch.zeros(samples, n, 8) for n in (3, 2)],
        masks=None,
        labels=torch.zeros(samples, dtype=torch.int64),
        tokens=[np.array([["a", "<u>b", "c"]] * samples), None],
        images=[None, None],
        total=9,
    )
    drops = masking_drops(samples=samples)
    return Findings(
        request=Request(Path("layer.pt"), Path("data.npz"), Path("out"), **options),
        features=features,
        layer={"num_heads": 4, "temperature": 1.0},
        logits=torch.tensor([[0.0, 2.0]] * samples),
        expert_logits=torch.zeros(samples, 4, 2),
        target=torch.ones(samples, dtype=torch.int64),
        attribution=tokens,
        pairs=[{"SII": pairs, "RG": dataclasses.replace(pairs, index="RG")}] * samples,
        drops=dict.fromkeys(("faithfulness", "pair_masking_SII", "pair_masking_RG"), drops),
    )


def values(*numbers: float, error: float = 0.0, **options: Any) -> PairValues:
    return pair_values(
        values=np.array(numbers), standard_errors=np.full(len(numbers), error), **options
    )


PAIR = "text:1 “<u>b” with image <b>:1 (SII"
UNCLEAR = "of the scored pairs none is distinguishable from 0; the largest is "
ONE_TIED = "of the scored pairs no single one is the strongest; 1 tied with "
INTERACTIONS: list[tuple[PairValues, str]] = [
    (
        values(0.5, -1.0, 0.1, 0.3, error=0.1),
        f"of the scored pairs the strongest is {PAIR} -1, standard error 0.1): together less than the sum of both",
    ),
    (
        values(0.5, 1.0, 0.1, 0.3),
        f"of the scored pairs the strongest is {PAIR} +1, exact): together more",
    ),
    (values(0.01, -0.19, 0.0, 0.1, error=0.1), f"{UNCLEAR}{PAIR} -0.19, standard error 0.1)"),
    # Rounding errors of an additive model are no interactions.
    (values(1e-8, -3e-8, 0.0, 0.0), UNCLEAR),
    (values(*[np.nan] * 4), "no pair of tokens was scored"),
    # The pair of largest |value| has an error of half its size; the next one is the first above 0.
    (pair_values(standard_errors=np.array([0.01, 0.6, 0.1, 0.0])), f"{ONE_TIED}text:0 “a” with "),
]


@pytest.mark.parametrize(("pairs", "expected"), INTERACTIONS)
def test_the_strongest_interaction_is_named_only_if_it_is_distinguishable(
    pairs: PairValues, expected: str
) -> None:
    found = findings(pairs, **NAMES)
    assert interaction(found, 0).startswith(expected)
    start = "Sample 0, explained for “<i>dog”, predicted “<i>dog”, label “cat”: "
    assert of_sample(found, 0).startswith(start + expected)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.1, 0.2, 0.6, 0.1), "The expert synergy has the largest weight, 0.60"),
        (
            (0.3, 0.301, 0.1, 0.299),
            "No expert has clearly the largest weight (tied: unique_image <b> 0.30, unique_text 0.30, ",
        ),
    ],
)
@pytest.mark.parametrize("samples", [1, 3, 16])
def test_one_sentence_of_all_samples(weights: Any, expected: str, samples: int) -> None:
    sentence = overall(findings(pair_values(), samples, weights, **NAMES))
    if samples == 3:
        expected = "The experts' mean weights over 3 samples are not distinguishable (fewer than 16 samples): "
    assert sentence.startswith(expected)
    assert sentence.endswith(
        "(not distinguishable from random tokens)." if samples == 16 else "unknown)."
    )
