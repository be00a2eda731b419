"""Copies of modules with sparse MLPs, as the checks of `swap` run them."""

from __future__ import annotations

from torch import nn

from flmoe_kernels.layers.routed_mlp.structure import UnsupportedMLP

FASTMOE = "fmoe"


def check_can_run(layer: nn.Module) -> None:
    """FastMoE's kernels take any address for one of the GPU's, so that an error is the end of the process.

    Raises:
        UnsupportedMLP: parts of FastMoE's own code, anywhere but on a CUDA device.
    """
    if next(layer.parameters()).is_cuda:
        return
    for name, part in layer.named_modules():
        if type(part).__module__.split(".")[0] == FASTMOE:
            raise UnsupportedMLP(
                f"{name}: FastMoE's own code runs on a CUDA device only, so nothing can be compared here; move "
                "the model there before the swap, or pass check=False"
            )


def lift_capacity(module: nn.Module) -> None:
    """Let no expert of a copy turn a row away: the published code does not drop the same rows twice."""
    for part in module.modules():
        experts = getattr(part, "tot_expert", None)
        if experts is None:
            continue
        for name, value in (("capacity", (float(experts),) * 2), ("random_routing", False)):
            if name in vars(part):
                setattr(part, name, value)
