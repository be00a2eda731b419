"""The speed and memory that this package is held to, and what a result says of each: met, missed, not measured.

The numbers are the package's aims: ratios on two cores of a CPU in float32, and on an H100-class GPU
in bfloat16. A share of the bound is that of the roofline of `costs`, which credits a kernel with the products that
its reduction needs and with no others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RATIO, SHARE_OF_BOUND, SHARE_OF_PRODUCT, PEAK = "ratio", "share of bound", "share of sgemm", "peak"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """One number that the package aims at.

    peer: whom our seconds are compared with, for a ratio; "" otherwise. limit: the least ratio or share, or for a
    peak the most bytes over the inputs.
    """

    case: str
    quantity: str
    limit: float
    peer: str = ""

    @property
    def name(self) -> str:
        against = f" vs {self.peer}" if self.peer else f", {self.quantity}"
        return self.case + against

    @property
    def wanted(self) -> str:
        return (
            f"below {_size(self.limit)}" if self.quantity == PEAK else f"{self._show(self.limit)}"
        )

    def _show(self, value: float) -> str:
        if self.quantity == PEAK:
            return _size(value)
        return f"{value:.2f}x" if self.quantity == RATIO else f"{value:.0%}"


@dataclass(frozen=True)
class Outcome:
    """verdict: MET, MISSED or NOT_MEASURED. value: what was measured, if it was. words: how much, or why not."""

    target: Target
    verdict: str
    value: float | None
    words: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target.name,
            "wanted": self.target.wanted,
            "verdict": self.verdict,
            "value": self.value,
            "words": self.words,
        }


def _ratios(
    operator: str,
    shapes: Iterable[str],
    phase: str,
    dtype: str,
    peers: Mapping[str, float],
    variants: Sequence[str] = ("",),
) -> list[Target]:
    return [
        Target("/".join(filter(None, (operator, shape, phase, dtype, variant))), RATIO, limit, peer)
        for shape, variant, (peer, limit) in itertools.product(shapes, variants, peers.items())
    ]


_BOTH, _FORWARD = "forward+backward", "forward"
_REDUCTIONS = ("none", "pool")
_PAIR_512 = "pair_moe/pair_512/forward/bfloat16"
_SMALL = ("routed_small_e4", "routed_small_e16")

CPU_TARGETS: tuple[Target, ...] = (
    *_ratios(
        *("interaction_moe", ("mmimdb",), _BOTH, "float32"),
        {"reference": 5.0, "reference+sdpa": 4.0, "compiled": 4.0, "compiled+sdpa": 4.0},
    ),
    *_ratios("interaction_moe", ("mmimdb",), _FORWARD, "float32", {"reference": 2.0}),
    *_ratios("pair_moe", ("pair_base",), _FORWARD, "float32", {"compiled": 2.0}, _REDUCTIONS),
    *_ratios("pair_moe", ("pair_base",), _BOTH, "float32", {"compiled": 2.0}, _REDUCTIONS),
    *(
        Target(f"pair_moe/{shape}/forward/float32/{reduce}", SHARE_OF_PRODUCT, 0.5)
        for shape in ("pair_base", "pair_long")
        for reduce in _REDUCTIONS
    ),
    *(
        Target(f"pair_moe/pair_long/forward+backward/float32/{reduce}", PEAK, 256 * 2**20)
        for reduce in _REDUCTIONS
    ),
    *_ratios(
        *("routed_mlp", _SMALL, _BOTH, "float32"),
        {"index loop": 1.5, "one-hot einsum": 1.5},
        ("bias",),
    ),
)
GPU_TARGETS: tuple[Target, ...] = (
    *_ratios(
        *("interaction_moe", ("mmimdb", "enrico"), _BOTH, "bfloat16"),
        {"reference, TF32": 10.0, "compiled+sdpa, autocast": 3.0},
    ),
    *_ratios("interaction_moe", ("mimic",), _BOTH, "bfloat16", {"reference": 10.0}),
    *_ratios("pair_moe", ("pair_512",), _FORWARD, "bfloat16", {"compiled": 10.0}, _REDUCTIONS),
    *(Target(f"{_PAIR_512}/{reduce}", SHARE_OF_BOUND, 0.5) for reduce in _REDUCTIONS),
    *_ratios(
        *("routed_mlp", ("routed_large",), _BOTH, "bfloat16"),
        {"torch._grouped_mm": 1.0, "scattermoe": 1.2},
        ("no_bias",),
    ),
    *_ratios("routed_mlp", _SMALL, _BOTH, "bfloat16", {"batched bmm": 1.5}, ("bias",)),
)


def targets_of(device: str) -> tuple[Target, ...]:
    return CPU_TARGETS if device == "cpu" else GPU_TARGETS


def outcomes(targets: Iterable[Target], result: Mapping[str, Any]) -> list[Outcome]:
    """What a result of `suite.run_suite` says of each target."""
    (run,) = result["runs"]
    details = {detail["case"]: detail for detail in run["details"]}
    return [outcome(target, details.get(target.case), run.get("ceilings")) for target in targets]


def outcome(
    target: Target, detail: Mapping[str, Any] | None, ceilings: Mapping[str, Any] | None
) -> Outcome:
    """Of one target; detail: of its case, None where the case was not measured."""
    if detail is None:
        return Outcome(target, NOT_MEASURED, None, "the case was not measured")
    value, why_not = _value(target, detail, ceilings)
    if value is None:
        return Outcome(target, NOT_MEASURED, None, why_not)
    most = target.quantity == PEAK
    reached = value < target.limit if most else value >= target.limit
    shown = target._show(value)
    if reached:
        return Outcome(target, MET, value, shown)
    gap = value / target.limit - 1 if most else 1 - value / target.limit
    return Outcome(target, MISSED, value, f"{shown}, missed by {gap:.0%}")


def _value(
    target: Target, detail: Mapping[str, Any], ceilings: Mapping[str, Any] | None
) -> tuple[float | None, str]:
    """What was measured, or None and why it was not."""
    if detail.get("failed"):
        return None, detail["failed"]
    ours = detail["contestants"][0]
    if target.quantity == PEAK:
        return ours["peak_bytes"], "its memory was not measured"
    if target.quantity == SHARE_OF_BOUND:
        return ours["share_of_roofline"], "the machine's ceilings were not measured"
    if target.quantity == SHARE_OF_PRODUCT:
        rate = (ceilings or {}).get("flops", {}).get("float32")
        share = ours["flop_per_second"] / rate if rate else None
        return share, "the machine's product was not measured"
    for one in detail["contestants"]:
        if one["name"] == target.peer:
            return one["ratio"], ""
    reasons = {one["name"]: one["why_not"] for one in detail["left_out"]}
    return None, f"{target.peer}: {reasons.get(target.peer, 'it took no part')}"


def summary(found: Sequence[Outcome]) -> str:
    """How many targets are met, missed and not measured, in one line."""
    counts = dict.fromkeys((MET, MISSED, NOT_MEASURED), 0)
    for one in found:
        counts[one.verdict] += 1
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"
