"""Cases of an encoder layer's fused steps: training steps of the layer."""

from __future__ import annotations

import torch

from bench.aot.cases import Built, meta, stated
from bench.aot.operators.encoder_rows import RowsUse, of_layer
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.encoder.triton import fused, linear_launch
from flmoe_kernels.ops.encoder.triton.fused_launch import WIDE, tiles_of
from flmoe_kernels.ops.encoder.triton.linear_kernels import product_kernel, weight_gradient_kernel

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
KERNELS: tuple[str, ...] = ("norm_product", "mlp", "mlp_gradient", "product_norm_gradient")
# Kernels of expert_linear with a step of the layer.
PRODUCTS = ("added_product", "added_product twice", "norm_weight_gradient")
EVERY = (*KERNELS, "mlp_gradient twice", *PRODUCTS)
NAMES = {
    **{getattr(fused, f"{name}_kernel"): name for name in KERNELS},
    product_kernel: "added_product",
    weight_gradient_kernel: "norm_weight_gradient",
}

# (use, kernels, quick).
USES: tuple[tuple[RowsUse, tuple[str, ...], bool], ...] = (
    (of_layer("mmimdb", BFLOAT16, counted=True), EVERY, True),
    (of_layer("mmimdb", FLOAT16, 0.0), EVERY, False),
    (of_layer("enrico", BFLOAT16), EVERY, False),
    (of_layer("mimic", BFLOAT16, counted=True), EVERY, False),
    (RowsUse("width 32", BFLOAT16, 4, 3, 4096, 64, 32), KERNELS, False),
)


def built(use: RowsUse, kernel: str, architecture: Architecture) -> Built:
    launch = launches_of(use)[kernel]
    if kernel in PRODUCTS:
        tiles = linear_launch.TABLE["product", "16 bit"]
        if kernel == "norm_weight_gradient":
            tiles = linear_launch.NORM_TILES.tiles("16 bit", architecture)
        return Built(launch, 2, kernel, stated(tiles.shared, architecture))
    wide = ", wide" if use.width > WIDE else ""
    kernel = kernel.split()[0]
    shared = tiles_of(kernel, use.width, architecture).shared
    steps = launch.constants["WIDTH" if "COLUMNS" in launch.constants else "DEPTH"] // 16
    return Built(launch, steps, kernel + wide, stated(shared, architecture))


def launches_of(use: RowsUse) -> dict[str, Launch]:
    """Launches of a training step by result; the first of each."""
    x, hidden, statistics = (
        use.layer(),
        use.layer(2),
        meta((use.experts, use.layer().shape[1]), FLOAT32),
    )
    vector, bias = (use.tensor(use.experts, times * use.width) for times in (1, 2))
    w_proj, w_in, w_qkv = (
        use.tensor(use.experts, times * use.width, use.width) for times in (1, 2, 3)
    )
    w_out = use.tensor(use.experts, use.width, 2 * use.width)
    drop, norm, limits = (meta((), torch.int64), use.dropout_p), (vector, vector), use.limits
    saved, every = (x, statistics, statistics), [True] * 8
    with record() as found:
        fused.norm_linear(x, *norm, w_qkv, 1e-5, **limits)
        fused.norm_mlp(x, norm, (w_in, bias, w_out, vector), drop, drop, 1e-5, True, **limits)
        for twice in (False, True):
            weights = (w_in, w_out, drop, drop, twice, every)
            fused.norm_mlp_backward(x, x, (*saved, hidden), norm, *weights, **limits)
        fused.norm_linear_backward(x, use.layer(3), saved, norm, w_qkv, drop, every[:5], **limits)
        for residual in (x, None):
            fused.add_linear(residual, x, w_proj, vector, *drop, **limits)
    launches: dict[str, Launch] = {}
    for launch in found:
        name = NAMES.get(launch.kernel, "")
        name += " twice" if launch.constants.get("TWICE") else ""
        if name and (name != "norm_weight_gradient" or launch.arguments["mean"] is not None):
            launches.setdefault(name, launch)
    return launches
