"""Timing: rounds that take turns, ratios that noise does not bend; memory, costs, ceilings, environment."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
import torch
from profiling_shapes import LAYER, PAIR, ROUTED
from torch.utils.flop_counter import FlopCounterMode

from flmoe_kernels.profiling import ceilings, memory
from flmoe_kernels.profiling.cases import BACKWARD, BOTH, FORWARD, Case
from flmoe_kernels.profiling.ceilings import EXPONENTIALS, MATMUL, MEMORY, Ceilings
from flmoe_kernels.profiling.contestants import prepare
from flmoe_kernels.profiling.costs import Cost, cost, layer_cost
from flmoe_kernels.profiling.environment import environment
from flmoe_kernels.profiling.measure import (
    LEAST_ROUNDS,
    Timing,
    interleave,
    paired_ratio,
    timing_of,
)
from flmoe_kernels.profiling.shapes import LayerShape, PairShape

MIB = 2**20


class FakeTime:
    """A clock that moves only when a call says how long it takes; every call is noted."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def call(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.now += seconds()

        return run

    def clock(self, call: Callable[[], None]) -> float:
        start = self.now
        call()
        return self.now - start


def test_calls_take_turns_and_another_one_starts_each_round() -> None:
    time = FakeTime()
    calls = {name: time.call(name, lambda: 1.0) for name in "abc"}
    found = interleave(calls, 4, warmup=1, clock=time.clock)
    assert time.order == "abc" + "abc" + "bca" + "cab" + "abc"
    assert found == {name: [1.0] * 4 for name in "abc"}


@pytest.mark.parametrize(("seconds", "rounds"), [(10.0, 5), (0.1, LEAST_ROUNDS)])
def test_rounds_as_many_as_fit(seconds: float, rounds: int) -> None:
    time = FakeTime()
    calls = {name: time.call(name, lambda: 1.0) for name in "ab"}
    found = interleave(calls, seconds=seconds, warmup=3, clock=time.clock, now=lambda: time.now)
    assert len(found["a"]) == len(found["b"]) == rounds


@pytest.mark.parametrize("arguments", [{}, {"rounds": 3, "seconds": 1.0}])
def test_rounds_or_seconds(arguments: dict) -> None:
    with pytest.raises(ValueError, match="rounds or seconds: expected one of them"):
        interleave({"a": lambda: None}, **arguments)


def test_quantiles_of_seconds() -> None:
    assert timing_of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)
    assert timing_of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_a_ratio_survives_what_meets_both_calls() -> None:
    """A machine that is many times as slow at times, and calls of 10% noise: the ratio is known to 3%."""
    draw = random.Random(0)
    ours, peer = [], []
    for _ in range(200):
        slow = draw.lognormvariate(0.0, 1.0)
        ours.append(slow * draw.lognormvariate(0.0, 0.1))
        peer.append(slow * 2.5 * draw.lognormvariate(0.0, 0.1))
    ratio = paired_ratio(ours, peer)
    assert ratio.low < 2.5 < ratio.high
    assert ratio.high - ratio.low < 0.15
    assert abs(ratio.p50 - 2.5) < 0.075
    shuffled = list(peer)
    draw.shuffle(shuffled)
    unpaired = paired_ratio(ours, shuffled)
    assert unpaired.high - unpaired.low > 3 * (ratio.high - ratio.low), "the control"


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(400):
        ours = [draw.lognormvariate(0.0, 0.3) for _ in range(15)]
        ratio = paired_ratio(ours, [x * draw.lognormvariate(0.0, 0.2) for x in ours])
        held += ratio.low <= 1.0 <= ratio.high
        assert ratio.confidence >= 0.95
    assert held >= 0.93 * 400
    assert paired_ratio([1.0, 1.0], [1.0, 2.0]).confidence == 0.5


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_ratio([1.0], [1.0, 2.0])


