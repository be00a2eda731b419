"""Which expert carries which task: PairInteractionMoE on the demo's tasks, with and without interaction losses.

    python -m bench.pair_learning [--seeds 3] [--out FILE.json]

Every seed draws the split, the pairs, the encoders and the initial weights anew. The reference layer is trained
on the same pairs with the demo's settings. Accuracy on held-out images; share: see PairExplanation.expert_share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment
from flmoe_kernels.demo.data import EXPERTS, TASKS, Task, encode, load, make_pairs
from flmoe_kernels.demo.settings import Settings
from flmoe_kernels.demo.token_pairs import run_task
from flmoe_kernels.demo.train import predict, train

WEIGHTS = (0.0, Settings.pair_interaction_weight)


def one_seed(seed: int) -> list[dict[str, Any]]:
    """Rows of one seed: task, layer, weight of the losses, accuracy and shares."""
    settings = Settings(seed=seed)
    digits = load(seed)
    encoded = encode(digits, settings.width, seed, settings.encoder_steps)
    rows = []
    for task in TASKS:
        pairs, held_out = (
            make_pairs(task, digits, images, samples, torch.Generator().manual_seed(seed))
            for images, samples in (
                (digits.train, settings.train_pairs),
                (digits.test, settings.test_pairs),
            )
        )
        reference = train(task, pairs, encoded, settings)
        accuracy = predict(reference, held_out, encoded).accuracy(held_out.labels)
        rows.append(_row(seed, task, "reference", None, accuracy, ()))
        for weight in WEIGHTS:
            own = dataclasses.replace(settings, pair_interaction_weight=weight)
            found = run_task(task, pairs, held_out, encoded, digits, own)
            rows.append(_row(seed, task, "token pairs", weight, found.accuracy, found.share))
    return rows


def _row(
    seed: int,
    task: Task,
    layer: str,
    weight: float | None,
    accuracy: float,
    share: Sequence[float],
) -> dict[str, Any]:
    by_expert = dict(zip(EXPERTS, share, strict=False))
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
    """Mean (least to largest) over seeds."""
    for task in TASKS:
        for layer, weight in (("reference", None), *(("token pairs", w) for w in WEIGHTS)):
            own = [
                row
                for row in rows
                if (row["task"], row["layer"], row["interaction_weight"])
                == (task.name, layer, weight)
            ]
            accuracy = [100 * row["accuracy"] for row in own]
            line = f"{task.name:9} {layer:11} {weight} accuracy {_spread(accuracy)}"
            for name in EXPERTS if weight is not None else ():
                line += f"  {name} {_spread([100 * row['share'][name] for row in own])}"
            print(line)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    rows = [row for seed in range(options.seeds) for row in one_seed(seed)]
    summary(rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = dataclasses.asdict(Settings())
        result = {"environment": environment(), "settings": settings, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
