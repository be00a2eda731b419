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


@dataclass(frozen=True)
class PairShape:
    """One use of pair_moe with the four published kinds of experts."""

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

    def flop(self, kind: str, reduce: str) -> int:
        """Floating-point operations that the kernels' products make; exponentials and sums not counted.

        Per pair: 2 R for each expert's logit, and 2 V for each expert whose message from side b differs
        from row to row: all but unique_a, under "pool" synergy alone. The backward makes both again with
        two gradients of each, and the sum of p c once more for synergy.
        """
        experts = len(self.kinds)
        products = sum(
            kind == "synergy" or (reduce != "pool" and kind not in ("unique_a", "null"))
            for kind in self.kinds
        )
        forward = 2 * self.rank * experts + 2 * self.width * products
        if kind == "forward":
            return forward * self.pairs
        synergy = self.kinds.count("synergy")
        backward = 6 * self.rank * experts + 4 * self.width * products + 2 * self.width * synergy
        return (forward + backward) * self.pairs


PAIR_BASE = PairShape("pair_base", 8, 320, 196)
PAIR_LONG = PairShape("pair_long", 1, 8192, 8192)
