"""Work of a case: floating-point operations, bytes and exponentials.

FLOP are those of matrix products, 2 for a multiply-add, on valid tokens and chosen experts only: work of a peer on
padding or on unused experts does not count. Bytes are the inputs and the results, each read or written once, in
the case's dtype (statistics in float32). Repeated reads of a kernel do not count, except those of the algorithm:
a backward that is timed alone reads the forward's inputs again. Exponentials are those of the softmax, which can
limit pair_moe on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from flmoe_kernels.ops.pair_moe.kinds import kind_codes, pair_backward_flops, pair_flops

from .cases import BACKWARD, BOTH, FORWARD, Case
from .shapes import LayerShape, PairShape, RoutedShape

_STATISTIC = 4  # bytes of a float32
_INDEX = 8  # of an int64
_MLP_EXPANSION = 2


@dataclass(frozen=True)
class Cost:
    """Work of a call. exponentials: of the softmax in the forward, and again if the backward recomputes it."""

    flop: int
    bytes: int
    exponentials: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flop + other.flop,
            self.bytes + other.bytes,
            self.exponentials + other.exponentials,
        )


def cost(case: Case) -> Cost:
    """Return the work of one call of a case."""
    shape, size = case.shape, case.dtype.itemsize
    if isinstance(shape, PairShape):
        parts = pair_cost(shape, case.variant, size)
    elif isinstance(shape, RoutedShape):
        parts = (
            routing_cost(shape, size)
            if case.operator == "routing"
            else routed_cost(shape, size, case.variant)
        )
    elif case.operator == "expert_attention":
        parts = attention_cost(shape, shape.views, size)
    else:
        parts = layer_cost(shape, 1 if case.phase == FORWARD else shape.views, size)
    forward, backward = parts
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[case.phase]


def pair_cost(shape: PairShape, reduce: str, size: int) -> tuple[Cost, Cost]:
    """Work of pair_moe, forward and backward.

    FLOP of the products as in pair_flops; one exponential for each pair and expert in each pass.
    """
    codes, varies, experts = kind_codes(shape.kinds), reduce != "pool", len(shape.kinds)
    forward = pair_flops(codes, shape.rank, shape.width, varies)
    backward = pair_backward_flops(codes, shape.rank, shape.width, varies)
    tokens = shape.batch * experts * (shape.rows + shape.columns)
    inputs = tokens * (shape.rank + shape.width) * size
    rows = shape.batch * experts * (1 if reduce == "pool" else shape.rows)
    y = rows * shape.width * (_STATISTIC if reduce == "pool" else size)
    mass = shape.batch * experts * shape.rows * _STATISTIC
    exponentials = shape.pairs * experts
    return (
        Cost(forward * shape.pairs, inputs + y + mass, exponentials),
        # Reads inputs and the gradient of y, writes gradients of the inputs.
        Cost(backward * shape.pairs, 2 * inputs + y, exponentials),
    )


def attention_cost(shape: LayerShape, views: int, size: int) -> tuple[Cost, Cost]:
    """Work of expert_attention on the valid tokens of one fusion layer, for all experts, `views` and samples.

    Forward 4 d FLOP for each query, key and head; backward 10 d: scores again, and the gradients of
    probabilities, v, q and k. Forward reads q, k, v and writes out and one log-sum-exp for each row and head;
    backward reads those and the gradient of out, and writes three gradients.
    """
    passes = shape.fusion_models * views
    scores = passes * sum(n**2 for n in shape.valid_tokens)
    rows = passes * sum(shape.valid_tokens)
    tensor = rows * shape.dim * size
    statistics = rows * shape.heads * _STATISTIC
    exponentials = scores * shape.heads
    return (
        Cost(4 * shape.dim * scores, 4 * tensor + statistics, exponentials),
        Cost(10 * shape.dim * scores, 8 * tensor + statistics, exponentials),
    )


def routed_cost(shape: RoutedShape, size: int, variant: str) -> tuple[Cost, Cost]:
    """Work of routed_mlp: 4 D F FLOP for each routed row in the forward, 8 D F in the backward; gated 6 and 12.

    Bytes: x, the weights of all experts, the tokens' choices and weights, and out. The forward also writes and
    reads the hidden rows (for gated experts also the gate's) once (the last product is a kernel of its own in
    every backend); the backward reads them, and writes and reads their gradient once.
    """
    rows, gates = shape.routed_rows, int(variant == "swiglu")
    tokens = shape.tokens * shape.width * size
    weights = (2 + gates) * shape.experts * shape.width * shape.hidden * size
    weights += shape.experts * (shape.width + shape.hidden) * size if variant == "bias" else 0
    choices = rows * (size + _INDEX)
    hidden = rows * shape.hidden * size
    product = 2 * (2 + gates) * rows * shape.width * shape.hidden
    return (
        Cost(product, 2 * tokens + weights + choices + (2 + 2 * gates) * hidden),
        # Reads x, the gradient of out, weights and hidden rows; writes gradients of x, weights and choices.
        Cost(2 * product, 3 * tokens + 2 * weights + 2 * choices + 3 * (1 + gates) * hidden),
    )


def routing_cost(shape: RoutedShape, size: int) -> tuple[Cost, Cost]:
    """Work of gate and dispatch: reads logits; writes index, weight, counts, offsets, permutation. No products.

    The backward reads the gradient of weight, index and logits, and writes the gradient of logits.
    """
    logits = shape.tokens * shape.experts * size
    index, weight = shape.routed_rows * _INDEX, shape.routed_rows * size
    permutation = 4 * (shape.routed_rows + 2 * shape.experts + 1)
    return (
        Cost(0, logits + index + weight + permutation, shape.routed_rows),
        Cost(0, 2 * logits + index + weight),
    )


def layer_cost(shape: LayerShape, views: int, size: int) -> tuple[Cost, Cost]:
    """Work of interaction_moe: the fusion Transformers of all experts and `views`, on valid tokens.

    For each row, a layer takes 8 D^2 FLOP in q, k, v and the projection, 8 D^2 in its MLP (expansion 2; with
    routed experts this for each of two choices), plus its attention. In the first layer, the queries, keys and
    values of tokens that a view does not replace equal those of the full view and are computed once. In training
    this product therefore has two sets of rows: the tokens and their noise. Inference without routed experts takes
    the last MLP's second product once for each sample and modality, because only means enter the heads. The
    backward takes twice the products. Bytes are a lower bound: for every layer the weights and the rows that enter
    and leave it, in the backward also their gradients; rows between kernels are not counted.
    """
    tokens = shape.fusion_models * sum(shape.valid_tokens)
    rows = tokens * views
    first = tokens * min(views, 2)
    square = shape.dim**2
    choices = 2 if shape.experts else 1
    sparse_layers = (shape.layers + 1) // 2 if shape.experts else 0
    dense_layers = shape.layers - sparse_layers
    flop = 6 * square * (first + (shape.layers - 1) * rows) + 2 * square * shape.layers * rows
    flop += 4 * _MLP_EXPANSION * square * rows * (dense_layers + choices * sparse_layers)
    mlp = 2 * _MLP_EXPANSION * square
    if views == 1 and not shape.experts:
        segments = shape.fusion_models * shape.batch * shape.modalities
        flop -= mlp * (tokens - segments)
    parameters = shape.layers * 4 * square + mlp * (
        dense_layers + sparse_layers * max(shape.experts, 1)
    )
    weights = shape.fusion_models * parameters * size
    stream = 2 * shape.layers * rows * shape.dim * size
    attention, attention_backward = attention_cost(shape, views, size)
    forward = Cost(
        flop + shape.layers * attention.flop,
        weights + stream,
        shape.layers * attention.exponentials,
    )
    backward = Cost(
        2 * flop + shape.layers * attention_backward.flop,
        2 * weights + 2 * stream,
        shape.layers * attention.exponentials,
    )
    return forward, backward
