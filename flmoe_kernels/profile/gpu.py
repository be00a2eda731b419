"""All GPU benchmarks against their peers, within a budget: python -m flmoe_kernels.profile.gpu

What bench/gpu.sh calls, on a machine that may have neither typer nor rich. Every group of cases runs in a process
of its own with a deadline, so that a hang costs its group alone; what a group has measured until then is kept.
Groups that the budget leaves no time for are skipped, and said so. A table of the targets is printed last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import shapes as named
from . import targets
from .cases import BOTH, DTYPES, FORWARD, Case, cases
from .ceilings import Ceilings, measure_ceilings
from .check import agree
from .contestants import OURS, running
from .environment import device_name, environment
from .failures import words_of
from .results import save_json
from .shapes import LayerShape, PairShape, Shape, is_cuda
from .suite import FAILED, document, entry_of, measure_entry

BUDGET = 480.0
# A group gets what is left, but no more than this; with less than LEAST_SECONDS it is not started.
GROUP_SECONDS = 200.0
LEAST_SECONDS = 20.0
# Of timing for one case.
CASE_SECONDS = 4.0
FILE_NAME = "gpu.json"
# Characters of a failing case's traceback that the file keeps.
MOST_TRACEBACK = 6000
MODULE = "flmoe_kernels.profile.gpu"


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases that share a process; peers: None for all."""

    name: str
    operator: str
    shape: str
    phases: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    peers: tuple[str, ...] | None = None


# Peers that start at once, and those that compile for a minute: these get groups of their own, after the others,
# so that a compiler which takes too long costs no other number.
_PAIR, _LAYER = ("reference",), ("reference", "reference+sdpa", "vmap", "reference, TF32")
_PAIR_COMPILED, _LAYER_COMPILED = ("compiled",), ("compiled+sdpa, autocast",)
_REDUCTIONS = ("none", "pool")
GROUPS = (
    Group("pair_512", "pair_moe", "pair_512", (FORWARD, BOTH), _REDUCTIONS, _PAIR),
    Group("mmimdb", "interaction_moe", "mmimdb", (BOTH, FORWARD), peers=_LAYER),
    Group("routed_large", "routed_mlp", "routed_large", (BOTH, FORWARD), ("no_bias",)),
    Group("mimic", "interaction_moe", "mimic", (BOTH, FORWARD), peers=_LAYER),
    Group("enrico", "interaction_moe", "enrico", (BOTH, FORWARD), peers=_LAYER),
    Group("routed_small_e16", "routed_mlp", "routed_small_e16", (BOTH,), ("bias",)),
    Group("routed_small_e4", "routed_mlp", "routed_small_e4", (BOTH,), ("bias",)),
    Group("pair_512_compiled", "pair_moe", "pair_512", (FORWARD,), _REDUCTIONS, _PAIR_COMPILED),
    Group("mmimdb_compiled", "interaction_moe", "mmimdb", (BOTH,), peers=_LAYER_COMPILED),
    Group("enrico_compiled", "interaction_moe", "enrico", (BOTH,), peers=_LAYER_COMPILED),
    Group("attention", "expert_attention", "mmimdb", (FORWARD, BOTH), ("dropout",)),
    Group("pair_base", "pair_moe", "pair_base", (FORWARD, BOTH), ("none",), _PAIR),
    Group("pair_long", "pair_moe", "pair_long", (BOTH,), ("none",), ()),
    Group("routing", "routing", "routed_large", (FORWARD,)),
)

Run = Callable[[Group, float, Path], str]


def cases_of(group: Group, device: str, tiny: bool) -> list[Case]:
    """In bfloat16, the type of the targets; tiny: the same names at sizes that take no time."""
    shape = named.by_name(group.shape, "cuda")
    found = [
        Case(
            group.operator,
            tiny_shape(shape) if tiny else shape,
            phase,
            DTYPES["bfloat16"],
            device,
            v,
        )
        for phase in group.phases
        for v in group.variants
    ]
    return found


def tiny_shape(shape: Shape) -> Shape:
    """A shape of the same name and structure in which every kernel still has several tiles' edges."""
    if isinstance(shape, LayerShape):
        lengths = {"tokens": (7,) * shape.modalities, "valid": (5, *shape.valid[1:])}
        return dataclasses.replace(shape, batch=2, dim=32, heads=2, **lengths)  # type: ignore[arg-type]
    if isinstance(shape, PairShape):
        return dataclasses.replace(shape, batch=2, rows=33, columns=18, rank=16, width=16)
    return dataclasses.replace(shape, tokens=67, width=32, hidden=48, experts=4, choices=2)


