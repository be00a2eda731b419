"""Slowdowns planted in the native kernels, so that the gate's own tests have a regression to catch.

Nothing else calls this. `plant("pair_moe:0.3")` lets every CPU kernel of pair_moe take 30% longer, in this
process, until `plant("pair_moe:0")`.
"""

from __future__ import annotations

from flmoe_kernels.core.backend import native

_ENCODER = tuple(
    f"{kernel}_{way}"
    for kernel in ("linear", "norm", "gelu", "pool", "views", "loss")
    for way in ("forward", "backward")
)
_ATTENTION = ("attention_forward", "attention_backward")

KERNELS: dict[str, tuple[str, ...]] = {
    "expert_attention": _ATTENTION,
    "interaction_moe": (*_ENCODER, *_ATTENTION),
    "pair_moe": ("pair_forward", "pair_backward"),
    "routed_mlp": ("routed_forward", "routed_backward"),
    "routing": ("routing_gate",),
}


def plant(what: str) -> None:
    """Plant "NAME:SHARE": NAME is an operator, or one kernel by the name of its native binding.

    Raises:
        ValueError: no such name, no number, or a native module without the switch.
    """
    name, colon, share = what.rpartition(":")
    switch = getattr(native(), "plant_slowdown", None)
    if switch is None:
        raise ValueError("plant: this native module was built without plant_slowdown")
    known = native().plantable_kernels()
    kernels = KERNELS.get(name, (name,))
    if not colon or not set(kernels) <= set(known):
        names = ", ".join([*KERNELS, *known])
        raise ValueError(f"plant: expected NAME:SHARE with NAME one of {names}, got {what!r}")
    try:
        amount = float(share)
    except ValueError:
        raise ValueError(f"plant: expected a number after the colon, got {share!r}") from None
    for kernel in kernels:
        switch(kernel, amount)
