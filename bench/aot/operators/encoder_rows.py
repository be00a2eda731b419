"""Cases of the encoder's row-wise kernels: training steps and odd widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.aot.cases import Built, meta, stated
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.encoder.triton import rows_launch as launches
from flmoe_kernels.ops.encoder.triton.view_rows import ALL, ViewRows
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

    def computed(self) -> ViewRows:
        return ViewRows(meta((1,), torch.int32), self.views) if self.counted else ALL

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
    row, launch = {name: (row, launch) for name, row, launch in launches_of(use)}[kernel]
    kind = ", float32" if use.dtype == FLOAT32 else ""
    shared = launches.tiles_of(row, use.dtype).shared
    # The table covers the named shapes only: a kernel with one row per tile takes more shared memory.
    table = None if use.shape.startswith("width") else stated(shared, architecture)
    return Built(launch, tiles=f"{row}{kind}", table=table)


def launches_of(use: RowsUse) -> Iterator[tuple[str, str, Launch]]:
    """Launches of a training step as (result, row of the launch table, launch)."""
    x, affine = use.layer(), use.tensor(use.experts, use.width)
    statistics = meta(tuple(x.shape[:2]), FLOAT32)
    dropout = launches.Dropout(meta((), torch.int64), use.dropout_p)
    results, computed = (x, x, statistics, statistics), use.computed()
    norm = (affine, affine), dropout, 1e-5
    alone = launches.norm_launch(x, None, *norm, (None, *results[1:]), computed)
    yield "norm alone", "norm", alone
    yield "norm", "norm", launches.norm_launch(x, x, *norm, results, computed)
    yield "norm twice", "norm", launches.norm_launch(None, x, *norm, results, computed)
    saved = (x, statistics, statistics, affine)
    parts = meta(launches.norm_parts_shape(x, computed), FLOAT32)
    for name, twice, grad in (("norm_gradient", False, x), ("norm_gradient twice", True, None)):
        grads = (grad, x, affine, affine)
        rest = (twice, grads, parts, computed)
        gradients = launches.norm_gradient_launches((x, x), saved, dropout, *rest)
        yield name, "norm_gradient", gradients[0]
    yield "norm_sum", "norm_sum", gradients[1]
    wide = use.layer(2)
    yield "gelu", "gelu", launches.gelu_launch(wide, dropout, wide, computed)
    gradient = launches.gelu_gradient_launch(wide, wide, dropout, wide, computed)
    yield "gelu_gradient", "gelu_gradient", gradient
    runs = meta((use.segments + 1,), torch.int32)
    pooled = use.tensor(use.experts, use.views, use.segments, use.width)
    size = launches.pool_class(use.rows, use.segments)
    yield "pool", size, launches.pool_launch(x, x, runs, dropout, pooled)
    none = launches.Dropout(None, 0.0)
    yield "pool alone", size, launches.pool_launch(x, None, runs, none, pooled)
    yield (
        "pool_gradient",
        "pool_gradient",
        launches.pool_gradient_launch(pooled, runs, dropout, x, x),
    )
    modality = meta((use.rows,), torch.int32)
    before, after = (
        use.tensor(use.experts, copies, use.rows, 3 * use.width) for copies in (2, use.views)
    )
    yield "views", "views", launches.views_launch(before, modality, after, computed.count)
    gradient = launches.views_gradient_launch(after, modality, before, computed.count)
    yield "views_gradient", "views_gradient", gradient
