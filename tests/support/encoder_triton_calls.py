"""Small calls of the encoder's operators through Triton, for the case files that run in its interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flmoe_kernels.ops.encoder import op as _op  # noqa: F401  registers the operators
from flmoe_kernels.ops.encoder.triton import rows_launch
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import EPS, OPS

TRITON = "triton"
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def on_triton(name: str) -> Callable[..., Any]:
    operator = getattr(OPS, name)
    return lambda *arguments: operator(*arguments, TRITON)


def norm_arguments(rows: int, width: int, p: float, residual: bool, experts: int = 2) -> list[Any]:
    seed = make_seed() if p else None
    x, update = draw(experts, rows, width, seed=1, scale=2), draw(experts, rows, width, seed=2)
    gain, shift = draw(experts, width, seed=3) + 1, draw(experts, width, seed=4)
    return [x if residual else None, update, gain, shift, seed, p, EPS]


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each operation of each program, however large: tiles a few times the
    table's, which test_other_tiles_give_the_same_numbers compares them with."""
    for key, tiles in list(rows_launch.TABLE.items()):
        columns = min(4 * tiles.columns, 1024)
        large = dataclasses.replace(tiles, elements=8192, columns=columns)
        monkeypatch.setitem(rows_launch.TABLE, key, large)


def operator_calls(dtype: torch.dtype, p: float, rows: int = 5) -> dict[str, list[Any]]:
    """Arguments of every operator with a gradient: one expert, two views, rows of no segment."""
    seed = make_seed() if p else None
    norm = as_dtype(norm_arguments(rows, 70, p, True, 1), dtype)
    plain = as_dtype(norm_arguments(rows, 70, p, False, 1), dtype)
    views = [draw(1, 2 * rows, 70, dtype=dtype, seed=i) for i in (1, 2)]
    runs, modality = cumulative([rows // 2, 1]), (torch.arange(rows) % 2).to(torch.int32)
    return {
        "expert_norm": [norm[0], norm[2], norm[3], EPS],
        "dropout_add_norm": norm,
        "dropout_add_norm without residual": plain,
        "gelu_dropout": [views[0], seed, p],
        "dropout_add_pool": [*views, runs, 2, seed, p],
        "expand_views": [draw(1, 2, rows, 70, dtype=dtype), modality, 3],
        "expert_linear": [views[0], *(draw(1, *s, dtype=dtype, seed=3) for s in ((6, 70), (6,)))],
    }


def backward_calls(p: float) -> list[tuple[str, tuple[Any, ...]]]:
    """Arguments of every backward operator, with each gradient that may be absent or unwanted."""
    seed = make_seed() if p else None
    x, grad = draw(1, 6, 4), draw(1, 6, 4, seed=1)
    gain, stats = draw(1, 4, seed=2), draw(1, 6, seed=3)
    modality = torch.tensor([0, 1, 1], dtype=torch.int32)
    norm = (x, stats, stats, gain, seed, p)
    return [
        *(
            ("dropout_add_norm_backward", (*grads, *norm, own, want))
            for *grads, own, want in (
                (grad, grad, True, True),
                (None, grad, False, True),
                (grad, None, False, False),
                (None, None, True, True),
            )
        ),
        ("gelu_dropout_backward", (grad, x, seed, p)),
        ("dropout_add_pool_backward", (draw(1, 2, 2, 4), cumulative([2, 1]), 2, 6, seed, p)),
        ("dropout_add_pool_backward", (draw(1, 2, 2, 4), cumulative([1, 1]), 2, 6, seed, p)),
        ("expand_views_backward", (draw(1, 3, 3, 4), modality)),
        ("expert_linear_backward", (grad, x, draw(1, 4, 4, seed=4), True, False, True)),
        ("expert_linear_backward", (grad, x, draw(1, 4, 4, seed=4), False, True, False)),
    ]
