"""The named shapes that benchmarks, the profiler, results and documentation share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One use of the layer. valid: of each modality's tokens, how many are not padding; None = all.

    experts: of the routed MLPs (GShard, 2 for a token) of sparse fusion models; 0 = dense.
    """

    name: str
    batch: int
    tokens: tuple[int, ...]
    valid: tuple[int | None, ...]
    dim: int
    heads: int
    layers: int
    classes: int
    dropout: float = 0.5
    temperature: float = 2.0
    experts: int = 0

    @property
    def modalities(self) -> int:
        return len(self.tokens)

    @property
    def fusion_models(self) -> int:
        """One per interaction expert: uniqueness of each modality, synergy, redundancy."""
        return self.modalities + 2

    @property
    def views(self) -> int:
        """Of a training step: the full input, and one without each modality."""
        return self.modalities + 1

    @property
    def valid_tokens(self) -> int:
        """Of one sample."""
        return sum(
            length if valid is None else valid
            for length, valid in zip(self.tokens, self.valid, strict=True)
        )


@dataclass(frozen=True)
class PairShape:
    """One use of pair_moe with the four published kinds of experts: rows x columns pairs in each sample."""

    name: str
    batch: int
    rows: int
    columns: int
    rank: int = 32
    width: int = 64
    kinds: tuple[str, ...] = ("unique_a", "unique_b", "synergy", "redundancy")

    @property
    def pairs(self) -> int:
        return self.batch * self.rows * self.columns


@dataclass(frozen=True)
class RoutedShape:
    """One use of routing and routed_mlp: tokens that go to `choices` of the experts each."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int

    @property
    def routed_rows(self) -> int:
        return self.tokens * self.choices


Shape = LayerShape | PairShape | RoutedShape

MMIMDB = LayerShape("mmimdb", 4, (320, 196), (160, None), 256, 4, 2, 23)
ENRICO = LayerShape("enrico", 4, (196, 196), (None, None), 256, 4, 2, 20)
MIMIC = LayerShape("mimic", 32, (4, 4, 4), (None, None, None), 128, 4, 2, 2)
# Half the lengths, one sample: a training step of the reference in under a second, for the quick gate.
MMIMDB_SHORT = LayerShape("mmimdb_short", 1, (160, 98), (80, None), 256, 4, 2, 23)
MMIMDB_SPARSE = dataclasses.replace(MMIMDB, name="mmimdb_sparse", experts=16)
PAIR_BASE = PairShape("pair_base", 8, 320, 196)
PAIR_512 = PairShape("pair_512", 64, 512, 512)
PAIR_LONG = PairShape("pair_long", 1, 8192, 8192)
ROUTED_SMALL_E4 = RoutedShape("routed_small_e4", 16512, 256, 512, 4, 2)
ROUTED_SMALL_E16 = RoutedShape("routed_small_e16", 16512, 256, 512, 16, 2)
# An eighth of the tokens, for the quick gate.
ROUTED_SHORT = RoutedShape("routed_short", 2064, 256, 512, 4, 2)
ROUTED_LARGE = RoutedShape("routed_large", 16384, 2048, 1024, 64, 8)

LAYER_SHAPES = (MMIMDB, ENRICO, MIMIC, MMIMDB_SHORT, MMIMDB_SPARSE)
PAIR_SHAPES = (PAIR_BASE, PAIR_512, PAIR_LONG)
ROUTED_SMALL = (ROUTED_SMALL_E4, ROUTED_SMALL_E16)
ROUTED_SHAPES = (*ROUTED_SMALL, ROUTED_SHORT, ROUTED_LARGE)
# Of a size for a GPU: a CPU takes minutes for one call.
GPU_ONLY = ("pair_512", "routed_large")
# Samples that a GPU takes at a time; a CPU takes those of the shape.
GPU_BATCH = 32


def on_device(shape: Shape, device: str) -> Shape:
    """The shape with the batch of that kind of device; its name stays."""
    if isinstance(shape, LayerShape) and is_cuda(device):
        return dataclasses.replace(shape, batch=GPU_BATCH)
    return shape


def at_length(shape: Shape, length: int) -> Shape:
    """The shape at another sequence length: rows and columns of pairs, tokens of every modality (the same share of
    them padded), rows of a routed MLP."""
    name = f"{shape.name}@{length}"
    if isinstance(shape, PairShape):
        return dataclasses.replace(shape, name=name, rows=length, columns=length)
    if isinstance(shape, LayerShape):
        valid = tuple(
            None if count is None else max(1, length * count // tokens)
            for count, tokens in zip(shape.valid, shape.tokens, strict=True)
        )
        return dataclasses.replace(
            shape, name=name, tokens=(length,) * shape.modalities, valid=valid
        )
    return dataclasses.replace(shape, name=name, tokens=length)


def named_shapes(device: str = "cpu") -> dict[str, Shape]:
    """Every named shape that this kind of device can time, as it times it."""
    every: tuple[Shape, ...] = (*LAYER_SHAPES, *PAIR_SHAPES, *ROUTED_SHAPES)
    return {
        shape.name: on_device(shape, device)
        for shape in every
        if is_cuda(device) or shape.name not in GPU_ONLY
    }


def by_name(name: str, device: str = "cpu") -> Shape:
    """A named shape as this kind of device times it.

    Raises:
        ValueError: there is none of this name for this device; names those that there are.
    """
    shapes = named_shapes(device)
    if name not in shapes:
        raise ValueError(f"shape: expected one of {', '.join(shapes)} on {device}, got {name!r}")
    return shapes[name]


def is_cuda(device: str) -> bool:
    return device.split(":")[0] == "cuda"
