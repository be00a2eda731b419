"""Whether a RoutedMLP computes what the published sparse MLP that it is to replace computes.

Both run in eval mode on the same tokens, and so does a float64 copy of the original. Two things are taken out of
the comparison, because the original does not do them the same way twice or is right either way: which rows are
dropped (capacities are lifted on the copies, random routing is off), and tokens whose choice of experts hangs on
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .compare import Case, Comparison, bare_copy, times_faster
from .copies import check_can_run, lift_capacity
from .outputs import Disagreement, Outputs, first_line, within_budget

RANDOM_TOKENS = (2, 29)
MAX_TOKENS = 512
# In units of rounding of a token's largest logit: above the difference that two orders of a sum make.
CLEAR_CHOICE = 8.0


def compare(
    layer: nn.Module,
    spec: RoutedSpec,
    adopt: Callable[[nn.Module], RoutedMLP],
    case: Case | None,
) -> Comparison:
    """The error of the fast module's outputs, and how many times faster its calls are.

    The budget is that of `swap_outputs.within_budget`.

    Args:
        layer: the original; not run and not changed.
        spec: its description.
        adopt: makes the fast module on the parameters of a layer.
        case: a call to compare on, its first tokens only; random tokens when None.

    Raises:
        Disagreement: with the reason.
        UnsupportedMLP: FastMoE's own modules, anywhere but on a CUDA device.
    """
    check_can_run(layer)
    parameter = next(layer.parameters())
    device, dtype = parameter.device, parameter.dtype
    original, exact = bare_copy(layer).eval(), bare_copy(layer).double().eval()
    fast, router = adopt(layer).eval(), adopt(bare_copy(layer).double()).eval()
    for module in (original, exact, fast):
        lift_capacity(module)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        x = _tokens(case, spec).to(device, dtype)
        x = x[_clear_choices(router.gate.clean_logits(x.double()), spec.top_k, dtype)]
        if not len(x):
            raise Disagreement(
                "there is no token whose choice of experts does not hang on rounding"
            )
        precise = _outputs(_run(exact, x.double(), "its own forward"))
        own = _outputs(_run(original, x, "its own forward"))
        found = _outputs(_run(fast, x, "the fast module"))
        error = within_budget("outputs", found, own, precise, dtype)
        faster = times_faster(partial(original, x), partial(fast, x), on=device)
    return Comparison({"outputs": error}, faster)


def _tokens(case: Case | None, spec: RoutedSpec) -> Tensor:
    """(N, D)."""
    if case is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*RANDOM_TOKENS, spec.d_model, generator=generator).flatten(0, 1)
    shapes = [tuple(x.shape) for x in case.inputs]
    if len(shapes) != 1 or not shapes[0] or shapes[0][-1] != spec.d_model:
        raise Disagreement(
            f"was called with inputs of shapes {shapes}, expected one (..., {spec.d_model})"
        )
    return case.inputs[0].reshape(-1, spec.d_model)[:MAX_TOKENS]


def _clear_choices(logits: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """(N) bool: that the last expert chosen and the first one that is not are apart; logits (N, E).

    Apart by the token's own largest logit: one token of a large norm says nothing about the others' rounding.
    """
    if top_k == logits.shape[1] or not len(logits):
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    ordered = logits.sort(dim=1, descending=True).values
    rounding = CLEAR_CHOICE * torch.finfo(dtype).eps * logits.abs().amax(dim=1)
    # Not-a-number is kept: the comparison says that the outputs are not finite.
    return ~(ordered[:, top_k - 1] - ordered[:, top_k] <= rounding)


def _run(module: Any, x: Tensor, whose: str) -> Tensor:
    try:
        result = module(x)
    except Exception as error:
        raise Disagreement(f"{whose} fails: {first_line(error)}") from error
    if not isinstance(result, Tensor) or result.shape != x.shape:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise Disagreement(f"{whose}: expected an output {tuple(x.shape)}, got {found}")
    return result


def _outputs(result: Tensor) -> Outputs:
    return Outputs({"outputs": [result.double()]}, [], [])
