"""Tests of stages and traces, on a CPU and a simulated GPU."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flmoe_kernels.profile.cases import cases
from flmoe_kernels.profile.registry import prepare
from flmoe_kernels.profile.shapes import LayerShape, PairShape
from flmoe_kernels.profile.stages import (
    BACKWARD,
    CALL,
    FORWARD,
    IDLE,
    NAMED_SHARE,
    OTHER,
    WAIT,
    Breakdown,
    _without_messages,
    breakdown,
    traced,
)

LAYER = LayerShape("tiny", 2, (5, 4), (3, None), 16, 2, 2, 3)
PAIRS = PairShape("tiny", 2, 9, 7, rank=4, width=8)


def named(found: Breakdown) -> dict[tuple[str, str], Any]:
    rows = {(stage.name, stage.phase): stage for stage in found.stages}
    assert len(rows) == len(found.stages), "a stage has two rows"
    return rows


def call_of(operator: str, shape: Any, contestant: str, phase: str = "forward+backward") -> Any:
    return prepare(cases([operator], [shape], [phase])[0], contestant).call


@pytest.mark.parametrize("phase", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("contestant", ["cpu", "reference"])
def test_stages_sum_to_the_whole(contestant: str, phase: str) -> None:
    found = traced(call_of("pair_moe", PAIRS, contestant, phase), "cpu", calls=2)
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.whole, rel=1e-9)
    assert sum(stage.share for stage in found.stages) == pytest.approx(1.0, rel=1e-9)
    assert all(stage.seconds >= 0 for stage in found.stages)
    rows = named(found)
    assert (found.launches, found.waits) == (None, None)
    if contestant == "cpu":
        assert (("flmoe::pair_moe", FORWARD) in rows) == (phase != "backward")
        assert (("flmoe::pair_moe_backward", BACKWARD) in rows) == (phase != "forward")
        assert found.operators == (2 if phase == "forward+backward" else 1)
    else:
        assert found.operators == 0
        assert found.torch_operators > 3
        assert not any(name.startswith("flmoe::") for name, _ in rows)
    for name, _ in rows:
        if name.startswith("aten::"):
            assert rows[name, _].share >= NAMED_SHARE


def test_layer_has_a_row_for_every_operator_and_width() -> None:
    found = traced(call_of("interaction_moe", LAYER, "cpu"), "cpu", calls=2)
    rows = named(found)
    # q, k, v; the projection; both maps of the MLP; in two layers, forward and backward.
    for widths in ("16 to 48", "16 to 16", "16 to 32", "32 to 16"):
        assert rows[f"flmoe::expert_linear {widths}", FORWARD].calls == 2
        assert rows[f"flmoe::expert_linear_backward {widths}", BACKWARD].calls == 2
    assert rows["flmoe::expert_attention_packed", FORWARD].calls == 2
    assert rows["flmoe::interaction_losses_backward", BACKWARD].calls == 1
    assert (OTHER, FORWARD) in rows
    assert (OTHER, BACKWARD) in rows
    ours = sum(row.calls for (name, _), row in rows.items() if name.startswith("flmoe::"))
    assert found.operators == ours


def test_a_stage_that_took_no_time_has_no_row() -> None:
    """pair_moe calls no other operator of torch."""
    found = traced(call_of("pair_moe", PAIRS, "cpu"), "cpu", calls=2)
    assert not any(stage.name == OTHER for stage in found.stages)
    assert all(stage.seconds > 0 for stage in found.stages)


def test_the_profiler_s_library_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        os.write(2, b"USDT:2026-01-31 10:20:30 the call's own line\n")

    traced(call, "cpu", calls=1, warmup=0)
    assert capfd.readouterr().err == "USDT:2026-01-31 10:20:30 the call's own line\n"
    with _without_messages():
        os.write(
            2, b"USDT:2026-01-31 10:20:30 1:1 x.cpp:52] profiler_start\nWARNING:2026-01-31 no\n"
        )
    assert capfd.readouterr().err == "WARNING:2026-01-31 no\n"


def test_values_read_by_python_are_counted() -> None:
    x = torch.ones(3)
    found = traced(lambda: [x.sum().item(), float(x[0])], "cpu", calls=2)
    assert found.reads == 2


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
        return SimpleNamespace(start=self.start, end=self.end)

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
    """Two calls of 100 us, each with 20 us of waiting and 50 us of kernels; backward runs in another thread."""
    events = []
    for start in (0.0, 200.0):
        call = Event(CALL, start, start + 100, kernels=[kernel(CALL, 95.0)])
        op = Event("flmoe::pair_moe", start + 1, start + 20).within(call)
        inner = Event("flmoe::pair_moe", start + 2, start + 19, kernels=[kernel("k", 18.0)])
        inner.within(op)
        launch = Event("cuLaunchKernelEx", start + 3, start + 4).within(inner)
        add = Event("aten::add", start + 21, start + 25, kernels=[kernel("add", 10.0)]).within(call)
        launch2 = Event("cudaLaunchKernel", start + 22, start + 23).within(add)
        small = Event("aten::mul", start + 26, start + 28, kernels=[kernel("mul", 2.0)]).within(
            call
        )
        sync = Event("cudaStreamSynchronize", start + 30, start + 31).within(call)
        # The event is in another thread, so it has no parent.
        node = Event("autograd::engine::evaluate_function: PairMoe", start + 40, start + 80)
        back = Event(
            "flmoe::pair_moe_backward", start + 41, start + 79, kernels=[kernel("b", 20.0)]
        )
        back.within(node)
        launch3 = Event("cudaLaunchKernelExC", start + 42, start + 43).within(back)
        wait = Event(WAIT, start + 100, start + 120)
        own = Event("cudaDeviceSynchronize", start + 101, start + 119).within(wait)
        copy = Event("Memcpy DtoH (Device -> Pageable)", start + 110, start + 111, device="CUDA")
        shown = Event(CALL, start, start + 95, device="CUDA")
        events += [call, op, inner, launch, add, launch2, small, sync, node, back, launch3]
        events += [wait, own, copy, shown]
    events.append(Event("aten::zeros", 500.0, 600.0, kernels=[kernel("zeros", 99.0)]))
    return events


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_gpu_time_is_kernels_and_idle_time(device: str) -> None:
    found = breakdown(gpu_events(), device)
    rows = named(found)
    assert found.whole == pytest.approx(120e-6)
    micros = {key: round(row.seconds * 1e6, 6) for key, row in rows.items()}
    assert micros == {
        ("flmoe::pair_moe", FORWARD): 18.0,
        ("flmoe::pair_moe_backward", BACKWARD): 20.0,
        ("aten::add", FORWARD): 10.0,
        # Less than 5% of the total.
        (OTHER, FORWARD): 2.0,
        (IDLE, ""): 70.0,
    }
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)
    # The profiler's own wait and work outside of the calls are not counted.
    assert (found.launches, found.waits, found.reads) == (3, 1, 1)
    assert (found.operators, found.torch_operators) == (2, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_launches_waits_and_reads_of_a_call_on_a_gpu() -> None:
    x = torch.ones(512, 512, device="cuda")
    found = traced(lambda: (x @ x).sum().item(), "cuda", calls=2)
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.whole)
    assert found.launches is not None
    assert found.launches >= 2
    assert (found.waits, found.reads) == (1, 1)
    assert any(stage.name.startswith("aten::") or stage.name == OTHER for stage in found.stages)


def test_trace_is_json_with_every_call(tmp_path: Path) -> None:
    target = tmp_path / "trace of a call.json"
    traced(call_of("pair_moe", PAIRS, "cpu"), "cpu", calls=2, trace=target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    held = json.loads(target.read_text())
    names = [event.get("name") for event in held["traceEvents"]]
    assert names.count(CALL) >= 2
    assert "flmoe::pair_moe_backward" in names
