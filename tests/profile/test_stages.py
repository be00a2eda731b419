"""Tests of stages and traces, on a CPU and a simulated GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from flmoe_kernels.profile.cases import BOTH, cases
from flmoe_kernels.profile.registry import prepare
from flmoe_kernels.profile.stages import (
    CALL,
    IDLE,
    NAMED_SHARE,
    OTHER,
    Breakdown,
    breakdown,
    traced,
)
from tests.support.profile_shapes import LAYER, PAIR


def named(found: Breakdown) -> dict[str, Any]:
    rows = {stage.name: stage for stage in found.stages}
    assert len(rows) == len(found.stages), "a stage has two rows"
    return rows


def call_of(operator: str, shape: Any, contestant: str) -> Any:
    return prepare(cases([operator], [shape], [BOTH])[0], contestant).call


@pytest.mark.parametrize("contestant", ["cpu", "reference"])
def test_stages_sum_to_the_whole(contestant: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace of a call.json"
    found = traced(call_of("pair_moe", PAIR, contestant), "cpu", calls=2, trace=trace)
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.whole, rel=1e-9)
    assert sum(stage.share for stage in found.stages) == pytest.approx(1.0, rel=1e-9)
    assert all(stage.seconds > 0 for stage in found.stages)
    rows = named(found)
    assert (found.launches, found.waits) == (None, None)
    ours = {name for name in rows if name.startswith("flmoe::")}
    wanted = {"flmoe::pair_moe", "flmoe::pair_moe_backward"}
    assert ours == (wanted if contestant == "cpu" else set())
    for name, row in rows.items():
        if name.startswith("aten::"):
            assert row.share >= NAMED_SHARE
    assert [path.name for path in tmp_path.iterdir()] == [trace.name]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count(CALL) >= 2
    assert ours <= set(names)
    for name in ours:
        assert rows[name].flop > 0
        assert rows[name].bytes > 0


def test_layer_has_a_row_for_every_operator_and_width() -> None:
    call = call_of("interaction_moe", LAYER, "cpu")
    rows = named(traced(call, "cpu", calls=2))
    with FlopCounterMode(display=False) as counter:
        call()
    # Steps of the operator of all layers are counted one by one, torch's counter counts the operator.
    assert sum(row.flop for row in rows.values()) == counter.get_total_flops()
    assert rows["flmoe::encoder_layers"].flop == 0
    rows_of_views = LAYER.fusion_models * LAYER.views * sum(LAYER.valid_tokens)
    mlp = rows["flmoe::expert_mlp"]
    assert mlp.flop == LAYER.layers * 8 * LAYER.dim**2 * rows_of_views
    # Rows in and out, and the hidden rows that the backward reads; then the weights.
    assert mlp.bytes > LAYER.layers * 4 * rows_of_views * 4 * LAYER.dim
    width, layers = LAYER.dim, LAYER.layers
    # q, k, v; the projection; forward and backward.
    for into, out in ((1, 3), (1, 1)):
        widths = f"{into * width} to {out * width}"
        assert rows[f"flmoe::expert_linear {widths}"].calls == layers
        assert rows[f"flmoe::expert_linear_backward {widths}"].calls == layers
    for name in ("expert_attention", "expert_mlp", "expert_mlp_backward"):
        assert rows[f"flmoe::{name}"].calls == layers
    assert rows["flmoe::interaction_losses_backward"].calls == 1
    assert OTHER in rows


@dataclass
class Event:
    """The part of a torch.profiler event that stages read."""

    name: str
    start: float
    end: float
    kernels: list[Any] = field(default_factory=list)
    device: str = "CPU"
    cpu_children: list[Event] = field(default_factory=list)
    cpu_parent: Event | None = None
    input_shapes: list[Any] = field(default_factory=list)

    @property
    def time_range(self) -> Any:
        elapsed = self.end - self.start
        return SimpleNamespace(start=self.start, end=self.end, elapsed_us=lambda: elapsed)

    @property
    def device_type(self) -> str:
        return f"DeviceType.{self.device}"

    @property
    def self_cpu_time_total(self) -> float:
        raise AssertionError("GPU stages must not read the host's time")

    def within(self, parent: Event) -> Event:
        self.cpu_parent = parent
        parent.cpu_children.append(self)
        return self


def kernel(name: str, micros: float) -> Any:
    return SimpleNamespace(name=name, duration=micros)


def gpu_events() -> list[Event]:
    """Two calls of 120 us, each with 50 us of kernels; backward runs in another thread."""
    events = []
    for start in (0.0, 200.0):
        call = Event(CALL, start, start + 120, kernels=[kernel(CALL, 95.0)])
        op = Event("flmoe::pair_moe", start + 1, start + 20).within(call)
        inner = Event("flmoe::pair_moe", start + 2, start + 19, kernels=[kernel("k", 18.0)])
        inner.within(op)
        launch = Event("cuLaunchKernelEx", start + 3, start + 4).within(inner)
        add = Event("aten::add", start + 21, start + 25, kernels=[kernel("add", 10.0)]).within(call)
        launch2 = Event("cudaLaunchKernel", start + 22, start + 23).within(add)
        small = Event("aten::mul", start + 26, start + 28, kernels=[kernel("mul", 2.0)])
        small.within(call)
        sync = Event("cudaStreamSynchronize", start + 30, start + 31).within(call)
        # The event is in another thread, so it has no parent.
        node = Event("autograd::engine::evaluate_function: PairMoe", start + 40, start + 80)
        back = Event("flmoe::pair_moe_backward", start + 41, start + 79, [kernel("b", 20.0)])
        back.within(node)
        launch3 = Event("cudaLaunchKernelExC", start + 42, start + 43).within(back)
        own = Event("cudaDeviceSynchronize", start + 101, start + 119).within(call)
        shown = Event(CALL, start, start + 95, device="CUDA")
        events += [call, op, inner, launch, add, launch2, small, sync, node, back, launch3, own]
        events.append(shown)
    events.append(Event("aten::zeros", 500.0, 600.0, kernels=[kernel("zeros", 99.0)]))
    return events


def test_gpu_time_is_kernels_and_idle_time() -> None:
    found = breakdown(gpu_events(), "cuda:1")
    rows = named(found)
    assert found.whole == pytest.approx(120e-6)
    assert {name: round(row.seconds * 1e6, 6) for name, row in rows.items()} == {
        "flmoe::pair_moe": 18.0,
        "flmoe::pair_moe_backward": 20.0,
        "aten::add": 10.0,
        OTHER: 2.0,  # less than 5% of the total
        IDLE: 70.0,
    }
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)
    # The wait at the end and work outside of the calls are not counted.
    assert (found.launches, found.waits) == (3, 1)
