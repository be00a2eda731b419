"""Requests of the command `profile`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_kernels.core.backend import REFERENCE, BackendUnavailable

from . import cases
from .cases import (
    BOTH,
    DTYPES,
    FORWARD,
    INTERACTION_MOE,
    OPERATORS,
    PHASES,
    BadRequest,
    Case,
    known,
)
from .registry import Contestant, contestants, default_ours, device_unavailable_reason
from .shapes import Shape, UserShape, is_cuda, named_shapes

EVERY = "all"
# Other names of forward and forward+backward, for the whole layer.
_OTHER_NAMES = {"inference": FORWARD, "training": BOTH}


@dataclass(frozen=True)
class Request:
    """Names of a case and of its contestants.

    backends: names of contestants, which are compared with the first; "all" for all that run here; empty for the
    backend that is selected by default, and for a user's layer also the reference. shape, phase, dtype, variant:
    None for the operator's first shape, forward+backward, float32 (on a GPU bfloat16; for a user's layer its own
    dtype), the first variant.
    """

    operator: str
    shape: str | UserShape | None = None
    dtype: str | None = None
    backends: tuple[str, ...] = ()
    phase: str | None = None
    device: str = "cpu"
    variant: str | None = None

    def case(self) -> Case:
        """Return the requested case.

        Raises:
            BadRequest: an unknown name, or a missing device.
        """
        operator = OPERATORS[known("op", self.operator, OPERATORS)]
        _check_device(self.device)
        if isinstance(self.shape, UserShape):
            shape: Shape = self.shape
            dtype = self.dtype or self.shape.dtype
        else:
            shapes = {
                name: shape
                for name, shape in named_shapes(self.device).items()
                if isinstance(shape, operator.shapes)
            }
            shape = shapes[known("shape", self.shape or next(iter(shapes)), shapes)]
            # In half precision, rounding changes the experts that a sparse layer chooses.
            sparse = cases.unavailable_reason(INTERACTION_MOE, shape, torch.bfloat16, "")
            half = is_cuda(self.device) and not sparse
            dtype = self.dtype or ("bfloat16" if half else "float32")
        phase = self.phase or BOTH
        if operator is INTERACTION_MOE:
            phase = _OTHER_NAMES.get(phase, phase)
        variant = self.variant or operator.variants[0]
        case = Case(
            operator=operator.name,
            shape=shape,
            phase=known("pass", phase, PHASES),
            dtype=DTYPES[known("dtype", dtype, DTYPES)],
            device=self.device,
            variant=known("variant", variant, operator.variants),
        )
        if reason := cases.unavailable_reason(operator, shape, case.dtype, variant):
            raise BadRequest(f"{case.name}: {reason}")
        return case

    def contestants(self, case: Case) -> list[Contestant]:
        """Return the requested contestants, in the order of the request.

        Raises:
            BadRequest: an unknown name, or a contestant that cannot run here; the message has the reason.
        """
        named = {x.name: x for x in contestants(case)}
        if not self.backends:
            try:
                peers = [named[REFERENCE]] if isinstance(case.shape, UserShape) else []
                return [default_ours(case), *peers]
            except BackendUnavailable as error:
                raise BadRequest(str(error)) from error
        if EVERY in self.backends:
            return [x for x in named.values() if not x.why_not]
        names = dict.fromkeys(self.backends)
        chosen = [named[known("backend", name, (*named, EVERY))] for name in names]
        for contestant in chosen:
            if contestant.why_not:
                raise BadRequest(
                    f"backend {contestant.name!r} cannot run {case.name} on {case.device}: "
                    f"{contestant.why_not}"
                )
        return chosen


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise BadRequest(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if missing := device_unavailable_reason(device):
        raise BadRequest(f"device: {device!r}: {missing}")
    if is_cuda(device) and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise BadRequest(f"device: {device!r}: there are {torch.cuda.device_count()} CUDA devices")
