"""Cases of an encoder layer's fused steps: training steps of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.aot.cases import Built, meta, stated
from bench.aot.operators.encoder_rows import RowsUse, of_layer
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.encoder.triton import fused_launch as launches
from flmoe_kernels.ops.encoder.triton import linear_launch
from flmoe_kernels.ops.encoder.triton.rows_launch import Dropout

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
KERNELS: tuple[str, ...] = ("norm_product", "mlp", "mlp_gradient", "product_norm_gradient")
# Kernels of expert_linear with a step of the layer.
PRODUCTS = ("added_product", "added_product twice", "norm_weight_gradient")
EVERY = (*KERNELS, "mlp_gradient twice", *PRODUCTS)

# (use, kernels, quick).
USES: tuple[tuple[RowsUse, tuple[str, ...], bool], ...] = (
    (of_layer("mmimdb", BFLOAT16, counted=True), EVERY, True),
    (of_layer("mmimdb", FLOAT16, 0.0), EVERY, False),
    (of_layer("enrico", BFLOAT16), EVERY, False),
    (of_layer("mimic", BFLOAT16, counted=True), EVERY, False),
    (RowsUse("width 32", BFLOAT16, 4, 3, 4096, 64, 32), KERNELS, False),
)


def built(use: RowsUse, kernel: str, architecture: Architecture) -> Built:
    launch = dict(launches_of(use, architecture))[kernel]
    if kernel in PRODUCTS:
        tiles = linear_launch.TABLE["product", "16 bit"]
        if kernel == "norm_weight_gradient":
            tiles = linear_launch.NORM_TILES.tiles("16 bit", architecture)
        return Built(launch, 2, kernel, stated(tiles.shared, architecture))
    wide = ", wide" if use.width > launches.WIDE else ""
    kernel = kernel.split()[0]
    shared = launches.tiles_of(kernel, use.width, architecture).shared
    steps = launch.constants["WIDTH" if "COLUMNS" in launch.constants else "DEPTH"] // 16
    return Built(launch, steps, kernel + wide, stated(shared, architecture))


def launches_of(use: RowsUse, architecture: Architecture) -> Iterator[tuple[str, Launch]]:
    x, vector = use.layer(), use.tensor(use.experts, use.width)
    hidden, bias = use.layer(2), use.tensor(use.experts, 2 * use.width)
    mean = meta(tuple(x.shape[:2]), FLOAT32)
    w_qkv, w_proj, w_in = (
        use.tensor(use.experts, times * use.width, use.width) for times in (3, 1, 2)
    )
    w_out = use.tensor(use.experts, use.width, 2 * use.width)
    dropout = Dropout(meta((), torch.int64), use.dropout_p)
    affine, saved, rest = (vector, vector), (x, mean, mean, vector), (use.computed(), architecture)
    results = (use.layer(3), mean, mean)
    yield "norm_product", launches.norm_product(x, affine, w_qkv, 1e-5, results, *rest)
    weights, dropouts = (w_in, bias, w_out, vector), (dropout, dropout)
    rows = (x, hidden, mean, mean)
    yield "mlp", launches.mlp(x, affine, weights, dropouts, 1e-5, rows, *rest)

    def parts(kernel: str) -> torch.Tensor:
        blocks = launches.blocks(kernel, x, *rest)
        return meta((use.experts, blocks, 2, use.width), FLOAT32)

    grads: tuple[Any, ...] = (hidden, hidden, x, x, x, parts("mlp_gradient"))
    given = (x, x), (*saved, hidden), (w_in, w_out), dropouts
    yield "mlp_gradient", launches.mlp_gradient(*given, False, grads, *rest)
    grads = (*grads[:3], None, *grads[4:])
    yield "mlp_gradient twice", launches.mlp_gradient(*given, True, grads, *rest)
    name = "product_norm_gradient"
    step = launches.product_norm_gradient(
        (x, use.layer(3)), saved, w_qkv, dropout, (x, x, x, parts(name)), *rest
    )
    yield name, step
    for name, residual in (("added_product", x), ("added_product twice", None)):
        _, found = linear_launch.forward(x, w_proj, vector, rest[0], (residual, dropout))
        yield name, found[0]
    norm = (mean, mean, vector, vector)
    _, found = linear_launch.weight_backward(
        hidden, x, w_in, True, True, *rest[:1], norm, architecture
    )
    yield "norm_weight_gradient", found[0]
