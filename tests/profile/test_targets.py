"""The targets, on results made up here: met, missed by how much, not measured and why."""

from __future__ import annotations

from typing import Any

import pytest

from flmoe_kernels.profile import targets
from flmoe_kernels.profile.cases import cases
from flmoe_kernels.profile.contestants import contestants
from flmoe_kernels.profile.targets import (
    CPU_TARGETS,
    GPU_TARGETS,
    MET,
    MISSED,
    NOT_MEASURED,
    Target,
    outcomes,
    targets_of,
)

CASE = "pair_moe/pair_512/forward/bfloat16/none"
RATIO = Target(CASE, targets.RATIO, 10.0, "compiled")
SHARE = Target(CASE, targets.SHARE_OF_BOUND, 0.5)
PRODUCT = Target(CASE, targets.SHARE_OF_PRODUCT, 0.5)
PEAK = Target(CASE, targets.PEAK, 100 * 2**20)


def result(**detail: Any) -> dict[str, Any]:
    """A result of one case in which everything is met, but for what is said."""
    ours = {
        "name": "triton",
        "flop_per_second": 60.0,
        "share_of_roofline": 0.6,
        "peak_bytes": 50 * 2**20,
    }
    ours |= detail.pop("ours", {})
    peers = detail.pop("peers", [{"name": "compiled", "ratio": 12.0}])
    found = {"case": CASE, "contestants": [ours, *peers], "left_out": []} | detail
    return {"runs": [{"details": [found], "ceilings": {"flops": {"float32": 100.0}}}]}


def verdict(target: Target, content: dict[str, Any]) -> tuple[str, str]:
    (found,) = outcomes([target], content)
    return found.verdict, found.words


@pytest.mark.parametrize(
    ("target", "words"), [(RATIO, "12.00x"), (SHARE, "60%"), (PRODUCT, "60%"), (PEAK, "50 MiB")]
)
def test_met(target: Target, words: str) -> None:
    assert verdict(target, result()) == (MET, words)


@pytest.mark.parametrize(
    ("target", "detail", "words"),
    [
        (RATIO, {"peers": [{"name": "compiled", "ratio": 7.5}]}, "7.50x, missed by 25%"),
        (SHARE, {"ours": {"share_of_roofline": 0.3}}, "30%, missed by 40%"),
        (PRODUCT, {"ours": {"flop_per_second": 49.0}}, "49%, missed by 2%"),
        (PEAK, {"ours": {"peak_bytes": 150 * 2**20}}, "150 MiB, missed by 50%"),
        # A peak is to stay below its limit.
        (PEAK, {"ours": {"peak_bytes": 100 * 2**20}}, "100 MiB, missed by 0%"),
    ],
)
def test_missed(target: Target, detail: dict[str, Any], words: str) -> None:
    assert verdict(target, result(**detail)) == (MISSED, words)


@pytest.mark.parametrize(
    ("target", "content", "words"),
    [
        (RATIO, {"runs": [{"details": []}]}, "the case was not measured"),
        (RATIO, result(peers=[]), "compiled: it took no part"),
        (
            RATIO,
            result(peers=[], left_out=[{"name": "compiled", "why_not": "failed: out of memory"}]),
            "compiled: failed: out of memory",
        ),
        (RATIO, result(failed="WrongAnswer: y"), "WrongAnswer: y"),
        (
            SHARE,
            result(ours={"share_of_roofline": None}),
            "the machine's ceilings were not measured",
        ),
        (PEAK, result(ours={"peak_bytes": None}), "its memory was not measured"),
        (
            PRODUCT,
            {"runs": [{**result()["runs"][0], "ceilings": None}]},
            "the machine's product was not measured",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_not_measured(target: Target, content: dict[str, Any], words: str) -> None:
    assert verdict(target, content) == (NOT_MEASURED, words)


def test_the_summary_counts_each_verdict() -> None:
    low = Target(CASE, targets.RATIO, 20.0, "compiled")
    other = Target("pair_moe/pair_base/forward/bfloat16/none", targets.RATIO, 1.0, "compiled")
    found = outcomes([RATIO, SHARE, low, other], result())
    assert targets.summary(found) == "2 met, 1 missed, 1 not measured"
    assert found[0].as_dict() == {
        "target": f"{CASE} vs compiled",
        "wanted": "10.00x",
        "verdict": MET,
        "value": 12.0,
        "words": "12.00x",
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_target_is_of_a_case_and_a_peer_that_exist(device: str) -> None:
    """A misspelt name would never be measured, and never missed."""
    known = {case.name: case for case in cases(device=device)}
    for target in targets_of(device):
        assert target.case in known, target
        if target.peer:
            assert target.peer in {one.name for one in contestants(known[target.case])}, target


def test_the_targets_are_whole() -> None:
    """As many numbers as its two tables have rows, variants and peers."""
    assert targets_of("cpu") == CPU_TARGETS
    assert targets_of("cuda:0") == GPU_TARGETS
    by_operator = [{t.case.split("/")[0] for t in table} for table in (CPU_TARGETS, GPU_TARGETS)]
    assert by_operator == [{"interaction_moe", "pair_moe", "routed_mlp"}] * 2
    assert (len(CPU_TARGETS), len(GPU_TARGETS)) == (19, 13)
