"""Figure of one explained pair of images, by this package's explanations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.explain import token_patch_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_pairs(task: str, sample: Mapping[str, Any]) -> Figure:
    """Interaction indices of pairs of patches, and image B with the Shapley values of its patches."""
    a, b = sample["digits"]
    return token_patch_map(
        np.array(sample["pairs"]),
        image=np.array(sample["images"][1]),
        weights=np.array(sample["patches"][1]),
        weights_label=f"B shows {b}: Shapley values",
        title=f"{task}: label {sample['label']}, prediction {sample['guess']}; A shows {a}",
        unit="interaction index (logit), exact",
        row_name="patch of A",
        column_name="patch of B",
    )