def run_groups(
    groups: Sequence[Group],
    budget: float,
    run: Run,
    folder: Path,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Group, str]]:
    """Run groups until the budget is spent; yields each with "" or what went wrong.

    Args:
        run: runs one group for at most so many seconds, writes its results to a file, returns what went wrong.
    """
    start = now()
    for group in groups:
        left = budget - (now() - start)
        if left < LEAST_SECONDS:
            yield group, f"skipped: {left:.0f} s are left of {budget:.0f}"
            continue
        yield group, run(group, min(left, GROUP_SECONDS), folder / f"{group.name}.jsonl")


def run_apart(group: Group, seconds: float, path: Path, extra: Sequence[str] = ()) -> str:
    """Run a group in a process of its own."""
    command = [sys.executable, "-m", MODULE, "--group", group.name, "--lines", str(path), *extra]
    try:
        done = subprocess.run(
            command, stderr=subprocess.PIPE, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return f"failed: {words[-1][:300]}"
    return ""


def measure_group(
    group: Group, device: str, tiny: bool, ceilings: Ceilings, seconds: float, path: Path
) -> None:
    """Measure the cases of a group, each written to the file as soon as it is done."""
    with path.open("a", encoding="utf-8") as file:
        for case in cases_of(group, device, tiny):
            try:
                rows, detail = measure_entry(
                    entry_of(case, group.peers),
                    seconds,
                    torch.get_num_threads(),
                    is_cuda(device),
                    ceilings,
                )
                line = json.dumps({"rows": rows, "detail": detail}, allow_nan=False)
            except Exception as error:
                detail = {
                    "case": case.name,
                    "failed": f"{type(error).__name__}: {words_of(error)}",
                    "traceback": traceback.format_exc()[-MOST_TRACEBACK:],
                }
                line = json.dumps({"rows": [], "detail": detail})
            file.write(line + "\n")
            file.flush()
            print(line_of(detail), flush=True)


def line_of(detail: dict[str, Any]) -> str:
    """One case in one line."""
    if detail.get("failed"):
        return f"{detail['case']:58} {detail['failed']}"
    ours = detail["contestants"][0]
    share, peak = ours["share_of_roofline"], ours["peak_bytes"]
    ratios = [f"{x['name']} {x['ratio']:.2f}x" for x in detail["contestants"][1:]]
    parts = [
        f"{detail['case']:58} {ours['name']:7} {1e3 * ours['p50']:9.3f} ms",
        f"({1e3 * ours['p20']:.3f} to {1e3 * ours['p80']:.3f})",
        f"{ours['flop_per_second'] / 1e12:7.1f} TFLOP/s {ours['bytes_per_second'] / 1e9:7.1f} GB/s",
        "" if share is None else f"{share:4.0%} of the bound ({detail['binds']})",
        "" if peak is None else f"peak {peak / 2**20:.0f} MiB",
        f"vs {', '.join(ratios) or 'nobody'}",
        *(f"; {one['name']} {one['why_not']}" for one in failing(detail)),
    ]
    return " ".join(filter(None, parts))


def failing(detail: dict[str, Any]) -> list[dict[str, Any]]:
    """Contestants that were left out because they failed or were wrong, not because they cannot run."""
    return [x for x in detail.get("left_out", ()) if x["why_not"].startswith(FAILED + ":")]


def is_bad(detail: dict[str, Any]) -> bool:
    """Whether a kernel of this package failed or was wrong; a peer may."""
    return bool(detail.get("failed")) or any(x["kind"] == OURS for x in failing(detail))


def gather(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and details of all groups' files; a line that a killed process left half-written is dropped.

    A case that several groups timed with other peers is one: our numbers are the first group's, and each peer's
    ratio is to ours of its own group.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    details: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        path = folder / f"{group.name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            for row in found["rows"]:
                rows.setdefault((row["case"], row["contestant"]), row)
            case = found["detail"]["case"]
            details[case] = merge(details.get(case), found["detail"])
    return list(rows.values()), list(details.values())


def merge(known: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Details of one case from two groups. If ours failed in one of them, that is what is told."""
    if known is None or new.get("failed"):
        return new
    if known.get("failed"):
        return known
    timed = {one["name"]: one for one in [*new["contestants"], *known["contestants"]]}
    ours = known["contestants"][0]
    left_out = {one["name"]: one for one in [*known["left_out"], *new["left_out"]]}
    return known | {
        "contestants": [ours, *(one for one in timed.values() if one["name"] != ours["name"])],
        "left_out": [one for name, one in left_out.items() if name not in timed],
    }


def target_table(found: Sequence[targets.Outcome]) -> str:
    lines = [f"{'target':72} {'wanted':>14}  verdict"]
    for one in found:
        words = "" if one.verdict == targets.MET else f"{one.verdict}: "
        lines.append(
            f"{one.target.name:72} {'at least ' + one.target.wanted:>14}  {words}{one.words}"
        )
    return "\n".join([*lines, targets.summary(found)])


def sanitize(device: str) -> None:
    """One call of each kernel of ours at tiny sizes, for compute-sanitizer to look at; checked as always.

    Raises:
        WrongAnswer: one is wrong.
    """
    for case in cases(shapes=tiny_shapes(), phases=(BOTH,), dtypes=("bfloat16",), device=device):
        for one in running(case, OURS):
            agree(case, one)
            print(f"{case.name} {one.name}", flush=True)


def tiny_shapes() -> list[Shape]:
    return [
        tiny_shape(named.by_name(name, "cuda"))
        for name in ("pair_base", "mmimdb", "mimic", "routed_small_e4")
    ]


def results_folder(device: str, dry_run: bool) -> Path | None:
    """$OUT, or bench/results/<device name>/ of the working directory; a dry run leaves nothing there."""
    out = os.environ.get("OUT")
    if out or dry_run:
        return Path(out) if out else None
    name = "".join(c if c.isalnum() else "-" for c in device_name(device).lower())
    return Path("bench") / "results" / "-".join(filter(None, name.split("-")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default=os.environ.get("FLMOE_GPU_DEVICE", "cuda"))
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes: proves the way, not speed"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--seconds", type=float, default=CASE_SECONDS, help="of timing for a case")
    parser.add_argument("--out", type=Path, help="folder; default $OUT or bench/results/<device>/")
    parser.add_argument("--only", action="append", choices=[g.name for g in GROUPS])
    parser.add_argument("--sanitize", action="store_true", help="one call of each kernel, untimed")
    parser.add_argument("--group", choices=[g.name for g in GROUPS], help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if is_cuda(options.device) and not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 2
    if options.sanitize:
        sanitize(options.device)
        return 0
    if options.group:
        group = next(g for g in GROUPS if g.name == options.group)
        ceilings = Ceilings(**json.loads(options.ceilings))
        measure_group(
            group, options.device, options.dry_run, ceilings, options.seconds, options.lines
        )
        return 0
    return measure_all(options)


def measure_all(options: argparse.Namespace) -> int:
    """The whole: ceilings, groups, the file, the table.

    Exit code 1 where a case of ours failed or was wrong, or when interrupted, which ends the measuring alone.
    """
    device = options.device
    facts = environment(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    started = time.monotonic()
    ceilings = measure_ceilings(device, (torch.bfloat16, torch.float32))
    extra = ["--device", device, "--seconds", str(options.seconds)]
    extra += ["--ceilings", json.dumps(ceilings.as_dict())]
    extra += ["--dry-run"] if options.dry_run else []
    chosen = [g for g in GROUPS if not options.only or g.name in options.only]
    left = options.budget - (time.monotonic() - started)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run: Run = lambda group, seconds, path: run_apart(group, seconds, path, extra)  # noqa: E731
        bad = False
        try:
            for group, wrong in run_groups(chosen, left, run, folder):
                if wrong:
                    print(f"{group.name:58} {wrong}", flush=True)
        except KeyboardInterrupt:
            bad = True
            print("interrupted: what was measured until now is kept", flush=True)
        rows, details = gather(folder)
    result = document(device, rows, details, ceilings)
    # A dry run on a CPU goes the same way, and its cases have the names of the GPU's targets.
    found = targets.outcomes(targets.GPU_TARGETS, result)
    result["runs"][0] |= {
        "targets": [one.as_dict() for one in found],
        "dry_run": options.dry_run,
    }
    target = options.out or results_folder(device, options.dry_run)
    print(target_table(found))
    if options.dry_run:
        print("a dry run: tiny sizes, which say nothing about any target")
    if target is not None:
        save_json(target / FILE_NAME, result)
        print(f"{target / FILE_NAME} holds all of it")
    return 1 if bad or any(map(is_bad, details)) else 0


if __name__ == "__main__":
    # A deadline's signal ends the measuring as Ctrl-C does: what was measured is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
