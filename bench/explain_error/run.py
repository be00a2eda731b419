"""Errors of estimators on games with a known index, as JSON lines.

    python -m bench.explain_error.layers TABLES                      tables of trained layers
    python -m bench.explain_error.run TABLES OUT ours                this package
    python -m bench.explain_error.run TABLES OUT peers               in an environment with shapiq alone
    python -m bench.explain_error.table RESULTS OUT...               writes RESULTS (JSON), prints the ratios

One line per game, budget and estimator: root mean square error over pairs and seeds relative to that of zeros,
mean recall, seconds and evaluations of a run, for this package the number of 95% intervals
and of those that cover the index.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .games import Game, errors, games

BUDGETS = (512, 2048, 8192, 16384)
SEEDS, FEW = 20, 3
# Up to this budget and number of players, this package runs with more seeds, to measure the coverage of its
# intervals.
COVERAGE_SEEDS, COVERAGE_BUDGET, COVERAGE_PLAYERS = 200, 2048, 16
SCREENED = 100  # from this number of players on, candidates are screened
Run = Callable[[Game, int, int], dict[str, Any]]


class Counted:
    """A game that counts the evaluated coalitions."""

    def __init__(self, game: Game) -> None:
        self.players, self.asked, self._values = game.players, 0, game.values

    def __call__(self, coalitions: Any) -> Any:
        self.asked += len(coalitions)
        return self._values(np.asarray(coalitions, dtype=np.bool_))


def ours(game: Game, budget: int, seed: int) -> dict[str, Any]:
    from flmoe_kernels.explain import Sampling, probe_game

    counted = Counted(game)
    pairs = "screened" if game.players >= SCREENED else None
    start = time.perf_counter()
    found = probe_game(
        counted,
        pairs,
        indices=["SII"],
        method="sampling",
        sampling=Sampling(budget=budget, seed=seed),
    )["SII"]
    seconds = time.perf_counter() - start
    matrix = np.nan_to_num(found.matrix())
    truth = game.index[tuple(found.pairs.T)]
    known = found.standard_errors > 1e-9 * np.abs(game.index).max()
    inside = np.abs(found.values - truth) <= 1.96 * found.standard_errors
    covered = {"covered": int(inside[known].sum()), "intervals": int(known.sum())}
    return {**errors(matrix, game), **covered, "seconds": seconds, "evaluations": counted.asked}


def peer(build: Callable[[int, int], Any]) -> Run:
    def run(game: Game, budget: int, seed: int) -> dict[str, Any]:
        counted, start = Counted(game), time.perf_counter()
        found = build(game.players, seed).approximate(budget, counted)
        seconds = time.perf_counter() - start
        matrix = np.zeros((game.players, game.players))
        for members, value in found.dict_values.items():
            if len(members) == 2:
                matrix[members] = matrix[members[::-1]] = value
        return {**errors(matrix, game), "seconds": seconds, "evaluations": counted.asked}

    return run


def peers() -> dict[str, tuple[Run, int]]:
    """Estimators of shapiq and their largest number of players within minutes."""
    from shapiq import approximator as of

    options: dict[str, tuple[str, dict[str, Any], int]] = {
        "SVARMIQ": ("SVARMIQ", {}, 64),
        "KernelSHAPIQ": ("KernelSHAPIQ", {}, 16),
        "InconsistentKernelSHAPIQ": ("InconsistentKernelSHAPIQ", {}, 64),
        "ProxySHAP": ("ProxySHAP", {}, 356),
        "ProxySHAP, adjusted": ("ProxySHAP", {"adjustment": True}, 64),
        # Its search for hyperparameters takes minutes a run.
        "ProxySPEX": ("ProxySPEX", {"hpo": False}, 356),
    }

    def build(name: str, more: dict[str, Any]) -> Run:
        kind = getattr(of, name)
        return peer(lambda n, seed: kind(n=n, max_order=2, index="SII", random_state=seed, **more))

    return {name: (build(kind, more), most) for name, (kind, more, most) in options.items()}


def main(
    tables: Path, out: Path, which: str, names: str = "", budgets: str = "", seeds: str = ""
) -> None:
    warnings.filterwarnings("ignore")
    estimators = {"flmoe_kernels": (ours, 10**9)} if which == "ours" else peers()
    sizes = [int(x) for x in budgets.split(",")] if budgets else list(BUDGETS)
    for name, make in games(tables).items():
        if names and name not in names.split(","):
            continue
        game = make()
        for budget in sizes:
            for estimator, (run, most) in estimators.items():
                # Fewer evaluations than three for each size and part of a screening are refused.
                if game.players > most or not 6 * game.players <= budget < 2**game.players:
                    continue
                if estimator == "ProxySPEX" and budget > BUDGETS[0]:
                    continue  # up to a minute a run
                count = FEW if estimator == "ProxySPEX" else SEEDS
                if which == "ours" and budget <= COVERAGE_BUDGET:
                    count = COVERAGE_SEEDS if game.players <= COVERAGE_PLAYERS else count
                count = min(int(seeds or count), count)
                runs = [run(game, budget, seed) for seed in range(count)]
                row: dict[str, Any] = {"game": name, "budget": budget, "estimator": estimator}
                row |= {"runs": len(runs)}
                row |= {"error": float(np.sqrt(np.mean([x["error"] ** 2 for x in runs])))}
                for key in ("recall_10", "recall_20", "seconds", "evaluations"):
                    row[key] = float(np.mean([x[key] for x in runs]))
                for key in ("covered", "intervals"):
                    if key in runs[0]:
                        row[key] = sum(x[key] for x in runs)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
