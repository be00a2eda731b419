"""The weights of an encoder layer, in the order of flmoe::encoder_inference."""

from __future__ import annotations

LAYER_TENSORS = 12
FIRST_BIAS = 9  # of the MLP; its length is the hidden width


def layer_shapes(width: int, hidden: int) -> list[tuple[int, ...]]:
    """Shapes of norm1 (weight, bias), q, kv, proj (weight, bias), norm2, and the MLP's two linear maps."""
    vector, square = (width,), (width, width)
    attention = [vector, vector, square, (2 * width, width), square, vector]
    return [
        *attention,
        *(vector, vector, (hidden, width), (hidden,), (width, hidden), vector),
    ]