def hungry(count: int) -> Callable[[], None]:
    """A call that writes to so many bytes, and gives them back."""
    inputs = bytearray(3 * count)

    def call() -> None:
        bytearray(count)[::4096] = b"x" * -(-count // 4096)
        assert inputs

    return call


@pytest.mark.skipif(bool(memory.memory_lack("cpu")), reason=memory.memory_lack("cpu"))
def test_memory_is_that_of_the_call_and_not_of_its_inputs() -> None:
    grown = memory.peak_growth(hungry, 64 * MIB)
    assert 60 * MIB < grown < 80 * MIB


@pytest.mark.skipif(bool(memory.memory_lack("cpu")), reason=memory.memory_lack("cpu"))
def test_memory_of_the_reference_is_that_of_its_maps() -> None:
    """A process of its own makes the case ready; the maps of 512 x 512 pairs by four experts are 4 MiB each."""
    shape = PairShape("maps", 1, 512, 512, 4, 4)
    case = Case("pair_moe", shape, FORWARD, variant="pool")
    ours, reference = (memory.peak_bytes(case, name) for name in ("cpu", "reference"))
    assert reference > 8 * MIB
    assert ours < reference / 2


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended early"):
        memory.peak_growth(_dies)


def _dies() -> Callable[[], None]:
    raise SystemExit(3)


CEILINGS = Ceilings("cpu", {"float32": 100.0}, bytes_per_second=10.0, exponentials=5.0)


@pytest.mark.parametrize(
    ("work", "seconds", "binds"),
    [
        (Cost(1000, 10, 10), 10.0, MATMUL),
        (Cost(100, 100, 10), 10.0, MEMORY),
        (Cost(100, 10, 100), 20.0, EXPONENTIALS),
    ],
)
def test_the_limit_that_binds(work: Cost, seconds: float, binds: str) -> None:
    assert CEILINGS.roofline_seconds(work, torch.float32) == (seconds, binds)
    with pytest.raises(KeyError, match="bfloat16"):
        CEILINGS.roofline_seconds(work, torch.bfloat16)


def test_ceilings_count_what_they_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([9.0, 9.0] + [2.0, 1.0, 4.0, 2.0, 2.0, 8.0, 1.0] + [9.0, 9.0] + [0.5] * 7)

    def clock(call: Callable[[], object]) -> float:
        call()
        return next(ticks)

    monkeypatch.setattr(ceilings, "clock_of", lambda device: clock)
    assert ceilings.matmul_rate("cpu", torch.float32, side=10) == 2 * 10**3 / 2.0
    assert ceilings.copy_rate("cpu", count=1000) == 2 * 1000 / 0.5
    assert ceilings.exponential_rate("cpu") == 0.0


def counted(case: Case, name: str) -> int:
    call = prepare(case, name).call
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("phase", [FORWARD, BACKWARD, BOTH])
def test_flop_of_routed_mlp_are_what_torch_counts(phase: str) -> None:
    case = Case("routed_mlp", ROUTED, phase, variant="no_bias")
    assert counted(case, "index loop") == cost(case).flop


def test_flop_of_attention_are_what_torch_counts() -> None:
    case = Case("expert_attention", LAYER, FORWARD, variant="plain")
    assert counted(case, "reference") == cost(case).flop
    # Backward torch multiplies four times; a kernel that keeps no probabilities makes them once more.
    both = Case("expert_attention", LAYER, BOTH, variant="plain")
    assert counted(both, "reference") * 14 == cost(both).flop * 12


@pytest.mark.parametrize("phase", [FORWARD, BOTH])
def test_flop_of_the_layer_are_what_torch_counts(phase: str) -> None:
    """Without padding, and without what is shared across views; heads and reweighting are not in the cost."""
    shape = LayerShape("full", 2, (24, 20), (None, None), 64, 2, 2, 3, dropout=0.0)
    case = Case("interaction_moe", shape, phase)
    views = 1 if phase == FORWARD else shape.views
    ours = cost(case).flop
    if phase == BOTH:
        rows = shape.fusion_models * shape.batch * shape.valid_tokens
        saved = 3 * 6 * shape.dim**2 * rows * (views - 2)
        again = 2 * shape.dim * shape.fusion_models * views * shape.batch * shape.valid_tokens**2
        ours += saved - shape.layers * again
    found = counted(case, "reference")
    assert 0.97 * found < ours <= found
    assert layer_cost(shape, views, 4)[0].exponentials > 0


def test_cost_of_pairs_by_hand() -> None:
    """One pair, R 3, V 5: two logits and synergy's product; its mass and y are what else is written."""
    shape = PairShape("one", 1, 1, 1, 3, 5, kinds=("synergy", "unique_a"))
    forward = cost(Case("pair_moe", shape, FORWARD, variant="pool"))
    assert forward.flop == 2 * 2 * 3 + 2 * 5
    assert forward.bytes == 4 * (2 * 2 * (3 + 5) + 2 * 5 + 2)
    assert forward.exponentials == 2
    backward = cost(Case("pair_moe", shape, BACKWARD, variant="pool"))
    assert backward.flop == 6 * 3 * 2 + 4 * 5 + 2 * 5
    both = cost(Case("pair_moe", shape, BOTH, variant="pool"))
    assert both == forward + backward
    half = cost(Case("pair_moe", shape, FORWARD, torch.bfloat16, variant="none"))
    assert half.bytes == 2 * (2 * 2 * (3 + 5) + 2 * 5) + 4 * 2


def test_less_is_needed_where_a_kind_does_not_need_it() -> None:
    none, pool = (cost(Case("pair_moe", PAIR, FORWARD, variant=v)) for v in ("none", "pool"))
    assert pool.flop < none.flop
    assert pool.bytes < none.bytes


def test_environment_is_json_and_names_what_matters() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["device"] == facts["cpu"]
    for name in ("threads", "instruction_set", "flmoe_kernels", "numpy", "python", "commit"):
        assert facts[name], name


def test_the_commit_of_files_without_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    from flmoe_kernels.profiling import environment as module

    monkeypatch.setattr(module, "_output", lambda *command: "")
    monkeypatch.setenv(module.COMMIT_VARIABLE, "abc123")
    assert module.commit() == "abc123"
    monkeypatch.delenv(module.COMMIT_VARIABLE)
    assert module.commit() == "unknown"
