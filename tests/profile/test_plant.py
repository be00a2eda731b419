"""The slowdown that the gate's own tests plant: in the kernel named, as large as asked for, off by default."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from flmoe_kernels.core.backend import CAPABILITIES, native
from flmoe_kernels.profile.contestants import prepare
from flmoe_kernels.profile.floors import Floor
from flmoe_kernels.profile.gate import find_case, judge, measure_case
from flmoe_kernels.profile.paired import Paired, clock_for, measure_blocks
from flmoe_kernels.profile.plant import KERNELS, plant

if not hasattr(native(), "plant_slowdown"):
    pytest.skip("the native module has no plant_slowdown", allow_module_level=True)

CASE = "pair_moe/pair_base/forward/float32/pool"


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """The native module; afterwards nothing is planted."""
    yield native()
    for kernel in native().plantable_kernels():
        native().plant_slowdown(kernel, 0.0)


def slowdown_of(case_name: str, what: str) -> Paired:
    """How much longer a call takes with something planted, calls in turn."""
    case = find_case(case_name, "cpu")
    torch.set_num_threads(1)
    call = prepare(case, "cpu").call
    name = what.rpartition(":")[0]

    def planted() -> None:
        plant(what)
        try:
            call()
        finally:
            plant(f"{name}:0")

    return measure_blocks(
        lambda: {"plain": call, "planted": planted},
        clock_for("cpu", 1),
        rounds=30,
        precision=0.05,
        seconds=2.0,
    ).pair("plain", "planted")


def test_the_named_kernel_takes_longer(module: ModuleType) -> None:
    found = slowdown_of(CASE, "pair_moe:1.0")
    assert 1.6 < found.ratio < 2.2


def test_others_do_not(module: ModuleType) -> None:
    found = slowdown_of(CASE, "routed_mlp:3.0")
    assert 0.8 < found.ratio < 1.25


def test_results_stay_the_same(module: ModuleType) -> None:
    case = find_case(CASE, "cpu")
    before = prepare(case, "cpu").outputs()
    plant("pair_moe:0.5")
    after = prepare(case, "cpu").outputs()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_gate_catches_it(module: ModuleType) -> None:
    """Expected is what was just measured; then the kernel gets slower."""
    case = find_case(CASE, "cpu")
    from flmoe_kernels.profile.gate import _contestant

    chosen = [_contestant(case, name) for name in ("cpu", "reference")]

    def measure(floor: Floor, bound: float = 0.0) -> Paired:
        return measure_case(case, chosen, threads=1, rounds=30, precision=0.02, seconds=2.0).pair(
            "cpu", "reference"
        )

    floor = Floor(CASE, "reference", 1.0)
    expected = measure(floor).ratio
    assert judge(floor, expected, "here", measure, measure).passed
    plant("pair_moe:0.6")
    assert not judge(floor, expected, "here", measure, measure).passed
    plant("pair_moe:0")
    assert judge(floor, expected, "here", measure, measure).passed


def test_every_operator_of_the_cpu_has_its_kernels(module: ModuleType) -> None:
    known = set(module.plantable_kernels())
    assert set(KERNELS) == {op for op, backends in CAPABILITIES.items() if "cpu" in backends}
    assert set().union(*KERNELS.values()) <= known
    # Each name is that of a binding, so that a renamed kernel is noticed.
    assert all(hasattr(module, name) for name in known)
    missing = [
        name
        for name in dir(module)
        if name.endswith(("_forward", "_backward")) and name not in known
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nobody:0.3", "expected NAME:SHARE with NAME one of"),
        ("pair_moe", "expected NAME:SHARE"),
        ("pair_moe:much", "expected a number after the colon, got 'much'"),
        ("pair_moe:-1", "share: expected 0 to 100"),
        ("pair_moe:nan", "share: expected 0 to 100"),
    ],
)
def test_what_cannot_be_planted(module: ModuleType, what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plant(what)
