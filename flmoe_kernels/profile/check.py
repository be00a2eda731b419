"""Correctness before timing: a contestant whose answer is wrong is not timed.

Every contestant is held to `core.error_budget`: the exact result is the reference's in float64, and the budget
follows from the reference's own error in the case's dtype. A case too large for that is checked on fewer
samples or tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.core.error_budget import assert_within_budget

from .cases import Case
from .operators.expert_attention import WITH_DROPOUT
from .prepared import GRADIENT_OF, Outputs
from .registry import Contestant, find, prepare
from .shapes import LayerShape, PairShape, Shape, is_cuda

# Sizes up to which the reference is run in float64, by kind of device. What a GPU checks at its full size,
# compilers need not compile twice; a GPU with less memory than _LARGE checks layers on few samples.
_SAMPLES = {"cpu": 1, "cuda": 32}
_FEW_SAMPLES, _LARGE = 4, 64 * 2**30
_PAIRS = {"cpu": 8 * 320 * 196, "cuda": 2**25}
_ROUTED_WORK = {"cpu": 2**33, "cuda": 2**40}
# Units of rounding, beside the budget that tests hold kernels to: peers sum in orders of their own, and what is
# to be found here is a wrong answer, not a lost digit.
_SLACK = 2.0
# Gradients smaller than this share of the largest of their kind are what is left of terms that cancel.
_VANISHING = 0.25


class WrongAnswer(AssertionError):
    """A contestant does not compute what it is timed for; the message names it, the case and the result."""


def agree(case: Case, *contestants: Contestant | str) -> None:
    """Check contestants of a case, or backends by name, against the exact results.

    Raises:
        WrongAnswer: for the first wrong one.
    """
    small = checked_case(case)
    for contestant in contestants:
        who = find(case, contestant) if isinstance(contestant, str) else contestant
        compare(small, who.name, prepare(small, who).outputs())


def compare(case: Case, name: str, actual: Mapping[str, Tensor]) -> None:
    """Hold the results of `name` at this very case to the budget.

    Raises:
        WrongAnswer: outside of it, or another set of results.
    """
    low, exact = _references(case)
    missing = [key for key in exact if key not in actual and _required(key)]
    unknown = [key for key in actual if key not in exact]
    if missing or unknown:
        raise WrongAnswer(f"{name} on {case.name}: missing {missing}, unexpected {unknown}")
    sizes = _sizes(exact)
    for key, found in actual.items():
        what = f"{name} on {case.name} ({case.shape}): {key}"
        if not exact[key].dtype.is_floating_point:
            if not torch.equal(found.to(exact[key].dtype), exact[key]):
                raise WrongAnswer(f"{what}: other integers than the reference's")
            continue
        size = float(exact[key].abs().max()) if exact[key].numel() else 0.0
        magnitude = _SLACK * (sizes[_group(key)] if key.startswith(GRADIENT_OF) else size)
        try:
            assert_within_budget(
                # A peer may compute in more precision than the case's.
                found.to(low[key].dtype),
                low[key],
                exact[key],
                what,
                magnitude=magnitude,
                may_vanish=_SLACK * size < _VANISHING * magnitude,
            )
        except AssertionError as error:
            raise WrongAnswer(str(error)) from error


def checked_case(case: Case) -> Case:
    """The case, or one like it that the reference in float64 can compute."""
    return dataclasses.replace(case, shape=checked_shape(case.shape, case.device))


def checked_shape(shape: Shape, device: str) -> Shape:
    kind = "cuda" if is_cuda(device) else "cpu"
    if isinstance(shape, LayerShape):
        return dataclasses.replace(shape, batch=min(shape.batch, _samples(device)))
    if isinstance(shape, PairShape):
        if shape.pairs <= _PAIRS[kind]:
            return shape
        rows, columns = (min(side, 509) for side in (shape.rows, shape.columns))
        return dataclasses.replace(shape, batch=min(shape.batch, 2), rows=rows, columns=columns)
    work = shape.width * shape.hidden * shape.choices
    return dataclasses.replace(shape, tokens=min(shape.tokens, _ROUTED_WORK[kind] // work))


def _samples(device: str) -> int:
    if not is_cuda(device):
        return _SAMPLES["cpu"]
    large = (
        not torch.cuda.is_available()
        or torch.cuda.get_device_properties(device).total_memory > _LARGE
    )
    return _SAMPLES["cuda"] if large else _FEW_SAMPLES


@functools.lru_cache(maxsize=2)
def _references(case: Case) -> tuple[Outputs, Outputs]:
    """Results of the reference in the case's dtype, and exact ones."""
    return (
        prepare(case, REFERENCE, case.dtype).outputs(),
        prepare(case, REFERENCE, torch.float64).outputs(),
    )


def _required(name: str) -> bool:
    """What only some contestants compute besides what they are timed for need not be there."""
    return not name.endswith(WITH_DROPOUT)


def _group(name: str) -> str:
    """Results that are measured by one size: gradients of one kind; any other result by itself."""
    if not name.startswith(GRADIENT_OF):
        return name
    owner = name.removeprefix(GRADIENT_OF)
    if ".attn." in owner:
        # Scores enter through differences, so that the gradient of q is what is left of terms of this size.
        return "attention"
    return re.sub(r"\d+", "#", owner) if "." in owner else "gradient"


def _sizes(exact: Outputs) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for name, x in exact.items():
        if x.dtype.is_floating_point and x.numel():
            group = _group(name)
            sizes[group] = max(sizes.get(group, 0.0), float(x.abs().max()))
        else:
            sizes.setdefault(_group(name), 0.0)
    return sizes
