"""Triton kernels are the same for all batch sizes and lengths, by what Triton compiles a launch for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.aot.operators import (
    encoder_fused,
    encoder_rows,
    expert_attention,
    expert_linear,
    interaction_moe,
    routed_mlp,
    routing,
)
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import TARGETS, assume
from flmoe_kernels.ops.encoder.triton.view_rows import ALL, ViewRows
from flmoe_kernels.profile.shapes import RoutedShape

BFLOAT16 = torch.bfloat16
Launches = Iterator[tuple[str, Launch]]


def of_rows(batch: int, width: int, counted: bool = False) -> Launches:
    use = encoder_rows.RowsUse("", BFLOAT16, 4, 3, 24 * batch, 2 * batch, width, 0.5, counted)
    yield from encoder_rows.launches_of(use)


def of_fused(batch: int, width: int) -> Launches:
    """Widths with fused steps are powers of two."""
    width = 1 << (width - 1).bit_length()
    use = encoder_rows.RowsUse("", BFLOAT16, 4, 3, 24 * batch, 2 * batch, width, 0.5, True)
    with assume(TARGETS[90]):
        yield from encoder_fused.launches_of(use).items()


def of_linear(batch: int, width: int, counted: bool = False) -> Launches:
    count = torch.empty(1, dtype=torch.int32, device="meta")
    computed = ViewRows(count, 3) if counted else ALL
    sizes = (4, 3 * 24 * batch, width, 2 * width)
    use = expert_linear.LinearUse("", BFLOAT16, *sizes, computed=computed)
    yield from expert_linear.launches_of(use)


def of_attention(batch: int, width: int) -> Launches:
    runs = (24,) * batch
    use = expert_attention.AttentionUse("", BFLOAT16, 12, 24 * batch + 1, runs, 4, width // 4)
    with assume(TARGETS[90]):
        yield from expert_attention.launches_of(use)


def of_layer(batch: int, width: int) -> Launches:
    use = interaction_moe.LayerUse("", batch, (batch + 8, 24), width, 23, BFLOAT16)
    yield from use.launches().items()


def of_routed(batch: int, width: int) -> Launches:
    shape = RoutedShape("sizes", 301 * batch, width, 2 * width, 4, 2)
    with pytest.MonkeyPatch.context() as patch, assume(TARGETS[90]):
        patch.setattr(routed_mlp, "ODD", (shape,))
        use = routed_mlp.of(shape.name)
        yield from routed_mlp.launches_of(use, use.call())
    yield from routing.launches_of(shape, BFLOAT16)


CALLS: dict[str, Callable[[int, int], Launches]] = {
    "rows": of_rows,
    "rows with a count": lambda *sizes: of_rows(*sizes, counted=True),
    "fused": of_fused,
    "linear": of_linear,
    "linear with a count": lambda *sizes: of_linear(*sizes, counted=True),
    "attention": of_attention,
    "layer": of_layer,
    "routed": of_routed,
}


def compiled_for(launch: Launch) -> Any:
    """What a kernel is compiled for: signature, constants, alignment, warps, stages, registers."""
    specialization = launch._specialization()
    return launch.kernel, specialization, launch.warps, launch.stages, launch.registers


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("width", [256, 100])
def test_batch_sizes_and_lengths_share_kernels(name: str, width: int) -> None:
    """Also rows whose width is no multiple of 16: the strides over experts then are multiples only by chance."""
    found: dict[str, Any] = {}
    for batch in (64, 32, 7, 1):
        for result, launch in CALLS[name](batch, width):
            assert compiled_for(launch) == found.setdefault(result, compiled_for(launch)), result
    assert len(found) >= 3


@pytest.mark.parametrize("name", CALLS)
def test_widths_have_kernels_of_their_own(name: str) -> None:
    """Control of the test above."""
    first, second = (
        {result: compiled_for(launch) for result, launch in CALLS[name](32, width)}
        for width in (256, 128)
    )
    assert any(first[result] != second[result] for result in first)
