"""pair_moe against torch.compile of the reference and the machine's own sgemm, interleaved, with gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure import gate_ratio, interleave, peak_growth
from bench.pairs import (
    COMPILED,
    FAST,
    REFERENCE,
    SGEMM_FLOP,
    contestant,
    make_call,
    make_inputs,
    sgemm,
)
from bench.shapes import PAIR_BASE, PAIR_LONG

# (pass, reduce) -> the ratio to torch.compile of the reference below which this gate fails: 60 to 76% of what
# bench/results/pair_moe.json holds, since a runner's second core may be taken away for a while.
FLOORS = {
    ("forward", "none"): 1.6,
    ("forward", "pool"): 1.6,
    ("forward+backward", "none"): 1.4,
    ("forward+backward", "pool"): 1.6,
}
ROUNDS = 15
SGEMM_SHARE = 0.5
LONG_BYTES = 256 * 2**20


@pytest.mark.parametrize(("kind", "reduce"), list(FLOORS))
def test_pair_base(benchmark: Any, kind: str, reduce: str) -> None:
    fast, peer = (make_call(PAIR_BASE, name, kind, reduce) for name in (FAST, COMPILED))
    peer()  # compiles
    gate_ratio(
        benchmark,
        fast,
        peer,
        floor=FLOORS[kind, reduce],
        rounds=ROUNDS,
        what=f"pair_moe {kind} ({reduce}) at pair_base",
        peer_name=f"{COMPILED} reference",
        flop=PAIR_BASE.flop(kind, reduce),
    )


def test_share_of_sgemm() -> None:
    """The forward makes its products at half the rate of a large matrix product, or more."""
    fast, peer = make_call(PAIR_BASE, FAST, "forward", "none"), sgemm()
    timings = interleave({"fast": fast, "sgemm": peer}, 15, warmup=3)
    rate = PAIR_BASE.flop("forward", "none") / timings["fast"].p50
    share = rate / (SGEMM_FLOP / timings["sgemm"].p50)
    assert share >= SGEMM_SHARE, f"pair_moe forward at pair_base: {share:.0%} of the sgemm rate"


def test_memory_of_pair_long() -> None:
    """8192 x 8192 pairs forward and backward: far less than one map of them, 256 MiB."""
    grown = peak_growth(make_call, PAIR_LONG, FAST, "forward+backward", "none")
    assert grown < LONG_BYTES, f"pair_long grew by {grown / 2**20:.0f} MiB"


@pytest.mark.parametrize("reduce", ["none", "pool"])
def test_same_answers(reduce: str) -> None:
    """What is timed computes the same."""
    results = []
    for name in (FAST, REFERENCE, COMPILED):
        inputs = make_inputs(PAIR_BASE)
        y = contestant(name, PAIR_BASE, reduce)(*inputs).y
        y.backward(torch.ones_like(y))
        results.append([y.detach(), *(x.grad for x in inputs)])
    for fast, *others in zip(*results, strict=True):
        for other in others:
            size = float(other.abs().max())
            torch.testing.assert_close(fast, other, rtol=1e-4, atol=1e-5 * size)
            assert not torch.allclose(torch.zeros_like(other), other, rtol=1e-4, atol=1e-5 * size)
