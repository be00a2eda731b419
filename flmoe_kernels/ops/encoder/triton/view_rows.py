"""Valid rows of each view, counted on the GPU.

Rows are (E, views * n, D). The number of valid rows of a view is known only on the GPU, because the host does not
wait for it; they come first in every view. Grids depend on n: programs of the other rows return at once or store
zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flmoe_kernels.core.operands import expect


@dataclass(frozen=True)
class ViewRows:
    """count: one int32, the number of valid rows of each view; None: all rows, as a single view."""

    count: Tensor | None = None
    views: int = 1

    def arguments(self, rows: int) -> dict[str, Any]:
        """Arguments of a kernel for `rows` rows of an expert."""
        return {"count": self.count, "rows": rows // self.views, "views": self.views}


ALL = ViewRows()


def view_rows(count: Tensor | None, views: int, rows: int, device: torch.device) -> ViewRows:
    """The rows of each view; raises ValueError unless `rows` rows of an expert are those of `views` views."""
    if count is None:
        return ALL
    if views < 1 or rows % views:
        raise ValueError(f"views: expected a divisor of {rows} rows, got {views}")
    expect("count", count.reshape(-1), (1,), torch.int32, device)
    return ViewRows(count, views)


@triton.jit
def valid_rows(count, rows):  # type: ignore[no-untyped-def]
    """Number of valid rows of a view, clamped to the existing rows for any value of count."""
    end = rows
    if count is not None:
        end = tl.minimum(tl.maximum(tl.load(count), 0), rows)
    return end
