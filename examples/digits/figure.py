"""Figure of one explained pair of images, by this package's explanations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.explain import token_patch_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_pairs(task: str, sample: Mapping[str, Any]) -> Figure:
    """Interaction indices of pairs of patches, and image B with the Shapley values of its patches; no padding."""
    valid_a, valid_b = (np.array(valid) for valid in sample["valid"])
    a, b = sample["digits"]
    return token_patch_map(
        np.where(valid_a[:, None] & valid_b, sample["pairs"], np.nan),
        image=np.array(sample["images"][1]),
        weights=np.where(valid_b, sample["patches"][1], np.nan),
        weights_label=f"B shows {b}: Shapley values",
        title=f"{task}: label {sample['label']}, prediction {sample['guess']}; A shows {a}",
        unit="interaction index (logit), exact",
        row_name="patch of A",
        column_name="patch of B",
    )
