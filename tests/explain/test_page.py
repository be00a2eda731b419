"""Tests of the page's words: findings first, names of modalities and classes, honest about ties."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.explain import PairValues
from flmoe_kernels.explain.figures.curves import UNKNOWN
from flmoe_kernels.explain.reliability import LEAST_COUNT
from flmoe_kernels.explain.report.features import Features
from flmoe_kernels.explain.report.findings import Findings
from flmoe_kernels.explain.report.page import page
from flmoe_kernels.explain.report.pictures import draw
from flmoe_kernels.explain.report.request import Request
from flmoe_kernels.explain.report.sentences import interaction, of_sample, overall, ranks
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
    architecture = {"compat": "x", "num_modalities": 2, "hidden_dim": 8, "num_classes": 2}
    drops = masking_drops(samples=samples)
    return Findings(
        request=Request(Path("layer.pt"), Path("data.npz"), Path("out"), **options),
        features=features,
        layer={"architecture": architecture, "num_heads": 4, "temperature": 1.0},
        logits=torch.tensor([[0.0, 2.0]] * samples),
        expert_logits=torch.zeros(samples, 4, 2),
        target=torch.ones(samples, dtype=torch.int64),
        attribution=tokens,
        pairs=[{"SII": pairs, "RG": dataclasses.replace(pairs, index="RG")}] * samples,
        faithfulness=drops,
        pair_masking={"SII": drops, "RG": drops},
    )


def values(*numbers: float, error: float = 0.0, **options: Any) -> PairValues:
    return pair_values(
        values=np.array(numbers), standard_errors=np.full(len(numbers), error), **options
    )


INTERACTIONS: list[tuple[PairValues, str]] = [
    (
        values(0.5, -1.0, 0.1, 0.3, error=0.1),
        "the strongest interaction is text:1 “<u>b” with image <b>:1 (SII -1, standard error 0.1): "
        "together less than the sum of both alone",
    ),
    (
        values(0.5, 1.0, 0.1, 0.3),
        "the strongest interaction is text:1 “<u>b” with image <b>:1 (SII +1, exact): together more "
        "than the sum of both alone",
    ),
    (
        values(0.9, -1.0, 0.8, 0.1, error=0.1),
        "no single interaction is the strongest; 2 other pairs are tied with text:1 “<u>b” with "
        "image <b>:1 (SII -1, standard error 0.1)",
    ),
    (
        values(0.995, 1.0, 0.1, 0.1),
        "no single interaction is the strongest; another pair is tied with text:1 “<u>b” with "
        "image <b>:1 (SII +1, exact)",
    ),
    (
        values(0.01, -0.19, 0.0, 0.1, error=0.1),
        "no interaction is distinguishable from 0; the largest is text:1 “<u>b” with image <b>:1 "
        "(SII -0.19, standard error 0.1)",
    ),
    # Rounding errors of an additive model are no interactions.
    (values(1e-8, -3e-8, 0.0, 0.0), "no interaction is distinguishable from 0; the largest is "),
    (values(0.1, -0.9, 0.0, 0.0, error=np.nan), "no interaction is distinguishable from 0"),
    (values(*[np.nan] * 4), "no pair of tokens was scored"),
    # The pair of largest |value| has an error of half its size; the next one is the first above 0.
    (
        pair_values(standard_errors=np.array([0.01, 0.6, 0.1, 0.0])),
        "no single interaction is the strongest; another pair is tied with text:0 “a” with ",
    ),
    (values(0.5, pairs=np.array([[0, 3]])), "the strongest interaction is text:0"),
]


@pytest.mark.parametrize(("pairs", "expected"), INTERACTIONS)
def test_the_strongest_interaction_is_named_only_if_it_is_distinguishable(
    pairs: PairValues, expected: str
) -> None:
    found = findings(pairs, **NAMES)
    if np.isfinite(pairs.values).any():
        among = "of the 4 scored pairs, " if len(pairs) > 1 else "of 1 scored pair, "
        expected = among + expected
    assert interaction(found, 0).startswith(expected)
    start = "Sample 0, explained for “<i>dog”, predicted “<i>dog”, label “cat”: "
    assert of_sample(found, 0).startswith(start + expected)


@pytest.mark.parametrize("players", [3, 5])
def test_sentences_say_among_which_pairs_the_strongest_was_looked_for(players: int) -> None:
    """Three of the three pairs of 3 tokens, or of the ten of 5 tokens; the last has a value or none."""
    known = pair_values()
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    for last, among in ((0.1, "of the 3 scored pairs, "), (np.nan, "of the 2 scored pairs, ")):
        whole = players == 3 and last == 0.1
        numbers = {"values": np.array([0.5, -1.0, last]), "standard_errors": np.zeros(3)}
        value = pair_values(tokens=known.tokens[:players], pairs=pairs, **numbers)
        start = "the strongest interaction is "
        expected = start if whole else among + start
        assert interaction(findings(value), 0).startswith(expected)
        assert f"; {expected}" in overall(findings(value))
        among = "" if whole else "among the scored pairs, "
        several = f"; {among}one pair of tokens clearly interacts most in 2 of 2 samples."
        assert overall(findings(value, 2)).endswith(several)
        captions = [x.caption for x in draw(findings(value)).values()]
        assert any("strongest scored pairs" in caption for caption in captions) == (not whole)


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
        assert "largest" not in sentence.partition(";")[0]
    assert sentence.startswith(expected)
    few = samples < LEAST_COUNT
    assert ("not distinguishable at two" in sentence) == (not few)
    assert ("a difference whose error is unknown (fewer than 16 samples)" in sentence) == few
    assert sentence.count(". ") == 0
    where = "the strongest interaction is text:1"
    assert (where if samples == 1 else f"in {samples} of {samples} samples") in sentence


def test_near_ties_of_tokens_share_a_rank() -> None:
    text = page(found := findings(pair_values()), draw(found), [])
    rows = rows_of(text, "Tokens of largest |attribution|")
    assert [row[0] for row in rows] == ["1", "2", "3", "1\u20132", "1\u20132"]
    assert [row[1] for row in rows[3:]] == ["1:0", "1:1"]


def test_tied_pairs_share_a_rank() -> None:
    found = pair_values()
    assert ranks(found.values, found.standard_errors) == ["2\u20134", "1", "2\u20134", "2\u20134"]
    none = np.zeros(4)
    assert ranks(np.array([0.5, -1.0, 0.1, 0.46]), none) == ["2\u20133", "1", "4", "2\u20133"]
    assert ranks(np.array([0.5, np.nan, 0.1, 0.3]), none) == ["1", "-", "3", "2"]
    # A pair of unknown error does not tie the others.
    some = np.array([0.0, 0.0, 0.0, np.nan])
    assert ranks(np.array([0.5, -1.0, 0.1, 0.7]), some) == ["2", "1", "3", "?"]


def rows_of(text: str, caption: str) -> list[list[str]]:
    """The cells of the first table whose caption starts so."""
    table = text.partition(f"<caption>{caption}")[2].partition("</table>")[0]
    lines = re.findall(r"<tr>(.*?)</tr>", table)[1:]
    return [[html.unescape(x) for x in re.findall(r"<td[^>]*>(.*?)</td>", line)] for line in lines]


def test_page_shows_each_note_once_with_names() -> None:
    """Notes on candidates, identified tokens and missing errors; they agree with ranks and verdicts."""
    near = "the choice of the top 1 tokens of modality 1 is not distinguishable: 1 left out"
    missing = "no standard error for 4 of 4 pairs: fewer than 16 independent units"
    pairs = pair_values(standard_errors=np.full(4, np.nan), notes=(near, missing))
    found = findings(pairs, **NAMES)
    rg = dataclasses.replace(pairs, index="RG", notes=(near,))
    drops = masking_drops(samples=1)
    tied = dataclasses.replace(drops, near_ties=torch.tensor([[False, True, False]]))
    found = dataclasses.replace(
        found, pairs=[{"SII": pairs, "RG": rg}], pair_masking={"SII": tied, "RG": drops}
    )
    text = page(found, draw(found), [])
    words = html.unescape(text)
    for note in (
        "The choice of the top 1 tokens of image <b> is not distinguishable: 1 left out.",
        f"For SII, {missing}.",
        "For pairs by SII, the choice of identified tokens is not distinguishable for 1 of 1 samples",
        "No standard errors: expected at least 16 samples with maskable tokens, got 1.",
    ):
        assert words.count(note) == 1, note
    for row in rows_of(text, "Top pairs"):
        assert row[0] == "?"
        assert all(x.endswith(" \u00b1 ?") for x in row[2:])
    for row in rows_of(text, "Mean drop of the target's probability"):
        assert row[1] == UNKNOWN
        assert row[2].endswith(" \u00b1 ?")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", words)


@pytest.mark.parametrize("options", [{}, NAMES])
def test_page_has_the_finding_first_and_the_parameters_last(options: dict[str, Any]) -> None:
    found = findings(pair_values(), 2, **options)
    text = page(found, draw(found), ["attribution.npz"])
    body = text.partition("<body>")[2]
    places = [
        body.index(part)
        for part in (html.escape(overall(found)), 'id="sample_0"', 'id="sample_1"', "Parameters")
    ]
    assert places == sorted(places)
    assert not re.search(r"<(?:b|i|u)>", text)
    if options:
        assert "modality 0" not in text
        assert "class 1" not in text
        for name in ("unique_text", "text:1", "image &lt;b&gt;:1", "“&lt;i&gt;dog”"):
            assert name in text, name
    else:
        for name in ("unique_0", "0:1 ", "1:1", "class 1", "modality 0"):
            assert name in text, name


BAD_NAMES: list[tuple[dict[str, Any], str]] = [
    ({"modality_names": ("a",)}, "modality_names: expected 2 names for this layer, got 1"),
    ({"class_names": ("a", "b", "c")}, "class_names: expected 2 names for this layer, got 3"),
    ({"class_names": ("a", "a")}, "class_names: expected different names, got a twice"),
    ({"class_names": ("a", " \n")}, "class_names: expected names with visible characters"),
    ({"modality_names": "ab"}, "modality_names: expected a list of strings, got 'ab'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_NAMES)
def test_wrong_names_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(Path("a"), Path("b"), Path("c"), **options).require_counts(2, 2)


def test_names_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Request, bool]] = []

    def main(request: Request, *, force: bool) -> int:
        seen.append((request, force))
        return 0

    monkeypatch.setattr("flmoe_kernels.explain.report.command.main", main)
    names = ["--modality-names", "text, image", "--class-names", "cat,grey dog", "--force"]
    done = CliRunner().invoke(app, ["explain", "--checkpoint", "a", "--data", "b", *names])
    assert done.exit_code == 0, done.output
    [(request, force)] = seen
    assert request.modality_names == ("text", "image")
    assert request.class_names == ("cat", "grey dog")
    assert force
    done = CliRunner().invoke(
        app, ["explain", "--checkpoint", "a", "--data", "b", "--class-names", "cat,,dog"]
    )
    assert done.exit_code == 2
    assert "class_names: expected names with visible characters" in done.stderr
