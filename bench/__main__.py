"""Measure the layer against all its peers and write the results: python -m bench [--out FILE].

Training and inference at every named shape, interleaved in one process, and the peak memory of a training
step, in processes of its own. Prints the table that the README shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.layers import (
    COMPILED,
    FAST,
    REFERENCE,
    SDPA,
    contestant,
    inference,
    make_inputs,
    make_reference,
    training_step,
)
from bench.measure import Timing, as_dict, environment, interleave, peak_growth
from bench.shapes import LAYER_SHAPES, LayerShape
from bench.test_interaction_moe import make_call

PEERS = (REFERENCE, SDPA, COMPILED)


def measure(shape: LayerShape, rounds: int, peers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of results of one shape: pass, contestant, timing, ratio to the fast layer."""
    inputs, masks = make_inputs(shape)
    reference = make_reference(shape)
    layers = {name: contestant(name, reference, shape) for name in (FAST, *peers)}
    rows: list[dict[str, Any]] = []
    for kind in ("training", "inference"):
        make = training_step if kind == "training" else inference
        # The compiled peer has no inference method of its own: dynamo compiles its forward only.
        names = [name for name in layers if kind == "training" or name != COMPILED]
        calls = {name: make(layers[name], inputs, masks) for name in names}
        timings = interleave(calls, rounds if shape.tokens[0] > 8 else 10 * rounds)
        rows += [_row(shape, kind, name, t, timings[FAST]) for name, t in timings.items()]
    return rows


def _row(shape: LayerShape, kind: str, name: str, timing: Timing, fast: Timing) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "pass": kind,
        "contestant": name,
        **as_dict(timing),
        "ratio": timing.p50 / fast.p50,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=[s.name for s in LAYER_SHAPES], action="append")
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: all")
    options = parser.parse_args()
    shapes = [s for s in LAYER_SHAPES if not options.shape or s.name in options.shape]
    result: dict[str, Any] = {"environment": environment(), "time": [], "memory": []}
    for shape in shapes:
        for name in (FAST, REFERENCE, SDPA):
            peak = peak_growth(make_call, shape, name, "training")
            result["memory"].append({"shape": shape.name, "contestant": name, "peak_bytes": peak})
            print(f"{shape.name:8} training   {name:15} peak {peak / 2**20:8.1f} MiB", flush=True)
    for shape in shapes:
        for row in measure(shape, options.rounds, options.peer or PEERS):
            result["time"].append(row)
            print(
                f"{row['shape']:8} {row['pass']:10} {row['contestant']:15} "
                f"{1e3 * row['p50']:9.2f} ms  ({1e3 * row['p20']:.2f} to {1e3 * row['p80']:.2f})"
                f"  {row['ratio']:6.2f}x",
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    main()
