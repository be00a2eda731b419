"""Do the token pairs that an index ranks first count more than random ones? python -m bench.explain_masking

On the demo's tasks, whose interaction is known by construction: pairs across the two images, ranked by the Shapley
interaction index on the synergy task and by the redundancy gap on the redundant one. The tokens of the first pairs
are masked under a budget of tokens, and as many random tokens of each image; what the label's probability and
logit lose is compared. Every seed draws the split, the encoders, the samples, the initial weights, coalitions
and random sets anew. The samples are the first held-out ones, whatever the model predicts for them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.explain_models import LAYERS, REDUNDANT, SYNERGY, Learned, learn
from flmoe_kernels import explain
from flmoe_kernels.explain.estimators.indices import RG, SII
from flmoe_kernels.profile.environment import environment

TASKS = ((SYNERGY, SII), (REDUNDANT, RG))
BUDGETS = (2, 4, 8)
FILL = "zero"  # masked tokens are still attended, as the published evaluation has it


def one(task: str, index: str, layer: str, seed: int, options: argparse.Namespace) -> list[dict]:
    """Rows of one layer on one task: a budget and metric each."""
    learned = learn(task, layer, seed, options.samples)
    ranked = rank(learned, index, seed, options.budget)
    drops = explain.pair_masking(
        learned.layer,
        learned.inputs,
        learned.masks,
        ranked,
        target=learned.labels,
        budgets=BUDGETS,
        fill=FILL,
        n_random=options.repeats,
        seed=seed,
    )
    rows = []
    for metric in ("prob", "logit"):
        curve = drops.curve(metric=metric)
        place = drops.metrics.index(metric)
        gaps = drops.identified[0, place] - drops.random[0, place].mean(dim=0)
        for k, budget in enumerate(BUDGETS):
            rows.append(
                {
                    **{"task": task, "index": index, "layer": layer, "seed": seed},
                    **{"accuracy": learned.accuracy, "metric": metric, "budget": budget},
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
    found = explain.probe_pairs(
        learned.layer,
        learned.inputs,
        learned.masks,
        indices=(index,),
        target=learned.labels,
        fill=FILL,
        pairs="across",
        sampling=explain.Sampling(budget=budget, seed=seed),
    )
    return [each[index] for each in found]


def line(row: dict[str, Any]) -> str:
    return (
        f"seed {row['seed']} {row['task']:9} {row['index']:3} {row['layer']:18} "
        f"{row['metric']:5} {row['budget']} tokens: identified {row['identified']:+.3f}, "
        f"random {row['random']:+.3f}, gap {row['gap']:+.3f} (s.e. {row['gap_standard_error']:.3f}), "
        f"worse than random in {row['samples_where_worse']:.0%} of samples"
    )


def summary(rows: list[dict[str, Any]]) -> None:
    """Mean of the gap over seeds, least and largest."""
    keys = ("task", "index", "layer", "metric", "budget")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        gaps = [row["gap"] for row in rows if tuple(row[name] for name in keys) == key]
        spread = f"{min(gaps):+.3f} to {max(gaps):+.3f} over {len(gaps)} seeds"
        print(" ".join(map(str, key)), f"gap {statistics.mean(gaps):+.3f} ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32, help="of each task and seed")
    parser.add_argument("--budget", type=int, default=4096, help="coalitions of a sample")
    parser.add_argument("--repeats", type=int, default=20, help="random sets of a sample")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    rows = [
        row
        for seed in range(options.seeds)
        for task, index in TASKS
        for layer in LAYERS
        for row in one(task, index, layer, seed, options)
    ]
    summary(rows)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        result = {
            "environment": environment(),
            "settings": {**settings, "fill": FILL},
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    main()
