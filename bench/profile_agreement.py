"""Whether the profiler can be believed: two profiles agree within their intervals, and the ceilings are real.

    python -m bench.profile_agreement            # a few minutes; on a machine that does nothing else

Each case is profiled twice, in processes of their own, and the intervals of the two medians have to meet. The
measured ceilings are held to large products and copies timed here, of other sizes and by the wall clock alone.
Writes bench/results/profile_agreement.json; exit code 1 where something disagrees.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flmoe_kernels.profile.cases import DTYPES
from flmoe_kernels.profile.ceilings import copy_rate, matmul_rate
from flmoe_kernels.profile.environment import environment

RESULT = Path(__file__).parent / "results" / "profile_agreement.json"
TOLERANCE = 0.10
CASES = (
    ("pair_moe", "pair_base", "forward"),
    ("pair_moe", "pair_base", "forward+backward"),
    ("routed_mlp", "routed_small_e4", "forward+backward"),
    ("expert_attention", "enrico", "forward+backward"),
    ("interaction_moe", "mmimdb", "forward"),
    ("interaction_moe", "mimic", "forward+backward"),
)
PATIENCE = 3.0  # seconds that an independent measurement may take
TRIES = 5


def profile_once(case: tuple[str, str, str], device: str, seconds: float) -> dict[str, Any]:
    """The profile of a case's default backend, in a fresh process."""
    operator, shape, phase = case
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "flmoe_kernels", "profile", "--op", operator]
        command += ["--shape", shape, "--pass", phase, "--device", device, "--no-memory"]
        command += ["--no-check", "--seconds", str(seconds), "--json", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        [found] = json.loads(target.read_text())["profiles"]
    return dict(found)


def compare_twice(case: tuple[str, str, str], device: str, seconds: float) -> dict[str, Any]:
    one, other = (profile_once(case, device, seconds)["spread"] for _ in range(2))
    ratio = other["median"] / one["median"]
    agree = one["low"] <= other["high"] and other["low"] <= one["high"]
    print(
        f"{'ok  ' if agree else 'NO  '} {'/'.join(case)}: "
        + " and ".join(
            f"{1e3 * x['median']:.3g} ms ({1e3 * x['low']:.3g} - {1e3 * x['high']:.3g})"
            for x in (one, other)
        )
        + f", ratio {ratio:.3f}"
    )
    return {"case": "/".join(case), "runs": [one, other], "ratio": ratio, "agree": agree}


def median_seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call: the median of calls until PATIENCE is over, by the wall clock and a wait for the device."""
    seconds: list[float] = []
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < PATIENCE or len(seconds) < 5:
        before = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - before)
    return sorted(seconds)[len(seconds) // 2]


def independent_product(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of torch's matmul of large rectangular matrices."""
    rows, inner, columns = (3072, 2048, 2560) if device == "cpu" else (12288, 8192, 10240)
    a = torch.rand(rows, inner, device=device).to(dtype)
    b = torch.rand(inner, columns, device=device).to(dtype)
    out = torch.zeros(rows, columns, device=device, dtype=dtype)
    seconds = median_seconds(lambda: torch.matmul(a, b, out=out), device)
    return 2 * rows * inner * columns / seconds


def independent_copy(device: str) -> float:
    """Bytes/s, read and written, of a copy of float32 between two buffers that are there."""
    count = (96 if device == "cpu" else 512) * 2**20
    source = torch.rand(count, device=device)
    target = torch.zeros(count, device=device)
    return 8 * count / median_seconds(lambda: target.copy_(source), device)


def compare_ceiling(
    name: str, measured: Callable[[], float], independent: Callable[[], float]
) -> dict[str, Any]:
    """The median ratio of a few tries, each of which measures both: a machine's clock changes with time."""
    tries = sorted(((measured(), independent()) for _ in range(TRIES)), key=lambda x: x[0] / x[1])
    ours, theirs = tries[len(tries) // 2]
    ratio = ours / theirs
    agree = abs(ratio - 1) <= TOLERANCE
    print(f"{'ok  ' if agree else 'NO  '} {name}: {ours:.4g} and {theirs:.4g}, ratio {ratio:.3f}")
    return {"ceiling": name, "tries": tries, "ratio": ratio, "agree": agree}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each profile")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = options.device
    dtype = "bfloat16" if device.startswith("cuda") else "float32"

    ceilings = [
        compare_ceiling(
            f"matmul, {dtype}",
            lambda: matmul_rate(device, DTYPES[dtype]),
            lambda: independent_product(device, DTYPES[dtype]),
        ),
        compare_ceiling(
            "copy",
            lambda: copy_rate(device),
            lambda: independent_copy(device),
        ),
    ]
    repeats = [compare_twice(case, device, options.seconds) for case in CASES]
    held = {"environment": environment(device), "ceilings": ceilings, "repeats": repeats}
    options.out.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0 if all(entry["agree"] for entry in (*ceilings, *repeats)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
