"""The named shapes that benchmarks, results and documentation share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One use of the layer. valid: of each modality's tokens, how many are not padding; None = all."""

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

    @property
    def modalities(self) -> int:
        return len(self.tokens)


# The CPU batch of mmimdb and enrico is 4; a GPU takes 32.
MMIMDB = LayerShape("mmimdb", 4, (320, 196), (160, None), 256, 4, 2, 23)
ENRICO = LayerShape("enrico", 4, (196, 196), (None, None), 256, 4, 2, 20)
MIMIC = LayerShape("mimic", 32, (4, 4, 4), (None, None, None), 128, 4, 2, 2)
LAYER_SHAPES = (MMIMDB, ENRICO, MIMIC)
