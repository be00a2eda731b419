"""Tests of accuracy, F1 and AUROC, unmasked and masked, against counts; joined batches."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flmoe_kernels.explain import MaskingDrops, faithfulness, performance
from flmoe_kernels.explain.masking.drops import KINDS
from tests.support.explain_layers import call_of
from tests.support.explain_masking import CASE
from tests.support.inputs import draw
from tests.support.refusals import assert_refused

pytest.importorskip("sklearn")
BATCH = 12
METRICS = ("accuracy", "micro_f1", "macro_f1", "auroc")
BINARY = torch.tensor([[0.0, -2.0], [0.0, 1.0], [0.0, 3.0], [0.0, -1.0], [0.0, 2.0]])
# The fourth class has no sample, therefore no area.
SEVERAL = torch.tensor(
    [[6, 3, 1, 1e-6], [2, 5, 3, 1e-6], [3, 6, 1, 1e-6], [1, 2, 7, 1e-6], [5, 1, 4, 1e-6]]
).log()
MULTI = torch.tensor([[2.0, -1.0], [-1.0, 3.0], [2.0, 1.0], [-2.0, 2.0]])
# Logits, labels, METRICS and classes without an area; AUROC as shares of pairs in the right order, a tie for half.
BY_HAND: list[tuple[Tensor, Any, list[float], list[int]]] = [
    (BINARY, [0, 0, 1, 1, 1], [3 / 5, 3 / 5, (1 / 2 + 2 / 3) / 2, 5 / 6], []),
    (BINARY, [0] * 5, [2 / 5, 2 / 5, 4 / 7 / 2, np.nan], [0, 1]),
    (SEVERAL, [0, 0, 1, 2, 2], [3 / 5, 3 / 5, (1 / 2 + 4 / 3) / 3, 7 / 8], [3]),
    (MULTI, [[1, 0], [1, 1], [0, 1], [0, 0]], [1 / 4, 2 / 3, 0.65, (5 / 8 + 3 / 4) / 2], []),
    (MULTI, [[1, 0], [1, 0], [0, 0], [0, 0]], [1 / 4, 2 / 7, 1 / 4, 5 / 8], [1]),
]


@pytest.mark.parametrize(("logits", "labels", "expected", "missing"), BY_HAND)
def test_performance_by_hand(
    logits: Tensor, labels: Any, expected: list[float], missing: list[int]
) -> None:
    found = performance(logits, np.array(labels))
    np.testing.assert_allclose(found[:4], expected, atol=1e-6)
    assert [c for c, x in enumerate(found.class_auroc) if np.isnan(x)] == missing
    names, classes = ", ".join(map(str, missing)), logits.shape[1]
    start = f"no AUROC for {len(missing)} of {classes} classes ({names})"
    assert [note[: len(start)] for note in found.notes] == [start] * bool(missing)


def test_two_classes_are_ranked_by_logits() -> None:
    """Probabilities of these logits are 1 in float64, which would make the area 1/2."""
    logits = torch.tensor([[0.0, 40.0], [0.0, 50.0], [0.0, 60.0], [0.0, 70.0]], dtype=torch.float64)
    assert bool((logits.softmax(dim=1)[:, 1] == 1).all())
    assert performance(logits, torch.tensor([0, 0, 1, 1])).auroc == 1.0
    assert performance(logits, torch.tensor([0, 1, 0, 1])).auroc == 0.75


def test_a_single_logit_is_a_binary_task() -> None:
    single, labels = BINARY[:, 1:].clone(), torch.tensor([0, 0, 1, 1, 1])
    single[0] = -torch.inf
    whole = performance(torch.cat([torch.zeros_like(single), single], dim=1), labels)
    assert performance(single, labels[:, None])[:4] == pytest.approx(whole[:4])


def labelled(multi_label: bool = False, rows: slice = slice(None), **options: Any) -> MaskingDrops:
    case = dataclasses.replace(CASE, batch=BATCH)
    layer, inputs, masks = call_of(case, torch.float64)
    values = [draw(BATCH, n, dtype=torch.float64, seed=m) for m, n in enumerate(case.lengths)]
    labels = torch.arange(BATCH) % 3
    if multi_label:
        labels = torch.stack([labels != 0, labels == 1, labels == 2], dim=1)
    inputs, masks, values = ([x[rows] for x in each] for each in (inputs, masks, values))
    given: dict[str, Any] = {"labels": labels[rows], "budgets": [10, 30, 50], "n_random": 2}
    given |= {"multi_label": multi_label, "max_batch": 5, **options}
    return faithfulness(layer, inputs, masks, values, **given)


@pytest.mark.parametrize("multi_label", [False, True])
def test_masked_logits_give_the_drops_and_the_metrics(multi_label: bool, tmp_path: Path) -> None:
    labelled(multi_label).save(tmp_path / "drops.npz")
    drops = MaskingDrops.load(tmp_path / "drops.npz")
    prob = drops.masked_logits.sigmoid() if multi_label else drops.masked_logits.softmax(dim=4)
    left = (prob * drops.targets[:, None]).sum(dim=4)
    lost = drops.original[0, :, None] - left
    torch.testing.assert_close(lost[:, 0], drops.identified[:, 0])
    torch.testing.assert_close(lost[:, 1:], drops.random[:, 0])
    first, *rows = drops.performance()
    whole = performance(drops.logits, drops.labels)
    np.testing.assert_allclose([first[x] for x in METRICS], whole[:4])
    assert len(rows) == 2 * 3 * 2
    for row, (kind, budget, tokens) in zip(
        rows, itertools.product(range(2), range(3), ("identified", "random")), strict=True
    ):
        assert (row["kind"], row["budget"], row["tokens"]) == (
            KINDS[kind],
            drops.budgets[budget],
            tokens,
        )
        chosen = drops.masked_logits[kind, :, :, budget]
        sets = chosen[:1] if tokens == "identified" else chosen[1:]
        expected = np.mean([performance(x, drops.labels)[:4] for x in sets], axis=0)
        np.testing.assert_allclose([row[x] for x in METRICS], expected)
    assert len({tuple(row[x] for x in METRICS) for row in rows}) > 4, "masking changes predictions"


def test_joined_batches_are_the_data_set() -> None:
    whole = labelled(n_random=0)
    parts = [labelled(rows=rows, n_random=0) for rows in (slice(0, 3), slice(3, 8), slice(8, 12))]
    joined = MaskingDrops.concatenate(parts)
    for name in (
        "identified",
        "original",
        "masked",
        "maskable",
        "targets",
        "logits",
        "masked_logits",
    ):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
    assert joined.performance() == whole.performance()
    assert (joined.evaluations, joined.notes) == (whole.evaluations, whole.notes)
    macro = [part.performance()[0]["macro_f1"] for part in parts]
    assert np.mean(macro) != pytest.approx(whole.performance()[0]["macro_f1"], abs=0.01)
    # Random sets are those of the batches.
    drawn = [
        labelled(rows=rows, seed=seed) for seed, rows in enumerate((slice(0, 5), slice(5, 12)))
    ]
    last = labelled(rows=slice(3, 5), seed=7)
    three = MaskingDrops.concatenate([MaskingDrops.concatenate(drawn), last])
    torch.testing.assert_close(three.random[:, :, :, 5:12], drawn[1].random)
    assert three.settings["seeds"] == [0, 1, 7]
    assert not any("equal seeds" in note for note in three.notes)
    assert any("equal seeds" in x for x in MaskingDrops.concatenate(drawn[:1] * 2).notes)


def test_errors() -> None:
    logits, labels = draw(40, 3), torch.arange(40) % 3
    wrong: list[tuple[Any, str]] = [
        (lambda: performance(logits[0], labels), r"logits: expected \(B, C\) with B > 0"),
        (lambda: performance(logits, labels[:5]), r"labels: expected shape \(40,\), got \(5,\)"),
        (lambda: performance(logits, labels + 1), "labels: expected values from 0 to 2"),
        (lambda: performance(logits * torch.nan, labels), "expected finite logits, got nan"),
        (lambda: labelled(labels=labels), r"labels: expected shape \(12,\), got \(40,\)"),
        (
            lambda: labelled(labels=torch.ones(BATCH, 3)),
            r"labels: expected \(B,\), as targets are not multi-label, got \(12, 3\)",
        ),
        (lambda: labelled(labels=None).performance(), "labels: expected labels in the call"),
        (
            lambda: MaskingDrops.concatenate([labelled(), labelled(budgets=[10])]),
            r"results\[1\]: expected budgets \(10, 30, 50\) as in results\[0\], got \(10,\)",
        ),
        (
            lambda: MaskingDrops.concatenate([labelled(), labelled(fill="drop")]),
            r"results\[1\]: expected settings.fill 'zero'",
        ),
    ]
    for call, message in wrong:
        assert_refused(call, message)
