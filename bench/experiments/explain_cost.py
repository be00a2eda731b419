"""What a pair probe costs at mmimdb, next to the naive loop: python -m bench.experiments.explain_cost

The naive loop evaluates v(S), v(S + i), v(S + j) and v(S + i + j) of one pair and one draw with the reference
layer, one at a time, absent tokens masked out. Ours uses the engine: pairs across modalities among the top
tokens share draws, and absent tokens are not computed. Both alternate in short parts. Ours has two rates per
second: coalitions that the layer evaluated, and coalition values that the estimate used. The latter are four per
draw and pair, as in the naive loop.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.command import Row, run
from flmoe_kernels import InteractionMoE, explain
from flmoe_kernels.explain.games.token_game import TokenGame
from flmoe_kernels.profile.operators.interaction_moe import make_inputs, make_reference
from flmoe_kernels.profile.shapes import MMIMDB

Bools = np.ndarray[Any, np.dtype[np.bool_]]
CORNERS = 4


def sample() -> tuple[list[Tensor], list[Tensor]]:
    inputs, masks = make_inputs(MMIMDB, "cpu")
    return [x[:1] for x in inputs], [mask[:1] for mask in masks]


def naive(game: TokenGame, draws: int, seed: int) -> float:
    """Coalitions a second, one at a time: a pair, a draw of S, its four corners."""
    generator = np.random.default_rng(seed)
    start = time.perf_counter()
    for _ in range(draws):
        i, j = generator.choice(game.players, 2, replace=False)
        order = generator.permutation(np.delete(np.arange(game.players), [i, j]))
        inside = np.zeros((1, game.players), dtype=np.bool_)
        inside[0, order[: generator.integers(0, game.players - 1)]] = True
        for added in ((), (i,), (j,), (i, j)):
            corner = inside.copy()
            corner[0, list(added)] = True
            game(corner)
    return CORNERS * draws / (time.perf_counter() - start)


def shared(
    layer: InteractionMoE, top: int, budget: int, seed: int
) -> tuple[float, float, explain.PairValues]:
    """Coalitions evaluated a second, coalition values used a second, and the result."""
    inputs, masks = sample()
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(x.shape[:2], generator=generator) for x in inputs]
    start = time.perf_counter()
    [found] = explain.shapley_interactions(
        layer,
        inputs,
        masks,
        target=0,
        pairs="across",
        scores=scores,
        top=top,
        sampling=explain.Sampling(budget=budget, seed=seed),
    )
    seconds = time.perf_counter() - start
    used = CORNERS * found.draws * len(found.pairs)
    return found.evaluations / seconds, used / seconds, found


def measure(rounds: int, draws: int, top: int, budget: int) -> list[Row]:
    """rounds: of both in turn; draws: of the naive loop; top: tokens of a modality; budget: coalitions."""
    reference = make_reference(MMIMDB).eval()
    layer = InteractionMoE.adopt(reference).eval()
    game = TokenGame(reference, *sample(), target=0)
    naive(game, 1, 0)
    rows = []
    for seed in range(rounds):
        alone = naive(game, draws, seed)
        evaluated, used, found = shared(layer, top, budget, seed)
        rows.append(
            {
                **{"naive": alone, "evaluated": evaluated, "used": used},
                **{"evaluated_ratio": evaluated / alone, "used_ratio": used / alone},
                **{"pairs": len(found.pairs), "evaluations": found.evaluations},
                "draws": found.draws,
            }
        )
        print(
            f"naive {alone:6.1f}/s   ours evaluated {evaluated:7.1f}/s ({evaluated / alone:.1f}x), "
            f"used {used:8.1f}/s ({used / alone:.1f}x)  {found.evaluations} evaluations",
            flush=True,
        )
    for name in ("evaluated_ratio", "used_ratio"):
        print(f"median {name}: {statistics.median(row[name] for row in rows):.1f}x")
    return rows


if __name__ == "__main__":
    run(__doc__, measure, rounds=5, draws=20, top=8, budget=2048)
