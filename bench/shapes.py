"""The named shapes that benchmarks, results and documentation share."""

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


# The CPU batch of mmimdb and enrico is 4; a GPU takes 32.
MMIMDB = LayerShape("mmimdb", 4, (320, 196), (160, None), 256, 4, 2, 23)
ENRICO = LayerShape("enrico", 4, (196, 196), (None, None), 256, 4, 2, 20)
MIMIC = LayerShape("mimic", 32, (4, 4, 4), (None, None, None), 128, 4, 2, 2)
MMIMDB_SPARSE = dataclasses.replace(MMIMDB, name="mmimdb_sparse", experts=16)
LAYER_SHAPES = (MMIMDB, ENRICO, MIMIC, MMIMDB_SPARSE)


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

    def flop(self, phase: str, reduce: str) -> int:
        """Floating-point operations that the kernels' products make; exponentials and sums not counted.

        Per pair, forward: 2 R for each expert's logit, and 2 V for each expert whose message from side b differs
        from row to row: neither unique_a nor null, and under "pool" synergy alone. Backward: the logit again and
        its two gradients, 6 R; of the message the product with the gradient of y and the gradient of c, 4 V;
        and for synergy the sum of p c again, 2 V.
        """
        experts = len(self.kinds)
        products = sum(
            kind == "synergy" or (reduce != "pool" and kind not in ("unique_a", "null"))
            for kind in self.kinds
        )
        forward = 2 * self.rank * experts + 2 * self.width * products
        if phase == "forward":
            return forward * self.pairs
        synergy = self.kinds.count("synergy")
        backward = 6 * self.rank * experts + 4 * self.width * products + 2 * self.width * synergy
        return (forward + backward) * self.pairs


PAIR_BASE = PairShape("pair_base", 8, 320, 196)
PAIR_LONG = PairShape("pair_long", 1, 8192, 8192)


@dataclass(frozen=True)
class RoutedShape:
    """One use of routed_mlp: tokens that go to `choices` of the experts each."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int

    def flop(self) -> int:
        """Of the products, forward and backward."""
        return 12 * self.tokens * self.choices * self.width * self.hidden


ROUTED_SMALL = (
    RoutedShape("routed_small E4", 16512, 256, 512, 4, 2),
    RoutedShape("routed_small E16", 16512, 256, 512, 16, 2),
)
