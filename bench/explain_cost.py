"""What a pair probe costs at mmimdb, next to the naive loop: python -m bench.explain_cost [--out FILE]

The naive loop asks the reference layer for v(S), v(S + i), v(S + j) and v(S + i + j) of one pair and one draw,
one at a time, absent tokens masked out. Ours asks the engine for the same kind of draws: pairs across modalities
among the top tokens, by draws that all pairs share, absent tokens not computed. Both take turns, in short
parts. Two rates of ours: coalitions that the layer evaluated a second, and coalition values that the estimate
used a second, four for every draw of every pair, which is what the naive loop evaluates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels import InteractionMoE, explain
from flmoe_kernels.explain.games.token_game import TokenGame
from flmoe_kernels.profile.environment import environment
from flmoe_kernels.profile.peers.interaction_moe import make_inputs, make_reference
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


def rounds(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    reference = make_reference(MMIMDB).eval()
    layer = InteractionMoE.adopt(reference).eval()
    game = TokenGame(reference, *sample(), target=0)
    naive(game, 1, 0)
    for seed in range(options.rounds):
        one = naive(game, options.draws, seed)
        evaluated, used, found = shared(layer, options.top, options.budget, seed)
        row = {
            **{"naive": one, "evaluated": evaluated, "used": used},
            **{"evaluated_ratio": evaluated / one, "used_ratio": used / one},
            **{"pairs": len(found.pairs), "evaluations": found.evaluations},
            "draws": found.draws,
        }
        print(
            f"naive {one:6.1f}/s   ours evaluated {evaluated:7.1f}/s ({row['evaluated_ratio']:.1f}x), "
            f"used {used:8.1f}/s ({row['used_ratio']:.1f}x)  {found.evaluations} evaluations",
            flush=True,
        )
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=20, help="of the naive loop, per round")
    parser.add_argument("--top", type=int, default=8, help="tokens of a modality")
    parser.add_argument("--budget", type=int, default=2048, help="coalitions, per round")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    rows = list(rounds(options))
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(
        f"medians: evaluated {medians['evaluated_ratio']:.1f}x, used {medians['used_ratio']:.1f}x"
    )
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        result = {"environment": environment(), "settings": settings, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**result, "medians": medians}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    main()
