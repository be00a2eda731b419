"""Cases of the encoder's row-wise kernels: training steps and odd widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.aot.cases import Built, meta, stated
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.encoder.triton import rows
from flmoe_kernels.ops.encoder.triton.rows_launch import pool_class, tiles_of
from flmoe_kernels.profile.shapes import LayerShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
NORMS = ("norm alone", "norm", "norm twice", "norm_gradient", "norm_gradient twice", "norm_sum")
POOLS = ("pool", "pool alone", "pool_gradient")
KERNELS = (*NORMS, "gelu", "gelu_gradient", *POOLS, "views", "views_gradient")
# Kernels that differ if the number of valid rows is on the GPU.
COUNTED = tuple(k for k in KERNELS if k not in ("norm_sum", *POOLS))


@dataclass(frozen=True)
class RowsUse:
    """Rows (experts, views * rows, width); `segments` runs of rows in each view."""

    shape: str
    dtype: torch.dtype
    experts: int
    views: int
    rows: int
    segments: int
    width: int
    dropout_p: float = 0.5
    counted: bool = False

    @property
    def variant(self) -> str:
        return "count" if self.counted else "" if self.dropout_p else "no dropout"

    @property
    def limits(self) -> dict[str, Any]:
        return {"count": meta((1,), torch.int32), "views": self.views} if self.counted else {}

    def tensor(self, *shape: int) -> Tensor:
        return meta(shape, self.dtype)

    def layer(self, times: int = 1) -> Tensor:
        return self.tensor(self.experts, self.views * self.rows, times * self.width)


def of_layer(
    name: str, dtype: torch.dtype, dropout_p: float = 0.5, *, counted: bool = False
) -> RowsUse:
    s = by_name(name, "cuda")
    assert isinstance(s, LayerShape)
    rows, segments = s.batch * sum(s.padded_tokens), s.batch * s.modalities
    sizes = (s.fusion_models, s.views, rows, segments, s.dim)
    return RowsUse(name, dtype, *sizes, dropout_p, counted)


def odd(width: int, rows: int = 4096) -> RowsUse:
    return RowsUse(f"width {width}", BFLOAT16, 4, 3, rows, 64, width)


# (use, kernels, quick).
USES: tuple[tuple[RowsUse, tuple[str, ...], bool], ...] = (
    (of_layer("mmimdb", BFLOAT16), KERNELS, True),
    (of_layer("mmimdb", BFLOAT16, counted=True), COUNTED, False),
    (of_layer("mmimdb", FLOAT32, counted=True), COUNTED, False),
    (of_layer("enrico", BFLOAT16), KERNELS, False),
    (of_layer("mimic", BFLOAT16), ("norm", "norm_gradient", "gelu", "views"), False),
    (of_layer("mimic", BFLOAT16), ("pool", "pool_gradient", "views_gradient"), False),
    (of_layer("decor_mimic", BFLOAT16), ("pool",), False),
    (of_layer("tokens_24", BFLOAT16), ("views", "views_gradient"), False),
    (of_layer("mmimdb", FLOAT32), KERNELS, False),
    (of_layer("mimic", FLOAT32), ("norm", "pool", "pool_gradient"), False),
    (of_layer("mmimdb", FLOAT16, 0.0), ("norm_gradient", "gelu"), False),
    (odd(1024), ("norm", "norm_gradient"), False),
    (odd(8192, 1024), ("norm", "norm_gradient"), False),
    (odd(300), ("norm_gradient twice", "pool"), False),
    (odd(63), ("norm", "gelu", "views"), True),
)


def built(use: RowsUse, kernel: str, architecture: Architecture) -> Built:
    row = kernel.split()[0]
    row = pool_class(use.rows, use.segments) if row == "pool" else row
    kind = ", float32" if use.dtype == FLOAT32 else ""
    # The table covers the named shapes only: a kernel with one row per tile takes more shared memory.
    named = not use.shape.startswith("width")
    table = stated(tiles_of(row, use.dtype).shared, architecture) if named else None
    return Built(dict(launches_of(use))[kernel], tiles=f"{row}{kind}", table=table)


def launches_of(use: RowsUse) -> Iterator[tuple[str, Launch]]:
    """Launches of a training step as (result, launch)."""
    x, wide, vector = use.layer(), use.layer(2), use.tensor(use.experts, use.width)
    drop, counted, every = (meta((), torch.int64), use.dropout_p), use.limits, [True] * 4
    mean = rstd = meta(tuple(x.shape[:2]), FLOAT32)
    modality, runs = meta((use.rows,), torch.int32), meta((use.segments + 1,), torch.int32)
    pooled = use.tensor(use.experts, use.views, use.segments, use.width)
    before, after = (
        use.tensor(use.experts, copies, use.rows, 3 * use.width) for copies in (2, use.views)
    )
    names: list[str] = []
    with record() as found:
        names += ["norm alone", "norm", "norm twice"]
        for residual, update in ((x, None), (x, x), (None, x)):
            rows.norm(residual, update, vector, vector, *drop, 1e-5, **counted)
        names += ["norm_gradient", "norm_sum", "norm_gradient twice", "norm_sum"]
        for twice in (False, True):
            rows.norm_backward(x, x, x, mean, rstd, vector, *drop, twice, every, **counted)
        names += ["gelu", "gelu_gradient", "pool", "pool alone", "pool_gradient"]
        rows.gelu(wide, *drop, **counted)
        rows.gelu_backward(wide, wide, *drop, **counted)
        rows.pool(x, x, runs, use.views, *drop)
        rows.pool(x, None, runs, use.views, None, 0.0)
        rows.pool_backward(pooled, runs, use.views, x.shape[1], *drop, every[:2])
        names += ["views", "views_gradient"]
        rows.views_of(before, modality, use.views, counted.get("count"))
        rows.views_backward(after, modality, counted.get("count"))
    yield from zip(names, found, strict=True)
