"""Tests of autotuning without kernels: choice, comparison of results, exceptions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.tuning import timing, tuner
from flmoe_kernels.core.triton.tuning.timing import agree
from tests.support.programs import output_of
from tests.support.tuning_trials import (
    BETTER,
    CPU,
    SECONDS,
    TABLE,
    Clock,
    Tiles,
    choose,
    refuse,
    sums,
)


def test_the_fastest_candidate_is_chosen_and_kept() -> None:
    clock = Clock(SECONDS)
    assert choose(clock) == BETTER
    assert set(clock.timed) == set(SECONDS)
    assert choose(refuse, forget=False) == BETTER


@pytest.mark.parametrize("wrong", [1.0, float("nan"), float("inf"), "out of shared memory"])
def test_a_candidate_that_is_wrong_or_does_not_run_is_refused(wrong: float | str) -> None:
    def spoil(tiles: Tiles, out: Tensor) -> None:
        if tiles == BETTER:
            if isinstance(wrong, str):
                raise RuntimeError(wrong)
            out += wrong

    clock = Clock(SECONDS)
    message = f"did not run.*{wrong}" if isinstance(wrong, str) else "gave different results.*32"
    with pytest.warns(tuner.TuningWarning, match=message):
        assert choose(clock, sums(spoil)) == TABLE
    assert BETTER not in clock.timed


def test_a_shared_buffer_is_not_compared() -> None:
    out = torch.zeros(4)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        def run() -> None:
            # BETTER does not write an element that the table's tiles wrote before it.
            out[: 3 if tiles == BETTER else 4] = 1.0

        return tuning.Trial(tiles, CPU, run, [out], lambda: [out])

    clock = Clock(SECONDS)
    with pytest.warns(tuner.TuningWarning, match="gave different results.*32"):
        assert choose(clock, lambda: make) == TABLE
    assert BETTER not in clock.timed


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (BETTER, torch.cuda.OutOfMemoryError("no memory left"), "op.kernel: not tuned: no memory"),
        # Without the table's results, candidates cannot be compared.
        (TABLE, RuntimeError("no"), "did not run"),
    ],
)
def test_the_table_runs_if_trials_cannot(broken: Tiles, error: Exception, message: str) -> None:
    def spoil(tiles: Tiles, _out: Tensor) -> None:
        if tiles == broken:
            raise error

    with pytest.warns(tuner.TuningWarning, match=message):
        assert choose(Clock(SECONDS), sums(spoil)) == TABLE
    # Kept for the process: launches and buffers of other calls already use it.
    assert choose(refuse, forget=False) == TABLE


def test_results_agree_up_to_roundings_of_sums() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = x.to(dtype)
        eps = torch.finfo(dtype).eps
        assert agree([y * (1 + eps)], [y])
        assert not agree([y + 0.1], [y])
        assert not agree([torch.zeros_like(y)], [y])
        assert not agree([y[:1]], [y])
    odd = x.clone()
    odd[0, 0], odd[0, 1] = float("nan"), float("inf")
    assert agree([odd], [odd.clone()])
    assert not agree([x], [odd])
    assert not agree([odd], [x])
    assert not agree([], [x])


def test_a_capture_uses_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "capturing", lambda _device: True)
    prepared: list[int] = []
    assert choose(refuse, lambda: prepared.append(1)) == TABLE
    assert not prepared
    # A choice made during capture is kept, so that captured and other launches use the same tiles.
    monkeypatch.setattr(timing, "capturing", lambda _device: False)
    assert choose(refuse, forget=False) == TABLE


def test_autotune_is_off_by_default_and_nests() -> None:
    assert not tuning.enabled()
    with tuning.autotune():
        assert tuning.enabled()
        with tuning.autotune(False):
            assert not tuning.enabled()
        assert tuning.enabled()
    assert not tuning.enabled()


def test_the_environment_variable_enables_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(tuner.VARIABLE, value)
        assert tuner.enabled_by_environment() == on
    monkeypatch.setenv(tuner.VARIABLE, "yes")
    with pytest.raises(ValueError, match="FLMOE_AUTOTUNE: expected one of 0, 1, got 'yes'"):
        tuner.enabled_by_environment()
    code = "from flmoe_kernels.core.triton import tuning; print(tuning.enabled())"
    assert output_of(code, FLMOE_AUTOTUNE="1") == "True"
