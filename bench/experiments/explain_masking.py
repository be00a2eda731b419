"""Masking of the first token pairs: python -m bench.experiments.explain_masking

Question: do the pairs that an index ranks first matter more than random pairs?

The demo's tasks have a known kind of interaction. Pairs across the two images are ranked by the Shapley
interaction index on the synergy task and by the redundancy gap on the redundant task. Two masks with the same
number of tokens per image are compared by how far they lower the probability and the logit of the label: the
tokens of the first pairs, and random tokens. Every seed draws a new split, encoders, samples, initial weights,
coalitions and random sets. The samples are the first held-out ones, predicted correctly or not.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.experiments.command import Row, run
from bench.experiments.explain_models import LAYERS, REDUNDANT, SYNERGY, Learned, learn
from flmoe_kernels import explain
from flmoe_kernels.explain.estimators.indices import RG, SII

TASKS = ((SYNERGY, SII), (REDUNDANT, RG))
BUDGETS = (2, 4, 8)
FILL = "zero"  # masked tokens are still attended, as in the published evaluation


def mask(
    task: str, index: str, layer: str, seed: int, samples: int, budget: int, repeats: int
) -> list[Row]:
    """Rows of one layer on one task, one row per metric and number of tokens."""
    learned = learn(task, layer, seed, samples)
    ranked = rank(learned, index, seed, budget)
    drops = explain.pair_masking(
        learned.layer,
        learned.inputs,
        learned.masks,
        ranked,
        target=learned.labels,
        budgets=BUDGETS,
        fill=FILL,
        n_random=repeats,
        seed=seed,
    )
    rows = []
    for metric in ("prob", "logit"):
        curve = drops.curve(metric=metric)
        place = drops.metrics.index(metric)
        gaps = drops.identified[0, place] - drops.random[0, place].mean(dim=0)
        for k, tokens in enumerate(BUDGETS):
            rows.append(
                {
                    **{"task": task, "index": index, "layer": layer, "seed": seed},
                    **{"accuracy": learned.accuracy, "metric": metric, "budget": tokens},
                    "identified": float(curve.identified[k]),
                    "random": float(curve.random[k]),
                    "gap": float(curve.gap[k]),
                    "gap_standard_error": float(gaps[:, k].std() / len(gaps) ** 0.5),
                    "samples_where_worse": float((gaps[:, k] > 0).double().mean()),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def rank(learned: Learned, index: str, seed: int, budget: int) -> list[explain.PairValues]:
    results = explain.probe_pairs(
        learned.layer,
        learned.inputs,
        learned.masks,
        indices=(index,),
        target=learned.labels,
        fill=FILL,
        pairs="across",
        sampling=explain.Sampling(budget=budget, seed=seed),
    )
    return [result[index] for result in results]


def line(row: dict[str, Any]) -> str:
    return (
        f"seed {row['seed']} {row['task']:9} {row['index']:3} {row['layer']:18} "
        f"{row['metric']:5} {row['budget']} tokens: identified {row['identified']:+.3f}, "
        f"random {row['random']:+.3f}, gap {row['gap']:+.3f} (s.e. {row['gap_standard_error']:.3f}), "
        f"worse than random in {row['samples_where_worse']:.0%} of samples"
    )


def summary(rows: list[dict[str, Any]]) -> None:
    """Print the mean, minimum and maximum of the gap over seeds."""
    keys = ("task", "index", "layer", "metric", "budget")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        gaps = [row["gap"] for row in rows if tuple(row[name] for name in keys) == key]
        spread = f"{min(gaps):+.3f} to {max(gaps):+.3f} over {len(gaps)} seeds"
        print(" ".join(map(str, key)), f"gap {statistics.mean(gaps):+.3f} ({spread})")


def measure(seeds: int, samples: int, budget: int, repeats: int) -> list[Row]:
    """Rows of all runs. samples: per task and seed; budget: coalitions, repeats: random sets, both per sample."""
    rows = [
        row
        for seed in range(seeds)
        for task, index in TASKS
        for layer in LAYERS
        for row in mask(task, index, layer, seed, samples, budget, repeats)
    ]
    summary(rows)
    return rows


if __name__ == "__main__":
    run(__doc__, measure, seeds=3, samples=32, budget=4096, repeats=20)
