"""Named shapes of benchmarks, profiler, results and documentation."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, Literal

# Valid tokens of a modality, see LayerShape.
Valid = int | tuple[int, int] | None


@dataclass(frozen=True)
class LayerShape:
    """A shape of the layer.

    Attributes:
        tokens: of each modality, with padding; where lengths are drawn, the largest possible number.
        valid: tokens of each modality that are not padding. None: all. A number: as many in every sample. A pair
            (least, most): drawn for every sample, and padded to the longest sample of the batch.
        experts: of the routed MLPs (GShard, 2 per token) in sparse fusion models; 0 = dense.
    """

    name: str
    batch: int
    tokens: tuple[int, ...]
    valid: tuple[Valid, ...]
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
        """Number of interaction experts: uniqueness of each modality, synergy, redundancy."""
        return self.modalities + 2

    @property
    def views(self) -> int:
        """Number of views in a training step: the full input, and the input without each modality."""
        return self.modalities + 1

    @property
    def ragged(self) -> bool:
        """Whether samples have different numbers of tokens."""
        return any(isinstance(valid, tuple) for valid in self.valid)

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Valid tokens of each modality and sample. A smaller batch has the same first samples."""
        return tuple(
            self._lengths_of(modality, *sizes)
            for modality, sizes in enumerate(zip(self.tokens, self.valid, strict=True))
        )

    def _lengths_of(self, modality: int, tokens: int, valid: Valid) -> tuple[int, ...]:
        if isinstance(valid, tuple):
            generator = random.Random(modality)
            return tuple(generator.randint(*valid) for _ in range(self.batch))
        return (tokens if valid is None else valid,) * self.batch

    @property
    def padded_tokens(self) -> tuple[int, ...]:
        """Tokens of each modality in this batch, with padding."""
        return tuple(
            max(lengths) if isinstance(valid, tuple) else tokens
            for tokens, valid, lengths in zip(self.tokens, self.valid, self.lengths, strict=True)
        )

    @property
    def valid_tokens(self) -> tuple[int, ...]:
        """Valid tokens of each sample, all modalities together."""
        return tuple(map(sum, zip(*self.lengths, strict=True)))


@dataclass(frozen=True)
class UserShape(LayerShape):
    """A user's layer: path of its checkpoint, settings of `published.convert.load_layer`, saved dtype."""

    path: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class PairShape:
    """A shape of pair_moe with the four published kinds of experts: rows x columns pairs in each sample."""

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
    """A shape of routing and routed_mlp: every token goes to `choices` of the experts.

    load: distribution of the choices, see `operators.draws.draw_logits`.
    """

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int
    load: Literal["uniform", "zipf"] = "uniform"

    @property
    def routed_rows(self) -> int:
        return self.tokens * self.choices


Shape = LayerShape | PairShape | RoutedShape

