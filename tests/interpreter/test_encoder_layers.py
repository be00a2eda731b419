"""Tests of encoder_layers on Triton: fused and separate steps, and a count of the rows that are computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.encoder.inference import layer_shapes
from tests.support.encoder_cases import LAYERS, layers_arguments
from tests.support.every_operator import check_frozen, layers
from tests.support.inputs import as_dtype, draw, gradients
from tests.support.operator_cases import OPS
from tests.support.triton_interpreter import enlarge_row_tiles, round_to_nearest

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ROWS = 70  # two blocks of rows in every kernel, the second with a ragged edge


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarge_row_tiles(monkeypatch)
    round_to_nearest(monkeypatch)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of one expert with two layers; rates: of the attention, its branch, the MLP and the output. Two
    samples of two segments end at row `covered`, by default the last."""

    form: str
    width: int
    hidden: int
    rates: tuple[float, ...] = (0.25, 0.5, 0.3, 0.5)
    self_residual: bool = False
    rows: int = ROWS
    covered: int | None = None

    def inputs(self) -> list[Tensor]:
        copies = 1 if self.form == "one view" else 2
        shapes = LAYERS * layer_shapes(self.width, self.hidden)
        scales = [shape[1] ** -0.5 if len(shape) > 1 else 1.0 for shape in shapes]
        weights = [
            draw(*s, seed=i, scale=x) for i, (s, x) in enumerate(zip(shapes, scales, strict=True))
        ]
        return [draw(1, copies, self.rows, self.width, seed=90), *weights]

    def run(self, inputs: list[Tensor], backend: str, count: int | None = None) -> list[Tensor]:
        """Latents, and the gradients of all inputs."""
        end = self.rows if self.covered is None else self.covered
        bounds = torch.tensor([0, end // 3, end // 2, end // 2, end], dtype=torch.int32)
        changes: dict[str, Any] = {
            "cu_samples": bounds[::2].contiguous(),
            "cu_segments": bounds,
            "rates": [*self.rates] * LAYERS,
            "heads": 1,
            "self_residual": self.self_residual,
        }
        if self.form == "views":
            modality = torch.arange(self.rows) % 2
            changes |= {"modality": modality.to(torch.int32), "views": 2}
        if count is not None:
            changes["count"] = torch.tensor([count], dtype=torch.int32)
        call = layers_arguments(self.form, max(self.rates), self.width, self.hidden, **changes)
        rows, *weights = leaves = [x.detach().requires_grad_() for x in inputs]
        out = OPS.encoder_layers(rows, *call[1:6], weights, *call[7:], backend)[0]
        return [out.detach(), *gradients([out], leaves)]


# Tiles of 64 and 128 rows, steps of the loops of 16, 32 and 64; widths without fused steps.
CASES = (
    (Case("views", 16, 48), BFLOAT16),
    (Case("one view", 32, 32, (0.0, 0.0, 0.3, 0.0), rows=9), FLOAT16),
    (Case("one view", 128, 64, (0.0, 0.3, 0.0, 0.5), rows=65), BFLOAT16),
    pytest.param(Case("one view", 256, 64, rows=131), FLOAT16, marks=pytest.mark.slow),
    (Case("one view", 64, 192, (0.0, 0.5, 0.5, 0.0), True, 40), BFLOAT16),
    (Case("views", 32, 64), FLOAT32),
    (Case("one view", 16, 16, rows=0), BFLOAT16),
)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_agrees_with_the_cpu(case: Case, dtype: torch.dtype) -> None:
    """With the same masks; the CPU's kernels are compared with the reference by the tests of the layer."""
    inputs = as_dtype(case.inputs(), dtype)
    found, low = (case.run(inputs, backend) for backend in ("triton", "cpu"))
    exact = case.run(as_dtype(inputs, torch.float64), "cpu")
    size = max(float(x.abs().max()) if x.numel() else 0.0 for x in exact[1:])
    for i, triple in enumerate(zip(found, low, exact, strict=True)):
        magnitude = size if i else 0.0
        assert_within_budget(*triple, f"result {i}", magnitude=magnitude, may_vanish=i > 0)
    if case.rows == ROWS:
        other = dataclasses.replace(case, rates=tuple(p / 2 for p in case.rates))
        assert_outside_budget(other.run(inputs, "triton")[0], low[0], exact[0], "another rate")


STEPS = {"fused": (16, 16, BFLOAT16), "separate": (20, 24, FLOAT32)}
each_step = pytest.mark.parametrize("steps", STEPS)


def counted(steps: str, count: int, rate: float = 0.5) -> tuple[Case, list[Tensor]]:
    width, hidden, dtype = STEPS[steps]
    case = Case("views", width, hidden, (rate,) * 4, covered=count)
    return case, as_dtype(case.inputs(), dtype)


def ending(inputs: list[Tensor], count: int, value: float) -> list[Tensor]:
    """The inputs with a value in all rows after the count."""
    rows = inputs[0].clone()
    rows[:, :, count:] = value
    return [rows, *inputs[1:]]


@pytest.mark.parametrize(
    ("steps", "count", "rate"),
    [("fused", 33, 0.5), ("fused", 64, 0.0), ("separate", 0, 0.5), ("separate", 33, 0.5)],
)
def test_only_the_first_rows_are_computed(steps: str, count: int, rate: float) -> None:
    """Results are those of a call in which all rows are computed and the others are 0. The others are not read:
    here they are NaN, as is all new memory; their gradients are 0."""
    case, inputs = counted(steps, count, rate)
    found = case.run(ending(inputs, count, float("nan")), "triton", count)
    want = case.run(ending(inputs, count, 0.0), "triton")
    unit = 4 * torch.finfo(inputs[0].dtype).eps if steps == "fused" else 1e-5
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=unit, atol=unit)
    assert bool((found[1] != 0).any()) == (count > 0)
    assert not found[1][:, :, count:].any()


@each_step
def test_any_value_of_a_count_stays_within_the_rows(steps: str) -> None:
    """Values reach the kernels unchecked, because checking them would wait for the GPU."""
    case, inputs = counted(steps, ROWS)
    results = [case.run(inputs, "triton", x) for x in (2**31 - 1, ROWS)]
    assert all(map(torch.equal, *results))


@each_step
def test_one_row_more_is_read(steps: str) -> None:
    """Control of the tests above: a NaN in the last counted row reaches the results."""
    case, inputs = counted(steps, 33, 0.0)
    found = case.run(ending(inputs, 32, float("nan")), "triton", 33)
    # The gradient of the last bias does not depend on the rows.
    assert all(x.isnan().any() for x in found[:-1])


def test_gradients_of_some_weights_are_those_of_all() -> None:
    """With fused steps; the gradients of all experts are computed together."""
    call = layers("triton", BFLOAT16, width=16, hidden=16)["encoder_layers, one view"]
    count = len(call.inputs)
    check_frozen(call, [[i == j for i in range(count)] for j in (0, 5)])
