"""Compiles the row-wise Triton kernels of the encoder ahead of time and prints one JSON report a line.

Run by test_encoder_rows_triton_static, in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from flmoe_kernels.encoder.triton import rows_launch as launches
from flmoe_kernels.triton_runtime import Launch

ARCHITECTURES = (80, 90, 100)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """A call of every operator on rows (experts, views * rows, width)."""

    name: str
    experts: int
    views: int
    rows: int
    segments: int
    width: int
    dtype: torch.dtype
    outputs: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (90,)
    dropout_p: float = 0.5

    def tensor(self, *shape: int) -> Tensor:
        return meta(shape, self.dtype)

    def layer(self, times: int = 1) -> Tensor:
        return self.tensor(self.experts, self.views * self.rows, times * self.width)


# SPEC.md's shapes; widths that are no whole tiles; rows that have a tile alone. No outputs: all of them.
MMIMDB, MIMIC = (4, 3, 32 * 516, 64, 256), (5, 4, 32 * 12, 96, 128)
CASES = (
    StaticCase("mmimdb", *MMIMDB, BFLOAT16, (), ARCHITECTURES),
    StaticCase("mimic", *MIMIC, BFLOAT16, ("norm", "pool, short", "pool_gradient"), ARCHITECTURES),
    StaticCase("mimic, 90", *MIMIC, BFLOAT16, ("norm_gradient", "views", "views_gradient")),
    StaticCase("mmimdb, float32", *MMIMDB, FLOAT32),
    StaticCase("mimic, float32", *MIMIC, FLOAT32, ("norm", "pool, short", "pool_gradient")),
    StaticCase("mmimdb, float16", *MMIMDB, FLOAT16, ("norm_gradient", "gelu"), dropout_p=0.0),
    StaticCase("width 1024", 4, 3, 4096, 64, 1024, BFLOAT16, ("norm", "norm_gradient")),
    StaticCase("width 8192", 4, 3, 1024, 64, 8192, BFLOAT16, ("norm", "norm_gradient")),
    StaticCase("width 300", 4, 3, 4096, 64, 300, BFLOAT16, ("norm_gradient twice", "pool")),
    StaticCase("width 63", 4, 3, 4096, 64, 63, BFLOAT16, ("norm", "gelu", "views")),
)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(case: StaticCase) -> Iterator[tuple[str, str, Launch]]:
    """Every launch of a training step by what it computes, and its kernel's name in the table."""
    x, affine = case.layer(), case.tensor(case.experts, case.width)
    statistics = meta(tuple(x.shape[:2]), FLOAT32)
    dropout = launches.Dropout(meta((), torch.int64), case.dropout_p)
    results = (x, x, statistics, statistics)
    norm = (affine, affine), dropout, 1e-5
    yield "norm alone", "norm", launches.norm_launch(x, None, *norm, (None, *results[1:]))
    yield "norm", "norm", launches.norm_launch(x, x, *norm, results)
    yield "norm twice", "norm", launches.norm_launch(None, x, *norm, results)
    saved = (x, statistics, statistics, affine)
    parts = meta(launches.norm_parts_shape(x), FLOAT32)
    for name, twice, grad in (("norm_gradient", False, x), ("norm_gradient twice", True, None)):
        grads = (grad, x, affine, affine)
        found = launches.norm_gradient_launches((x, x), saved, dropout, twice, grads, parts)
        yield name, "norm_gradient", found[0]
    yield "norm_sum", "norm_sum", found[1]
    hidden = case.layer(2)
    yield "gelu", "gelu", launches.gelu_launch(hidden, dropout, hidden)
    gelu_gradient = launches.gelu_gradient_launch(hidden, hidden, dropout, hidden)
    yield "gelu_gradient", "gelu_gradient", gelu_gradient
    runs = meta((case.segments + 1,), torch.int32)
    pooled = case.tensor(case.experts, case.views, case.segments, case.width)
    kind = launches.pool_class(case.rows, case.segments)
    yield kind, kind, launches.pool_launch(x, x, runs, dropout, pooled)
    pool_gradient = launches.pool_gradient_launch(pooled, runs, dropout, x, x)
    yield "pool_gradient", "pool_gradient", pool_gradient
    modality = meta((case.rows,), torch.int32)
    before = case.tensor(case.experts, 2, case.rows, 3 * case.width)
    after = case.tensor(case.experts, case.views, case.rows, 3 * case.width)
    yield "views", "views", launches.views_launch(before, modality, after)
    views_gradient = launches.views_gradient_launch(after, modality, before)
    yield "views_gradient", "views_gradient", views_gradient


def main() -> None:
    for case in CASES:
        for output, kernel, launch in launches_of(case):
            if case.outputs and output not in case.outputs:
                continue
            expected = launches.tiles_of(kernel, case.dtype).shared
            for architecture, shared in zip(ARCHITECTURES, expected, strict=True):
                if architecture not in case.architectures:
                    continue
                report = dataclasses.asdict(launch.compile(architecture))
                constants = launch.constants
                columns = 4 * constants["PART"] if "PART" in constants else constants["COLUMNS"]
                elements = constants.get("ROWS", 0) * columns // (32 * launch.warps)
                facts = {"case": case.name, "output": output, "kernel": kernel}
                facts |= {"float32": case.dtype == FLOAT32, "views": case.views}
                facts |= {"whole": case.width % 128 == 0}
                # Bytes of an operand that a thread has of a tile.
                facts |= {"bytes": elements * case.dtype.itemsize}
                facts |= {"architecture": architecture, "expected": shared}
                print(json.dumps(facts | report), flush=True)


if __name__ == "__main__":
    main()
