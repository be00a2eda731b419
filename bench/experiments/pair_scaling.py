"""pair_moe at its named shapes and over sizes: time against pairs, memory against tokens.

    python -m bench.pair_scaling [--out FILE.json] [--plot FILE.png]

Contestants are interleaved in one process; memory is the growth of a fresh process over its inputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench.products import SGEMM_FLOP, sgemm
from flmoe_kernels.profile.contestants import prepare
from flmoe_kernels.profile.measure import interleave, timings

from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.costs import cost
from flmoe_kernels.profile.environment import environment
from flmoe_kernels.profile.memory import peak_growth
from flmoe_kernels.profile.shapes import PAIR_BASE, PAIR_LONG, PairShape

FAST, REFERENCE, COMPILED = "cpu", "reference", "compiled"
NAMES = (FAST, REFERENCE, COMPILED)
PASSES = (FORWARD, BOTH)
REDUCTIONS = ("none", "pool")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PEER_LIMIT = 2048  # the reference's maps of longer ones do not fit
STYLE = {
    FAST: {"marker": "o", "linestyle": "-", "color": "black"},
    REFERENCE: {"marker": "s", "linestyle": "--", "color": "0.45"},
    COMPILED: {"marker": "^", "linestyle": ":", "color": "0.2"},
}


def case_of(shape: PairShape, kind: str, reduce: str) -> Case:
    return Case("pair_moe", shape, kind, torch.float32, "cpu", reduce)


def make_call(shape: PairShape, name: str, kind: str, reduce: str) -> Callable[[], object]:
    return prepare(case_of(shape, kind, reduce), name).call


def base_rows(rounds: int) -> list[dict[str, Any]]:
    """Every pass and reduction at pair_base, with the rate against this machine's sgemm."""
    rows = []
    for kind in PASSES:
        for reduce in REDUCTIONS:
            calls = {name: make_call(PAIR_BASE, name, kind, reduce) for name in NAMES}
            found = timings(interleave({**calls, "sgemm": sgemm()}, rounds, warmup=3))
            sgemm_rate = SGEMM_FLOP / found.pop("sgemm").p50
            for name, timing in found.items():
                flop = cost(case_of(PAIR_BASE, kind, reduce)).flop
                rows.append(
                    {
                        "shape": PAIR_BASE.name,
                        "pass": kind,
                        "reduce": reduce,
                        "contestant": name,
                        **asdict(timing),
                        "ratio": timing.p50 / found[FAST].p50,
                        "gflops": flop / timing.p50 / 1e9,
                        "share_of_sgemm": flop / timing.p50 / sgemm_rate,
                    }
                )
                show(rows[-1])
    return rows


def warmed_call(shape: PairShape, name: str, kind: str, reduce: str) -> Callable[[], object]:
    """A call at `shape` in a process that has made a small one, so that libraries are loaded; the compiled peer
    has compiled this very shape."""
    if name != COMPILED:
        make_call(PairShape("small", 1, 8, 8), name, kind, reduce)()
    call = make_call(shape, name, kind, reduce)
    if name == COMPILED:
        call()
    return call


def size_rows() -> list[dict[str, Any]]:
    """One sample of L x L pairs, forward and backward, "none": time and memory of each contestant."""
    rows = []
    for length in LENGTHS:
        shape = PairShape(f"{length} x {length}", 1, length, length)
        names = NAMES if length <= PEER_LIMIT else (FAST,)
        kind, reduce = PASSES[1], REDUCTIONS[0]
        calls = {name: make_call(shape, name, kind, reduce) for name in names}
        found = timings(interleave(calls, 5 if length <= PEER_LIMIT else 3, warmup=2))
        for name, timing in found.items():
            grown = peak_growth(warmed_call, shape, name, kind, reduce)
            rows.append(
                {
                    "shape": shape.name,
                    "pass": kind,
                    "reduce": reduce,
                    "contestant": name,
                    **asdict(timing),
                    "ratio": timing.p50 / found[FAST].p50,
                    "pairs": shape.pairs,
                    "tokens": 2 * length,
                    "peak_bytes": grown,
                }
            )
            show(rows[-1])
    return rows


def skewed_rows() -> list[dict[str, Any]]:
    """The same number of pairs with sides of any proportion: time per pair should not depend on it."""
    rows = []
    for log in range(10, 4, -1):
        for sides in ((4**9 >> log, 1 << log), (1 << log, 4**9 >> log)):
            shape = PairShape(f"{sides[0]} x {sides[1]}", 1, *sides)
            calls = {
                name: make_call(shape, name, PASSES[1], REDUCTIONS[0]) for name in (FAST, REFERENCE)
            }
            found = timings(interleave(calls, 7, warmup=2))
            for name, timing in found.items():
                rows.append(
                    {
                        "shape": shape.name,
                        "pass": PASSES[1],
                        "reduce": REDUCTIONS[0],
                        "contestant": name,
                        **asdict(timing),
                        "ratio": timing.p50 / found[FAST].p50,
                    }
                )
                show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    rest = f"{row['gflops']:7.0f} GFLOP/s" if "gflops" in row else ""
    rest += f" {row['share_of_sgemm']:5.0%} of sgemm" if "share_of_sgemm" in row else ""
    rest += f" peak {row['peak_bytes'] / 2**20:8.1f} MiB" if "peak_bytes" in row else ""
    print(
        f"{row['shape']:12} {row['pass']:17} {row['reduce']:5} {row['contestant']:10}"
        f"{1e3 * row['p50']:9.2f} ms ({1e3 * row['p20']:.2f} to {1e3 * row['p80']:.2f})"
        f" {row['ratio']:5.2f}x {rest}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for axes, across, up, scale in (
        (time, "pairs", "p50", 1e3),
        (memory, "tokens", "peak_bytes", 2**-20),
    ):
        for name in NAMES:
            own = [row for row in rows if row["contestant"] == name]
            axes.loglog(
                [row[across] for row in own],
                # What no page was added for shows as one page.
                [max(row[up], 4096 if up == "peak_bytes" else 0) * scale for row in own],
                label=name,
                **STYLE[name],
            )
        axes.grid(which="major", color="0.85")
        axes.legend()
    time.set(xlabel="token pairs", ylabel="milliseconds", title="Forward and backward")
    memory.set(xlabel="tokens, La + Lb", ylabel="MiB over inputs", title="Peak memory")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--plot", type=Path, help="write the plot over sizes here")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    long = peak_growth(warmed_call, PAIR_LONG, FAST, PASSES[1], REDUCTIONS[0])
    print(f"{PAIR_LONG.name}: {long / 2**20:.1f} MiB over its inputs, forward and backward")
    result = {
        "environment": environment(),
        "pair_base": base_rows(options.rounds),
        "pair_long_peak_bytes": long,
        "proportions": skewed_rows(),
        "sizes": size_rows(),
    }
    for path in (options.out, options.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result["sizes"], options.plot)


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    main()
