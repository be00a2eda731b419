"""Small shapes at which all contestants take milliseconds."""

from __future__ import annotations

from flmoe_kernels.profile.shapes import LayerShape, PairShape, RoutedShape

PAIR = PairShape("tiny_pair", 2, 13, 7, 4, 6)
LAYER = LayerShape("tiny_layer", 2, (5, 4), (3, None), 16, 2, 2, 3)
RAGGED = LayerShape("tiny_ragged", 3, (9, 4), ((2, 9), None), 16, 2, 2, 3)
SPARSE = LayerShape("tiny_sparse", 2, (5, 4), (3, None), 16, 2, 2, 3, experts=4)
ROUTED = RoutedShape("tiny_routed", 37, 16, 24, 4, 2)
ZIPF = RoutedShape("tiny_zipf", 37, 16, 24, 4, 2, load="zipf")
TINY = (PAIR, LAYER, RAGGED, SPARSE, ROUTED, ZIPF)
