"""Encoded samples from an .npz file, checked and never unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flmoe_kernels.core.figures import printable
from flmoe_kernels.core.files import ZIP_HEAD, checked_head
from flmoe_kernels.explain.archive import arrays_of
from flmoe_kernels.explain.figures.heat_map import grey
from flmoe_kernels.explain.games.tokens import rows_of, valid_tokens

Array = NDArray[Any]


class FeatureError(ValueError):
    """The file cannot be used; the message names the file and the array."""


@dataclass(frozen=True, eq=False)
class Features:
    """S samples of M modalities."""

    inputs: list[Tensor]  # M x (S, L_m, D), 0 for padding
    masks: list[Tensor | None] | None  # M x (S, L_m) bool; None if no modality has a mask
    labels: Tensor | None  # (S,) int64, classes; (S, C) bool, positive labels
    tokens: list[Array | None]  # M x (S, L_m) strings
    images: list[Array | None]  # M x (S, H, W) or (S, H, W, 3)
    total: int  # number of samples in the file

    @property
    def samples(self) -> int:
        return len(self.inputs[0])

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.inputs)

    def first(self, count: int) -> Features:
        """Return the first samples only."""
        names = ("inputs", "masks", "tokens", "images")
        parts: dict[str, Any] = {name: rows_of(getattr(self, name), slice(count)) for name in names}
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, labels=labels, **parts)


def load_features(
    path: str | Path, modalities: int, width: int, classes: int, dtype: torch.dtype
) -> Features:
    """Load samples from a file of numpy.savez, see docs/explain.md, for a layer of these sizes.

    Inputs are converted to `dtype`. Raises FeatureError, which names the array, or OSError.
    """
    try:
        return _checked(_read(Path(path)), modalities, width, classes, dtype)
    except FeatureError as error:
        raise FeatureError(f"{path}: {error}") from error


def _checked(
    arrays: Mapping[str, Array], modalities: int, width: int, classes: int, dtype: torch.dtype
) -> Features:
    kinds = ("inputs", "masks", "tokens", "image")
    known = {f"{kind}_{m}" for kind in kinds for m in range(modalities)} | {"labels"}
    for name in arrays:
        if name not in known:
            raise FeatureError(
                f"{printable(name)}: expected inputs_0 .. inputs_{modalities - 1}, masks_*, tokens_*, image_* of "
                "the same, and labels"
            )
    inputs = [_inputs(arrays, m, width).to(dtype) for m in range(modalities)]
    samples, lengths = len(inputs[0]), [x.shape[1] for x in inputs]
    masks = [_flags(arrays, f"masks_{m}", (samples, n)) for m, n in enumerate(lengths)]
    _require_tokens(inputs, masks)
    return Features(
        # Padding may hold any value, and 0 times NaN is NaN.
        inputs=[
            x if mask is None else x.masked_fill(~mask.unsqueeze(2), 0.0)
            for x, mask in zip(inputs, masks, strict=True)
        ],
        masks=None if all(mask is None for mask in masks) else masks,
        labels=_labels(arrays, samples, classes),
        tokens=[_tokens(arrays, f"tokens_{m}", (samples, n)) for m, n in enumerate(lengths)],
        images=[_images(arrays, m, samples, n) for m, n in enumerate(lengths)],
        total=samples,
    )


def _read(path: Path) -> dict[str, Array]:
    problem = "expected an .npz file of plain arrays"
    try:
        head = checked_head(path)
        if head.startswith(np.lib.format.MAGIC_PREFIX):
            raise FeatureError(
                f"{problem}, got a single array; use numpy.savez, which writes names"
            )
        if not head.startswith(ZIP_HEAD):
            raise FeatureError(f"{problem}, got another kind of file")
        return arrays_of(path)
    except zipfile.BadZipFile as error:
        raise FeatureError(f"{problem}, got a damaged file") from error
    except ValueError as error:
        raise FeatureError(str(error)) from error


def _wrong(name: str, expected: str, array: Array) -> FeatureError:
    return FeatureError(f"{name}: expected {expected}, got {array.dtype} {array.shape}")


def _inputs(arrays: Mapping[str, Array], m: int, width: int) -> Tensor:
    name = f"inputs_{m}"
    if name not in arrays:
        raise FeatureError(f"{name}: expected (samples, tokens, {width}), got none")
    array, samples = arrays[name], arrays["inputs_0"].shape[:1]
    fits = array.ndim == 3 and array.shape[2] == width and array.shape[:1] == samples
    if not fits or array.dtype.kind != "f" or not array.size:
        count = samples[0] if m else "samples"
        raise _wrong(name, f"floats ({count}, tokens, {width})", array)
    # torch does not support float128 or other byte orders.
    native = np.float32 if array.dtype.itemsize <= 4 else np.float64
    return torch.from_numpy(array.astype(native))


def _flags(arrays: Mapping[str, Array], name: str, shape: tuple[int, int]) -> Tensor | None:
    array = arrays.get(name)
    if array is None:
        return None
    if array.shape != shape or array.dtype.kind not in "biuf":
        raise _wrong(name, f"bool or 0/1 {shape}", array)
    if not ((array == 0) | (array == 1)).all():
        raise FeatureError(f"{name}: expected 0 and 1 only, got other values")
    return torch.from_numpy(array.astype(np.bool_))


def _labels(arrays: Mapping[str, Array], samples: int, classes: int) -> Tensor | None:
    array = arrays.get("labels")
    if array is None or array.ndim == 2:
        return _flags(arrays, "labels", (samples, classes))
    if array.shape != (samples,) or array.dtype.kind not in "iu":
        raise _wrong("labels", f"integers ({samples},) or 0/1 ({samples}, {classes})", array)
    low, high = array.min(), array.max()
    if low < 0 or high >= classes:
        raise FeatureError(f"labels: expected classes from 0 to {classes - 1}, got {low} to {high}")
    return torch.from_numpy(array.astype(np.int64))


def _tokens(arrays: Mapping[str, Array], name: str, shape: tuple[int, int]) -> Array | None:
    array = arrays.get(name)
    if array is None:
        return None
    if array.shape != shape or array.dtype.kind != "U":
        raise _wrong(name, f"unicode strings {shape}", array)
    try:
        "".join(array.ravel().tolist()).encode()
    except (ValueError, SystemError) as error:  # lone surrogates, numbers that are no characters
        raise FeatureError(f"{name}: expected text, got {printable(str(error))}") from error
    return array


def _images(arrays: Mapping[str, Array], m: int, samples: int, length: int) -> Array | None:
    name = f"image_{m}"
    array = arrays.get(name)
    if array is None:
        return None
    if math.isqrt(length) ** 2 != length:
        raise FeatureError(
            f"{name}: expected a square of patches, got {length} tokens in inputs_{m}"
        )
    if array.ndim not in (3, 4) or len(array) != samples:
        raise _wrong(name, f"({samples}, H, W) or ({samples}, H, W, 3)", array)
    try:
        for image in array:
            grey(image)
    except ValueError as error:
        raise FeatureError(f"{name}: {error}") from error
    return array


def _require_tokens(inputs: list[Tensor], masks: list[Tensor | None]) -> None:
    there = torch.zeros(len(inputs[0]), dtype=torch.bool)
    for m, (x, valid) in enumerate(zip(inputs, valid_tokens(inputs, masks), strict=True)):
        there |= valid.any(dim=1)
        broken = (~x.isfinite().all(dim=2) & valid).any(dim=1)
        if bool(broken.any()):
            sample = int(broken.nonzero()[0])
            raise FeatureError(
                f"inputs_{m}: expected finite valid tokens, got NaN or inf in sample {sample}"
            )
    if not bool(there.all()):
        sample = int((~there).nonzero()[0])
        raise FeatureError(f"masks_*: expected a valid token in sample {sample}, got none")
