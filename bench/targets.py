"""The speed that the kernels must have on a GPU, most important first: pytest bench/targets.py --device cuda.

Without --device cuda the same code runs at tiny sizes on the CPU, and these numbers are not meaningful. Each
result is written as a line of JSON to the file of --lines as soon as it is measured. The table of such a file:

    python -m bench.targets FILE
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from bench.suite import Comparison, compare, options
from flmoe_gate.gate import Against
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.shapes import LayerShape, PairShape, RoutedShape, Shape, by_name, is_cuda

TF32, AUTOCAST = "reference, TF32", "compiled+sdpa, autocast"
# Seconds of a comparison by kind of device.
SECONDS = {"cuda": 2.0, "cpu": 0.05}
FIRST_CALL = "first call, mmimdb, no compiled kernels"
FIRST_CALL_SECONDS = 30.0


@dataclass(frozen=True)
class Target:
    """A comparison with a peer; least and most: limits of the values of `values_of`."""

    operator: str
    shape: str
    phase: str
    variant: str
    peer: str
    least: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)

    def case(self, device: str) -> Case:
        shape = by_name(self.shape, "cuda")
        shape = shape if is_cuda(device) else tiny(shape)
        return Case(self.operator, shape, self.phase, torch.bfloat16, device, self.variant)

    def __str__(self) -> str:
        words = (self.operator, self.shape, self.variant, self.phase)
        return f"{' '.join(filter(None, words))} vs {self.peer}"


def _training(shape: str, peer: str, ratio: float, **most: float) -> Target:
    return Target("interaction_moe", shape, BOTH, "", peer, {"ratio": ratio}, most)


def _pairs(phase: str, variant: str, **more: float) -> Target:
    return Target("pair_moe", "pair_512", phase, variant, "compiled", {"ratio": 10, **more})


def _routed(shape: str, variant: str, peer: str, **least: float) -> Target:
    return Target("routed_mlp", shape, BOTH, variant, peer, least)


MIMIC = _training("mimic", TF32, 10, host_ms=2.5)
TARGETS = (
    _training("mmimdb", TF32, 10, peak=0.25),
    dataclasses.replace(MIMIC, least={"ratio": 10, "graph_to_called": 50}),
    _pairs(FORWARD, "none", share=0.6),
    _pairs(BOTH, "none"),
    _routed("routed_large", "no_bias", "grouped_mm", ratio=1.2),
    _routed("routed_large", "no_bias", "scattermoe", ratio=1.2),
    _training("enrico", TF32, 10),
    _routed("routed_small_e4", "bias", "batched bmm", graphs=1.5),
    _routed("routed_small_e16", "bias", "batched bmm", graphs=1.5),
    _pairs(FORWARD, "pool", share=0.6),
    _pairs(BOTH, "pool"),
    # These compile for a minute.
    _training("mmimdb", AUTOCAST, 3),
    _training("enrico", AUTOCAST, 3),
)


def tiny(shape: Shape) -> Shape:
    """A shape of the same kind that every backend computes in milliseconds."""
    if isinstance(shape, PairShape):
        return dataclasses.replace(shape, batch=2, rows=33, columns=18, rank=16, width=16)
    if isinstance(shape, RoutedShape):
        return dataclasses.replace(shape, tokens=67, width=32, hidden=48, experts=4, choices=2)
    assert isinstance(shape, LayerShape)
    tokens = tuple(min(count, 7) for count in shape.tokens)
    valid = tuple(None if count is None else 5 for count in shape.valid)
    return dataclasses.replace(shape, batch=2, tokens=tokens, valid=valid, dim=32, heads=2)


def values_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Measured values of a comparison.

    ratio: time of the peer over ours, both as called. graphs: the same of CUDA graphs. graph_to_called: the peer's
    time as called over that of our graph. host_ms: until our call returns. share: of the roofline. peak: memory of
    ours over the peer's.
    """
    ours, peer = (facts.get(f"{key}_as_graph", {}) for key in ("ours", "peer"))
    values = {"ratio": facts["ratio"]["median"], "share": facts["share_of_roofline"]}
    if "host_seconds" in ours:
        values["host_ms"] = 1e3 * ours["host_seconds"]
    if "replay_seconds" in ours:
        values["graph_to_called"] = facts["peer_seconds"]["median"] / ours["replay_seconds"]
        if "replay_seconds" in peer:
            values["graphs"] = peer["replay_seconds"] / ours["replay_seconds"]
    peaks = facts.get("peaks", {})
    if peaks.get(facts["ours"]) and peaks.get(facts["peer"]):
        values["peak"] = peaks[facts["ours"]] / peaks[facts["peer"]]
    return values