MMIMDB = LayerShape("mmimdb", 4, (320, 196), (160, None), 256, 4, 2, 23)
ENRICO = LayerShape("enrico", 4, (196, 196), (None, None), 256, 4, 2, 20)
MIMIC = LayerShape("mimic", 32, (4, 4, 4), (None, None, None), 128, 4, 2, 2)
# MIMIC-IV in the code of arXiv 2606.29613: laboratory features, notes, diagnosis codes, with a token for each
# feature. The processed data determines the numbers of features and is not published; 32 is an assumption.
DECOR_MIMIC = LayerShape(
    "decor_mimic", 4, (32, 256, 32), (None, (1, 256), None), 128, 4, 2, 2, temperature=1.0
)
# Tweets and image patches. The number of classes, 2 for hate or not, is an assumption.
MMHS150K = LayerShape("mmhs150k", 4, (60, 196), ((5, 60), None), 256, 4, 2, 2)
TOKENS_24 = LayerShape("tokens_24", 128, (24, 24), (None, None), 128, 4, 2, 2)
# Half the lengths, one sample: a training step of the reference in under a second, for the quick regression check.
MMIMDB_SHORT = LayerShape("mmimdb_short", 1, (160, 98), (80, None), 256, 4, 2, 23)
MMIMDB_SPARSE = dataclasses.replace(MMIMDB, name="mmimdb_sparse", experts=16)
PAIR_BASE = PairShape("pair_base", 8, 320, 196)
PAIR_512 = PairShape("pair_512", 64, 512, 512)
PAIR_LONG = PairShape("pair_long", 1, 8192, 8192)
ROUTED_SMALL_E4 = RoutedShape("routed_small_e4", 16512, 256, 512, 4, 2)
ROUTED_SMALL_E16 = RoutedShape("routed_small_e16", 16512, 256, 512, 16, 2)
# An eighth of the tokens, for the quick regression check.
ROUTED_SHORT = RoutedShape("routed_short", 2064, 256, 512, 4, 2)
ROUTED_LARGE = RoutedShape("routed_large", 16384, 2048, 1024, 64, 8)
ROUTED_ZIPF = tuple(
    dataclasses.replace(shape, name=f"{shape.name}_zipf", load="zipf")
    for shape in (ROUTED_SMALL_E4, ROUTED_SMALL_E16, ROUTED_LARGE)
)

LAYER_SHAPES = (
    *(MMIMDB, ENRICO, MIMIC, DECOR_MIMIC, MMHS150K, TOKENS_24),
    *(MMIMDB_SHORT, MMIMDB_SPARSE),
)
PAIR_SHAPES = (PAIR_BASE, PAIR_512, PAIR_LONG)
ROUTED_SHAPES = (ROUTED_SMALL_E4, ROUTED_SMALL_E16, ROUTED_SHORT, ROUTED_LARGE, *ROUTED_ZIPF)
# Sizes for a GPU: a CPU takes minutes for a call.
GPU_ONLY = ("pair_512", "routed_large", "routed_large_zipf")
# Smallest batch size on a GPU; on a CPU it is the batch of the shape.
GPU_BATCH = 32
_FEW = 8


def on_device(shape: Shape, device: str) -> Shape:
    """Return the shape with the batch size of that kind of device and the same name."""
    if isinstance(shape, LayerShape) and is_cuda(device):
        return dataclasses.replace(shape, batch=max(shape.batch, GPU_BATCH))
    return shape


def small(shape: Shape) -> Shape:
    """Return the shape with few tokens, or rows and columns of pairs. A user's layer may have a fixed number of
    tokens, so only its batch becomes 1."""
    if isinstance(shape, UserShape):
        return dataclasses.replace(shape, batch=1)
    name = f"{shape.name}, small"
    if isinstance(shape, PairShape):
        return dataclasses.replace(shape, name=name, rows=_FEW, columns=_FEW)
    if isinstance(shape, LayerShape):
        valid = tuple(None if count is None else _FEW // 2 for count in shape.valid)
        return dataclasses.replace(shape, name=name, tokens=(_FEW,) * shape.modalities, valid=valid)
    return dataclasses.replace(shape, name=name, tokens=_FEW)


def named_shapes(device: str = "cpu") -> dict[str, Shape]:
    """Return every named shape that this kind of device can time, with its batch size."""
    every: tuple[Shape, ...] = (*LAYER_SHAPES, *PAIR_SHAPES, *ROUTED_SHAPES)
    return {
        shape.name: on_device(shape, device)
        for shape in every
        if is_cuda(device) or shape.name not in GPU_ONLY
    }


def by_name(name: str, device: str = "cpu") -> Shape:
    """Return a named shape with the batch size of this kind of device.

    Raises:
        ValueError: no such shape for this device; the message lists the names.
    """
    shapes = named_shapes(device)
    if name not in shapes:
        raise ValueError(f"shape: expected one of {', '.join(shapes)} on {device}, got {name!r}")
    return shapes[name]


def is_cuda(device: str) -> bool:
    return device.split(":")[0] == "cuda"
