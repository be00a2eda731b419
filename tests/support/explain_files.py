"""A checkpoint and a data file for the command `explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.layers import LayerCase

CASE = LayerCase((5, 9), batch=3, dim=8, heads=4, layers=2, classes=4)
EVIL = '<script>alert("x")</script>'
WORDS = [EVIL, "a & b", "plain", "' onload='", "\u4e2d\u6587"]
Arrays = dict[str, Any]


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def write_checkpoint(folder: Path, case: LayerCase = CASE) -> Path:
    torch.manual_seed(1)
    layer = case.reference()
    with torch.no_grad():
        # Larger than initial parameters, so that tokens interact and the target is not a tie.
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    torch.save({"ensemble_model": layer.state_dict()}, folder / "layer.pt")
    return folder / "layer.pt"


def arrays_of(case: LayerCase = CASE) -> Arrays:
    return {f"inputs_{m}": x.numpy() for m, x in enumerate(case.inputs())}


def full_arrays() -> Arrays:
    mask = np.ones((3, 5), dtype=np.uint8)
    mask[1, 3:] = 0
    image = np.linspace(0.0, 1.0, 3 * 12 * 12).reshape(3, 12, 12)
    labels, tokens = np.array([0, 3, 1]), np.array([WORDS] * 3)
    more = {"masks_0": mask, "labels": labels, "tokens_0": tokens, "image_1": image}
    return {**arrays_of(), **more}


def write_data(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"
