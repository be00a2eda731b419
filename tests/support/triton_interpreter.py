"""Patches for Triton's interpreter: bfloat16 rounding as on a GPU, faster launches, fewer programs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from flmoe_kernels.ops.encoder.triton import rows_launch


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round float32 to the nearest bfloat16 until the test ends.

    The interpreter truncates, which gives a bias: gradients of a whole layer exceed the error budget by up to 30%,
    while with rounding they use two fifths of it. Versions without this function are not changed.
    """
    truncating = getattr(interpreter, "_convert_float", None)

    def convert(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            assert truncating is not None
            return truncating(x, source, target, mode)
        low = torch.tensor(np.asarray(x, dtype=np.float32)).bfloat16()
        return low.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert, raising=False)


def enlarge_row_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use larger tiles than the table's for the encoder's row-wise kernels until the test ends, because the
    interpreter's time grows with the number of programs."""
    for key, tiles in rows_launch.TABLE.items():
        columns = min(4 * tiles.columns, 1024)
        large = dataclasses.replace(tiles, elements=8192, columns=columns)
        monkeypatch.setitem(rows_launch.TABLE, key, large)


@functools.cache
def _languages(function: Any) -> frozenset[int]:
    values = function.__globals__.values()
    return frozenset(id(x) for x in values if x is tl or x is tl.core)


def patch_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch Triton's language once per launch instead of in every function that the kernel calls.

    The repeated patches take a third of the time of small kernels. Versions without this function are not changed.
    """
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    patched: set[int] = set()

    def once(function: Any) -> Any:
        languages = _languages(function)
        if patched and languages <= patched:
            return None
        outermost = not patched
        patched.update(languages)
        scope = patch(function)
        if outermost and scope is not None:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", once)
