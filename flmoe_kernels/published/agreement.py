"""Error budgets for the outputs of a layer and its fast replacement.

In each group of outputs (logits of all views, weights, latents) the fast layer's root mean square
error against the original in float64 may be at most twice that of the original in its own dtype, plus
two units of rounding of the group's largest value. The mean is taken over a whole group, because the
largest of a few errors is mostly random.

The losses are small differences of large distances, so a direct comparison is not informative. Instead, the
losses of each layer are checked against the formula applied to its views, which were compared before: the
original's in float64, the fast layer's up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec
from flmoe_kernels.ops.interaction_losses.reference import interaction_losses, regression_losses

ROUNDING = 2.0
# The published layer computes its positions in float32 for any dtype, so even in float64 its error is of
# this size.
FLOAT64_ROUNDING = 1e-5
# Tolerance of losses in float64 against their formula in float64.
EXACT_ROUNDING = 1e-9


class Disagreement(Exception):
    """The layers differ or cannot be compared; the message is the reason for the report."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs of forward and inference in float64: tensors by group, the losses, and the views
    (latents or, without latents, logits) from which the losses are computed; gate losses as they are.

    exists: (B, M) bool, whether the view that replaces a modality exists for a sample; None: all exist.
    """

    groups: dict[str, list[Tensor]]
    losses: list[Tensor]
    views: list[list[Tensor]]
    gate_losses: list[Any] = dataclasses.field(default_factory=list)
    exists: Tensor | None = None
    regression: bool = False

    def formula(self, exists: Tensor | None) -> list[Tensor]:
        """The losses of the views."""
        losses = regression_losses if self.regression else interaction_losses
        return losses(self.views, exists)


def collect(result: Any, inferred: Any, spec: LayerSpec, exists: Tensor | None) -> Outputs:
    """Sort the outputs of forward and, if there are any, of inference.

    exists: (B, M) bool or None; results of views that do not exist become 0 in the groups.
    """
    latents_out = spec.compat == "fl_i2moe"
    count = 4 + spec.fusion_sparse + latents_out
    if not isinstance(result, tuple) or len(result) != count:
        got = len(result) if isinstance(result, tuple) else type(result).__name__
        raise Disagreement(f"the layer's forward returns {got} values, expected {count}")
    experts, weights, logits, losses = result[:4]
    view_logits = [[view[0] if latents_out else view for view in expert] for expert in experts]
    views = view_logits
    groups = {"logits": [logits, *_existing(view_logits, exists)], "weights": [weights]}
    if latents_out:
        latents = [[view[1] for view in expert] for expert in experts]
        groups["latents"] = [*_existing(latents, exists), *result[-1]]
        views = view_logits if spec.regression else latents
    if inferred is not None:
        expert_logits, weights, logits = inferred
        groups["logits"] += [logits, *expert_logits]
        groups["weights"].append(weights)
    return Outputs(
        {name: [x.double() for x in tensors] for name, tensors in groups.items()},
        [torch.as_tensor(loss).double() for loss in losses],
        [[view.double() for view in expert] for expert in views],
        [loss for expert in result[4] for loss in expert] if spec.fusion_sparse else [],
        exists,
        spec.regression,
    )


def _existing(views: list[list[Tensor]], exists: Tensor | None) -> list[Tensor]:
    """The views of all experts, 0 where a view does not exist."""
    if exists is None:
        return [view for expert in views for view in expert]
    return [
        torch.where(exists[:, v - 1 : v], view, 0.0) if v else view
        for expert in views
        for v, view in enumerate(expert)
    ]


def losses_of_existing(outputs: Outputs, dtype: torch.dtype) -> Outputs:
    """Replace the losses of a published layer, which include all views, by losses over the existing views."""
    if outputs.exists is None:
        return outputs
    rounding = EXACT_ROUNDING if dtype == torch.float64 else ROUNDING * torch.finfo(dtype).eps
    _check_losses("the layer's losses", dataclasses.replace(outputs, exists=None), rounding)
    return dataclasses.replace(outputs, losses=outputs.formula(outputs.exists))


def within_budget(
    group: str, fast: Outputs, own: Outputs, exact: Outputs, dtype: torch.dtype
) -> float:
    """Return the fast layer's largest error in the group. Raises Disagreement if it exceeds the budget."""
    expected, near = exact.groups[group], own.groups[group]
    actual = fast.groups[group][: len(expected)]
    if [x.shape for x in actual] != [x.shape for x in expected]:
        raise Disagreement(f"{group}: the shapes differ from the fast layer's")
    if not all(bool(x.isfinite().all()) for x in (*expected, *near)):
        raise Disagreement(f"{group}: the layer's outputs are not finite, cannot compare")
    rounding = FLOAT64_ROUNDING if dtype == torch.float64 else ROUNDING * torch.finfo(dtype).eps
    budget = 2.0 * _root_mean_square(near, expected)
    budget += rounding * max(float(x.abs().max()) for x in expected)
    error = _root_mean_square(actual, expected)
    if not error <= budget:
        raise Disagreement(
            f"the fast layer's {group} differ by {error:.1e} (root mean square), "
            f"{budget:.1e} is allowed"
        )
    return largest(actual, expected)


def check_losses(fast: Outputs, exact: Outputs, dtype: torch.dtype) -> float:
    """Return the largest error of the fast layer's losses. Raises Disagreement if losses violate the formula."""
    _check_losses("the layer's losses", exact, EXACT_ROUNDING)
    _check_losses("the fast layer's losses", fast, ROUNDING * torch.finfo(dtype).eps)
    return largest(fast.losses, exact.losses)


def _check_losses(whose: str, outputs: Outputs, rounding: float) -> None:
    """Check the losses; rounding is relative to the largest norm of a view, as losses are distances of views."""
    expected = outputs.formula(outputs.exists)
    if len(outputs.losses) != len(expected):
        raise Disagreement(f"{whose}: {len(outputs.losses)}, expected {len(expected)}")
    norm = max(float(view.norm(dim=1).max()) for expert in outputs.views for view in expert)
    error, budget = largest(outputs.losses, expected), rounding * max(1.0, norm)
    if not error <= budget:
        raise Disagreement(
            f"{whose} differ by {error:.1e} from those of the views, {budget:.1e} is allowed"
        )


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest absolute difference; NaN if any difference is NaN."""
    return float(torch.stack([(x - y).abs().max() for x, y in zip(a, b, strict=True)]).max())


def _root_mean_square(a: list[Tensor], b: list[Tensor]) -> float:
    """Root mean square of all differences; NaN if any difference is NaN."""
    differences = torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)])
    return float(differences.square().mean().sqrt())


def first_line(error: BaseException) -> str:
    """Type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
