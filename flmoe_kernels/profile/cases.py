"""Cases to time: operator, shape, phase, dtype and device."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from flmoe_kernels.core.dtypes import FLOATS, dtype_name

from .shapes import LayerShape, PairShape, RoutedShape, Shape, by_name, is_cuda, named_shapes

FORWARD, BACKWARD, BOTH = PHASES = ("forward", "backward", "forward+backward")
DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


class BadRequest(ValueError):
    """The request has an unknown name or cannot run here; the message has the known names or the reason."""


@dataclass(frozen=True)
class Operator:
    """An operator. shapes: class of its shapes. variants: options of a call besides its shape; "" for none."""

    name: str
    shapes: type[LayerShape] | type[PairShape] | type[RoutedShape]
    variants: tuple[str, ...] = ("",)


# Variants. pair_moe: reduction of y. expert_attention: with or without the shape's dropout. routed_mlp: with or
# without biases; "swiglu" is gated and has none. interaction_moe: forward is inference (the full view),
# forward+backward a training step.
EXPERT_ATTENTION = Operator("expert_attention", LayerShape, ("dropout", "plain"))
INTERACTION_MOE = Operator("interaction_moe", LayerShape)
OPERATORS = {
    "pair_moe": Operator("pair_moe", PairShape, ("none", "pool")),
    "expert_attention": EXPERT_ATTENTION,
    "routed_mlp": Operator("routed_mlp", RoutedShape, ("bias", "no_bias", "swiglu")),
    "routing": Operator("routing", RoutedShape),
    "interaction_moe": INTERACTION_MOE,
}


@dataclass(frozen=True)
class Case:
    """A case to time; hashable, and equal in other processes.

    device: "cpu", "cuda" or "cuda:N". variant: a variant of the operator.
    """

    operator: str
    shape: Shape
    phase: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    variant: str = ""

    def __post_init__(self) -> None:
        operator = _operator(self.operator)
        if not isinstance(self.shape, operator.shapes):
            raise ValueError(
                f"shape: {self.operator} expected a {operator.shapes.__name__}, got {self.shape!r}"
            )
        known("phase", self.phase, PHASES)
        known("variant", self.variant, operator.variants)

    @property
    def name(self) -> str:
        """Name such as pair_moe/pair_base/forward+backward/float32/pool; the same on every device."""
        parts = (self.operator, self.shape.name, self.phase, dtype_name(self.dtype), self.variant)
        return "/".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.name


def cases(
    operators: Sequence[str] | None = None,
    shapes: Sequence[str | Shape] | None = None,
    phases: Sequence[str] | None = None,
    dtypes: Sequence[str | torch.dtype] | None = None,
    device: str = "cpu",
) -> list[Case]:
    """List every case of these operators, shapes, phases and dtypes on this kind of device.

    Args:
        operators: names in OPERATORS; None for all.
        shapes: names (see shapes.named_shapes) or shapes; None for all; shapes of other operators are skipped.
        phases: names in PHASES; None for all.
        dtypes: names in DTYPES or dtypes; None for float32 on a CPU and bfloat16 on a GPU.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown name.
    """
    chosen = list(named_shapes(device)) if shapes is None else shapes
    sizes = [by_name(shape, device) if isinstance(shape, str) else shape for shape in chosen]
    default = "bfloat16" if is_cuda(device) else "float32"
    types = [_dtype(dtype) for dtype in ((default,) if dtypes is None else dtypes)]
    given = dict.fromkeys(PHASES if phases is None else phases)
    wanted = [known("phase", phase, PHASES) for phase in given]
    result = []
    for name in OPERATORS if operators is None else operators:
        operator = _operator(name)
        for shape, phase, dtype, variant in itertools.product(
            sizes, wanted, types, operator.variants
        ):
            if isinstance(shape, operator.shapes) and not unavailable_reason(
                operator, shape, dtype, variant
            ):
                result.append(Case(name, shape, phase, dtype, device, variant))
    return result


def unavailable_reason(operator: Operator, shape: Shape, dtype: torch.dtype, variant: str) -> str:
    """Return the reason why such a case is not meaningful, or ""."""
    if isinstance(shape, LayerShape):
        if operator is EXPERT_ATTENTION and shape.experts:
            return "its attention is the same as at the dense shape"
        if operator is EXPERT_ATTENTION and variant == "dropout" and not shape.dropout:
            return "nothing is dropped at this shape"
        if shape.experts and dtype not in (torch.float32, torch.float64):
            # Rounded logits choose different experts, so results cannot be compared with the exact results.
            return "choices of experts depend on rounding in half precision"
    return ""


def _operator(name: str) -> Operator:
    return OPERATORS[known("operator", name, OPERATORS)]


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[known("dtype", dtype, DTYPES)]


def known(what: str, name: str, names: Collection[str]) -> str:
    """Return the name. Raises BadRequest: another name; the message has the known names."""
    if name not in names:
        raise BadRequest(f"{what}: expected one of {', '.join(filter(None, names))}, got {name!r}")
    return name
