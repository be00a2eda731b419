"""Correctness check before timing; contestants with wrong results are not timed.

Every contestant must be within `core.error_budget`: the exact result is the reference's in float64, and the budget
follows from the reference's error in the case's dtype. Cases that are too large for this are checked on fewer
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

# Sizes up to which the reference runs in float64, by kind of device. If a GPU checks the full size, compilers
# need not compile twice. A GPU with less memory than _LARGE checks layers on few samples.
_SAMPLES = {"cpu": 1, "cuda": 32}
_FEW_SAMPLES, _LARGE = 4, 64 * 2**30
_PAIRS = {"cpu": 8 * 320 * 196, "cuda": 2**25}
_ROUTED_WORK = {"cpu": 2**33, "cuda": 2**40}
# Units of rounding, in addition to the budget of the tests: peers sum in different orders, and this check looks
# for wrong results, not for lost digits.
_SLACK = 2.0
# Gradients smaller than this share of the largest gradient of their kind result from terms that cancel.
_VANISHING = 0.25


class WrongAnswer(AssertionError):
    """A contestant's results are wrong; the message names the contestant, the case and the result."""


def agree(case: Case, *contestants: Contestant | str) -> None:
    """Check contestants of a case, or backends by name, against the exact results.

    Raises:
        WrongAnswer: for the first contestant whose results are wrong.
    """
    small = checked_case(case)
    for contestant in contestants:
        who = find(case, contestant) if isinstance(contestant, str) else contestant
        compare(small, who.name, prepare(small, who).outputs())


def compare(case: Case, name: str, actual: Mapping[str, Tensor]) -> None:
    """Check that the results of `name` for exactly this case are within the budget.

    Raises:
        WrongAnswer: a result is outside of the budget, missing or unexpected.
    """
    compare_with(case, name, actual, *_references(case))


def compare_with(
    case: Case, name: str, actual: Mapping[str, Tensor], low: Outputs, exact: Outputs
) -> None:
    """Check results as `compare` does, given those of the reference in the case's precision and in float64."""
    missing = [key for key in exact if key not in actual and _required(key)]
    unknown = [key for key in actual if key not in exact]
    if missing or unknown:
        raise WrongAnswer(f"{name} on {case.name}: missing {missing}, unexpected {unknown}")
    sizes = _sizes(exact)
    for key, result in actual.items():
        what = f"{name} on {case.name} ({case.shape}): {key}"
        if not exact[key].dtype.is_floating_point:
            if not torch.equal(result.to(exact[key].dtype), exact[key]):
                raise WrongAnswer(f"{what}: the integers differ from the reference's")
            continue
        size = float(exact[key].abs().max()) if exact[key].numel() else 0.0
        magnitude = _SLACK * (sizes[_group(key)] if key.startswith(GRADIENT_OF) else size)
        try:
            assert_within_budget(
                # A peer may compute in higher precision than the case's dtype.
                result.to(low[key].dtype),
                low[key],
                exact[key],
                what,
                magnitude=magnitude,
                may_vanish=_SLACK * size < _VANISHING * magnitude,
            )
        except AssertionError as error:
            raise WrongAnswer(str(error)) from error


def checked_case(case: Case) -> Case:
    """Return the case, or a smaller version that the reference can compute in float64."""
    return dataclasses.replace(case, shape=_checked_shape(case.shape, case.device))


def _checked_shape(shape: Shape, device: str) -> Shape:
    kind = "cuda" if is_cuda(device) else "cpu"
    if isinstance(shape, LayerShape):
        # Ragged sequences need two samples, so that one of them is padded.
        samples = max(_samples(device), 2 if shape.ragged else 1)
        return dataclasses.replace(shape, batch=min(shape.batch, samples))
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
    """Results of the reference in the case's dtype, and the exact results."""
    return (
        prepare(case, REFERENCE, case.dtype).outputs(),
        prepare(case, REFERENCE, torch.float64).outputs(),
    )


def _required(name: str) -> bool:
    """Whether every contestant must have this result; results with dropout are optional."""
    return not name.endswith(WITH_DROPOUT)


def _group(name: str) -> str:
    """Group of results with a common scale: gradients of the same kind; any other result is its own group."""
    if not name.startswith(GRADIENT_OF):
        return name
    owner = name.removeprefix(GRADIENT_OF)
    if ".attn." in owner:
        # Softmax depends only on differences of scores, so the gradient of q has cancelling terms of this size.
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
