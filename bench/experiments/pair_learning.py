"""Shares of the experts on the demo's tasks, with and without interaction losses.

    python -m bench.experiments.pair_learning

Every seed draws a new split, pairs, encoders and initial weights. Both layers train on the same pairs with the
demo's settings. Their accuracies do not compare the layers, because the number of samples differs: the layer over
token pairs (PairInteractionMoE) sees 25 600 samples (400 steps of 64), the reference layer 3 840 (160 steps of
24). Accuracy is measured on held-out images. The two layers measure shares differently:
PairExplanation.expert_share for the layer over token pairs, expert_shares for the reference.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench.experiments.command import Row, run
from examples.digits.data import EXPERTS, TASKS, Task, encode, load
from examples.digits.pipeline import draw_test_pairs, draw_train_pairs
from examples.digits.settings import Settings
from examples.digits.token_pairs import run_task
from examples.digits.train import Predictions, predict, train

REFERENCE, TOKEN_PAIRS = "reference", "token pairs"
RUNS = (
    (REFERENCE, Settings.interaction_weight),
    (TOKEN_PAIRS, 0.0),
    (TOKEN_PAIRS, Settings.pair_interaction_weight),
)


def one_seed(seed: int) -> list[dict[str, Any]]:
    """Rows of one seed: task, layer, weight of the losses, accuracy and shares."""
    settings = Settings(seed=seed)
    digits = load(seed)
    encoded = encode(digits, settings.width, seed, settings.encoder_steps)
    rows = []
    for task in TASKS:
        pairs, held_out = (
            draw(task, digits, settings) for draw in (draw_train_pairs, draw_test_pairs)
        )
        for layer, weight in RUNS:
            if layer == REFERENCE:
                own = dataclasses.replace(settings, interaction_weight=weight)
                predictions = predict(train(task, pairs, encoded, own), held_out, encoded)
                accuracy = predictions.accuracy(held_out.labels)
                share = expert_shares(predictions)
            else:
                own = dataclasses.replace(settings, pair_interaction_weight=weight)
                result = run_task(task, pairs, held_out, encoded, digits, own)
                accuracy, share = result.accuracy, result.share
            rows.append(_row(seed, task, layer, weight, accuracy, share))
    return rows


def expert_shares(predictions: Predictions) -> tuple[float, ...]:
    """Each expert's share of the sum of |weight * logits| over experts, averaged over samples.

    The mean over classes is subtracted from the logits, because a softmax ignores it.
    """
    logits = predictions.expert_logits - predictions.expert_logits.mean(dim=2, keepdim=True)
    sizes = (predictions.weights.unsqueeze(2) * logits).abs().sum(dim=2)
    share = sizes / sizes.sum(dim=1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
    return tuple(share.mean(dim=0).tolist())


def _row(
    seed: int,
    task: Task,
    layer: str,
    weight: float,
    accuracy: float,
    share: Sequence[float],
) -> dict[str, Any]:
    by_expert = dict(zip(EXPERTS, share, strict=True))
    shares = " ".join(f"{name} {value:.0%}" for name, value in by_expert.items())
    print(f"seed {seed} {task.name:9} {layer:11} {weight} {accuracy:.1%} {shares}", flush=True)
    return {
        "seed": seed,
        "task": task.name,
        "expected": task.expert,
        "layer": layer,
        "interaction_weight": weight,
        "accuracy": accuracy,
        "share": by_expert,
    }


def summary(rows: list[dict[str, Any]]) -> None:
    """Print mean (minimum to maximum) over seeds."""
    for task in TASKS:
        for layer, weight in RUNS:
            own = [
                row
                for row in rows
                if (row["task"], row["layer"], row["interaction_weight"])
                == (task.name, layer, weight)
            ]
            accuracy = [100 * row["accuracy"] for row in own]
            line = f"{task.name:9} {layer:11} {weight} accuracy {_spread(accuracy)}"
            for name in EXPERTS:
                line += f"  {name} {_spread([100 * row['share'][name] for row in own])}"
            print(line)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def measure(seeds: int) -> list[Row]:
    rows = [row for seed in range(seeds) for row in one_seed(seed)]
    summary(rows)
    return rows


if __name__ == "__main__":
    run(__doc__, measure, threads=1, seeds=3)