def missed(target: Target, values: Mapping[str, float]) -> list[str]:
    """The limits that are not kept, or whose value was not measured."""
    found = []
    for limits, sign, words in ((target.least, 1, "at least"), (target.most, -1, "at most")):
        for name, limit in limits.items():
            value = values.get(name)
            if value is None or sign * value < sign * limit:
                got = "no value" if value is None else f"{value:.3g}"
                found.append(f"{name}: expected {words} {limit:g}, got {got}")
    return found


def add_line(file: Path, content: Mapping[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(content) + "\n")


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.getoption("--lines"))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_target(
    benchmark_against: Against, pytestconfig: pytest.Config, lines: Path, target: Target
) -> None:
    device, _ = options(pytestconfig)
    on_gpu = is_cuda(device)
    result: dict[str, Any] = {"target": str(target)}
    try:
        comparison = Comparison(target.case(device), target.peer)
        full = on_gpu and "peak" in target.most
        seconds = SECONDS["cuda" if on_gpu else "cpu"]
        compare(benchmark_against, comparison, full, seconds, graphs=True)
        facts = benchmark_against.benchmark.extra_info
        result |= {"missed": missed(target, values_of(facts)), "values": values_of(facts), **facts}
    except BaseException as error:
        result["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        add_line(lines, result)
    if on_gpu and result["missed"]:
        pytest.fail("; ".join(result["missed"]), pytrace=False)


def test_first_call(pytestconfig: pytest.Config, lines: Path) -> None:
    """Command `warmup` with an empty cache, then the first training step, each in a new process."""
    device, _ = options(pytestconfig)
    if not is_cuda(device):
        pytest.skip("compiles for half a minute")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        for words in (
            ["-m", "flmoe_kernels", "warmup", "--op", "interaction_moe", "--shape", "mmimdb"],
            ["-c", "from bench.targets import first_step; first_step()"],
        ):
            environment = os.environ | {"TRITON_CACHE_DIR": folder}
            subprocess.run([sys.executable, *words], env=environment, check=True)
        seconds = time.monotonic() - start
    late = seconds > FIRST_CALL_SECONDS
    words = [f"expected at most {FIRST_CALL_SECONDS:g} s, got {seconds:.0f} s"] * late
    add_line(lines, {"target": FIRST_CALL, "values": {"seconds": seconds}, "missed": words})
    assert not late, words


def first_step() -> None:
    from flmoe_kernels.profile.registry import default_ours, prepare

    case = TARGETS[0].case("cuda")
    prepare(case, default_ours(case)).call()
    torch.cuda.synchronize()


def table(results: list[dict[str, Any]]) -> Table:
    """Result of every target; host-bound numbers are marked."""
    rows = Table("target", "as called", "CUDA graph", "ratios and other values", "missed")
    by_name = {result["target"]: result for result in results}
    for name in (*map(str, TARGETS), FIRST_CALL):
        result = by_name.get(name, {"error": "no result"})
        cells = [_milliseconds(result, "seconds"), _milliseconds(result, "ours_as_graph")]
        values = ", ".join(f"{key} {value:.3g}" for key, value in result.get("values", {}).items())
        wrong = "; ".join([*result.get("missed", ()), *filter(None, [result.get("error")])])
        rows.add_row(name, *cells, values, wrong)
    return rows


def _milliseconds(result: Mapping[str, Any], key: str) -> str:
    facts = result.get(key, {})
    seconds = facts.get("median", facts.get("replay_seconds"))
    if seconds is None:
        return str(facts.get("not_captured", ""))
    bound = key == "seconds" and result.get("ours_as_graph", {}).get("host_bound")
    return f"{1e3 * seconds:.3g} ms" + (", host-bound" if bound else "")


if __name__ == "__main__":
    written = Path(sys.argv[1]).read_text().splitlines()
    Console(width=200).print(table(list(map(json.loads, written))))
