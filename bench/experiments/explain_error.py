"""Error of pair indices at equal budgets: python -m bench.experiments.explain_error

The games are samples of the demo's synergy task, cut to fourteen tokens, so that the exact index is known from
all 16,384 coalitions. Every estimator gets the same game and the same number of evaluations. The error is the
root mean square over all pairs, samples and seeds. Needs shapiq.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.experiments.command import Row, run
from bench.experiments.explain_models import INTERACTION, SYNERGY, Learned, learn
from flmoe_kernels import explain
from flmoe_kernels.explain.estimators.indices import SII

TOKENS = 7  # of each modality
BUDGETS = (1024, 2048, 4096, 8192)
OURS = "flmoe_kernels"
THEIRS = ("PermutationSamplingSII", "SVARMIQ", "KernelSHAPIQ")

Values = np.ndarray[Any, np.dtype[np.float64]]


def game_of(learned: Learned, sample: int) -> explain.TokenGame:
    inputs = [x[:, :TOKENS] for x in learned.inputs]
    return explain.TokenGame(
        learned.layer, inputs, target=int(learned.labels[sample]), fill="zero", sample=sample
    )


def tabulated(game: explain.TokenGame) -> Callable[[Any], Values]:
    """The game with all values in a table, so that every estimator gets bitwise the same values at once."""
    players = game.players
    whole = (np.arange(2**players)[:, None] >> np.arange(players)) & 1
    table = game(whole.astype(np.bool_))
    return lambda coalitions: table[
        np.asarray(coalitions, dtype=np.int64) @ (1 << np.arange(players))
    ]


class Table:
    """A tabulated game for `probe_game`. asked: number of coalitions evaluated so far."""

    def __init__(self, values: Callable[[Any], Values], players: int) -> None:
        self.values, self.players, self.asked = values, players, 0

    def __call__(self, coalitions: Any) -> Values:
        rows = np.atleast_2d(coalitions)  # shapiq passes a single coalition as a vector
        self.asked += len(rows)
        return self.values(rows)


def estimates(name: str, game: Table, budget: int, seed: int) -> Values:
    """Index of all pairs, ordered by their players."""
    if name == OURS:
        sampling = explain.Sampling(budget=budget, seed=seed)
        result = explain.probe_game(game, indices=(SII,), method="sampling", sampling=sampling)
        return result[SII].values
    import shapiq.approximator

    estimator = getattr(shapiq.approximator, name)(
        n=game.players, max_order=2, index=SII, random_state=seed
    )
    values = estimator.approximate(budget, game)
    pairs = [(i, j) for i in range(game.players) for j in range(i + 1, game.players)]
    return np.array([values[pair] for pair in pairs])


def measure(samples: int, seeds: int) -> list[Row]:
    """Rows with the error of every estimator at every budget. seeds: number of runs per sample."""
    learned = learn(SYNERGY, INTERACTION, 0, samples)
    rows = []
    games = [game_of(learned, sample) for sample in range(samples)]
    tables = [tabulated(game) for game in games]
    exact = [
        explain.probe_game(Table(t, g.players), indices=(SII,), method="exact")[SII].values
        for t, g in zip(tables, games, strict=True)
    ]
    scale = float(np.sqrt(np.mean([x**2 for x in exact])))
    for budget in BUDGETS:
        for name in (OURS, *THEIRS):
            squares, asked = [], []
            for table, game, truth in zip(tables, games, exact, strict=True):
                for seed in range(seeds):
                    counted = Table(table, game.players)
                    estimate = estimates(name, counted, budget, seed)
                    squares.append(np.mean((estimate - truth) ** 2))
                    asked.append(counted.asked)
            # Mean and spread of the squared errors of all runs.
            error, spread = np.sqrt(np.mean(squares)), np.std(squares) / len(squares) ** 0.5
            rows.append(
                {
                    **{"estimator": name, "budget": budget, "runs": len(squares)},
                    "evaluations": float(np.mean(asked)),
                    "error": float(error),
                    "standard_error": float(spread / (2 * error)),
                    "relative_error": float(error / scale),
                }
            )
            print(
                f"{budget:5} {name:24} evaluations {np.mean(asked):7.1f}  error {error:.4f} "
                f"(s.e. {spread / (2 * error):.4f}), {error / scale:.1%} of the indices' size",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    run(__doc__, measure, packages=("shapiq",), samples=8, seeds=10)
