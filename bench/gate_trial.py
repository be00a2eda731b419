"""Try the gate itself: python bench/gate_trial.py [--busy] [--clean 10] [--planted 10].

Runs the quick set again and again on an unchanged build, where every failure is a false alarm; then, for each of
PLANTED, the one case with a slowdown planted in its kernels, where every pass is a miss. The share is such
that the whole call takes 30% longer: more of the kernels' own time where a part of the call is not theirs. With
--busy another process keeps one core busy all the while. Needs a file of floors with a table of this machine
(`python -m flmoe_kernels bench --gate bench/floors.toml --update bench/floors.toml`) and a native module with
the switch. Counts go to stdout and, after every run, to --out; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flmoe_kernels.profile.allocator import keep_freed_memory
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.contestants import prepare
from flmoe_kernels.profile.environment import environment
from flmoe_kernels.profile.floors import load_floors
from flmoe_kernels.profile.gate import find_case
from flmoe_kernels.profile.paired import clock_for, measure_blocks
from flmoe_kernels.profile.plant import plant

BENCH = Path(__file__).resolve().parent
SLOWDOWN = 0.3
PLANTED = (
    "pair_moe/pair_base/forward/float32/pool",
    "pair_moe/pair_base/forward+backward/float32/none",
    "expert_attention/mmimdb_short/forward+backward/float32/plain",
    "routed_mlp/routed_short/forward+backward/float32/bias",
    "interaction_moe/mmimdb_short/forward+backward/float32",
)
# Products that fill the caches and the vector units: a worse neighbour than an empty loop.
BUSY = """
import os, torch
torch.set_num_threads(1)
a, b = torch.randn(2, 1024, 1024)
parent = os.getppid()
while os.getppid() == parent:
    (a @ b).clone()
"""


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Another process that does not rest as long as this one lives."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def native_share(case: Case) -> float:
    """Which share of a call is spent in the kernels that `plant` reaches: what doubling their time adds."""
    torch.set_num_threads(1)

    def calls() -> dict[str, Any]:
        call = prepare(case, "cpu").call

        def doubled() -> None:
            plant(f"{case.operator}:1")
            try:
                call()
            finally:
                plant(f"{case.operator}:0")

        return {"plain": call, "doubled": doubled}

    clock = clock_for("cpu", 1)
    blocks = measure_blocks(calls, clock, rounds=30, precision=0.02, seconds=4.0)
    return blocks.pair("plain", "doubled").ratio - 1


def run_gate(floors: Path, *options: str) -> tuple[int, list[dict[str, Any]], float]:
    """Exit code, what the gate found of each floor, and seconds of one run of the command."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gate.json"
        command = [sys.executable, "-m", "flmoe_kernels", "bench", "--gate", str(floors)]
        start = time.monotonic()
        done = subprocess.run(
            [*command, "--json", str(out), *options], capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - start
        if done.returncode not in (0, 1) or not out.is_file():
            raise SystemExit(f"the gate ended with {done.returncode}:\n{done.stderr}")
        found = json.loads(out.read_text())["runs"][0]["gate"]
    return done.returncode, found, seconds


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """Of one floor in one run: ratios of the attempts with their intervals, and the outcome."""
    attempts = [[round(a[key], 4) for key in ("ratio", "low", "high")] for a in found["attempts"]]
    keys = ("case", "peer", "expected", "source", "bound", "passed")
    return {**{key: found[key] for key in keys}, "attempts": attempts}


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", type=int, default=10, help="runs of the unchanged build")
    parser.add_argument("--planted", type=int, default=10, help="runs of each planted case")
    parser.add_argument("--busy", action="store_true", help="keep one core busy")
    parser.add_argument("--gate", type=Path, default=BENCH / "floors.toml")
    parser.add_argument("--case", choices=PLANTED, action="append", help="planted; default: all")
    parser.add_argument("--op", help="clean runs of this operator alone")
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "gate_trials.json")
    options = parser.parse_args()
    keep_freed_memory()  # as the gate does
    result: dict[str, Any] = {
        "environment": environment(),
        "busy": options.busy,
        "clean": {"runs": 0, "false_alarms": 0, "seconds": [], "found": []},
        "planted": [],
    }

    def save() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    with busy_core(options.busy):
        clean = result["clean"]
        for number in range(options.clean):
            limit = ["--op", options.op] if options.op else []
            code, found, seconds = run_gate(options.gate, *limit)
            clean["runs"] += 1
            clean["false_alarms"] += code != 0
            clean["seconds"].append(round(seconds, 1))
            clean["found"].append([describe(one) for one in found])
            say(f"clean {number + 1}: {'FALSE ALARM' if code else 'quiet'}, {seconds:.0f} s")
            save()
        for name in options.case or PLANTED:
            result["planted"].append(trial_of(name, options.gate, options.planted))
            save()
    print(json.dumps(counts(result), indent=1))


def trial_of(name: str, floors: Path, runs: int) -> dict[str, Any]:
    """Runs of one case with its kernels slowed down."""
    case = find_case(name, "cpu")
    own = native_share(case)
    share = SLOWDOWN / own
    # A case may have a slower peer besides, with --full.
    quick = (floor for floor in load_floors(floors).floors if floor.quick)
    key = next(floor.key for floor in quick if floor.case == name)
    trial: dict[str, Any] = {
        "case": name,
        "slowdown": SLOWDOWN,
        "native_share": round(own, 3),
        "planted_share": round(share, 3),
        **{"runs": 0, "caught": 0, "seconds": [], "found": []},
    }
    for number in range(runs):
        planted = f"{case.operator}:{share:.4f}"
        code, found, seconds = run_gate(floors, "--only", key, "--plant", planted)
        trial["runs"] += 1
        trial["caught"] += code == 1
        trial["seconds"].append(round(seconds, 1))
        trial["found"].append([describe(one) for one in found])
        say(f"{name} {number + 1}: {'caught' if code == 1 else 'MISSED'}, {seconds:.0f} s")
    return trial


def counts(result: dict[str, Any]) -> dict[str, Any]:
    """What is worth printing."""
    clean = result["clean"]
    return {
        "busy": result["busy"],
        "false alarms": f"{clean['false_alarms']} of {clean['runs']}",
        "caught": {
            trial["case"]: f"{trial['caught']} of {trial['runs']}" for trial in result["planted"]
        },
    }


if __name__ == "__main__":
    main()
