"""Measured ceilings of this machine (matrix product, copy) and the roofline.

The ceilings are a large product and a copy, so "share of the roofline" compares a kernel with what programs
reach on this machine, not with a data sheet. On a CPU, the product is torch's or this package's, whichever is
faster, because torch's library does not use the best instructions of every processor.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flmoe_gate.timing import Call, Clock, clock_for
from flmoe_kernels.core.dtypes import dtype_name
from flmoe_kernels.core.native import cpu_unavailable_reason
from flmoe_kernels.ops.encoder.api import expert_linear

from .environment import ask_driver
from .shapes import is_cuda
from .work import Cost

MATMUL, MEMORY, EXPONENTIALS = "matrix products", "memory", "exponentials"
# Large enough that launches and caches do not matter, small enough to measure in a second.
_SIDE = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_ROUNDS = 7
_PRODUCT_SECONDS, _MOST_SECONDS = 1.0, 3.0
# Special functions per multiprocessor and clock: 16 units, according to NVIDIA's programming guide for compute
# capability 8.0, 9.0 and 10.0.
_EXPONENTIALS_PER_CLOCK = 16


@dataclass(frozen=True)
class Ceilings:
    """Rates. flops: FLOP/s of a large product, by dtype. bytes_per_second: of a copy, read plus written bytes.

    exponentials: per second, computed from the clock and not measured; 0 if unknown.
    """

    device: str
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes_per_second: float = 0.0
    exponentials: float = 0.0

    def roofline_seconds(self, cost: Cost, dtype: torch.dtype) -> tuple[float, str]:
        """Return the least time of such a call, and the name of the limit that determines it.

        Raises:
            KeyError: products of this dtype were not measured.
        """
        limits = {
            MATMUL: cost.flop / self.flops[dtype_name(dtype)],
            MEMORY: cost.bytes / self.bytes_per_second,
        }
        if self.exponentials:
            limits[EXPONENTIALS] = cost.exponentials / self.exponentials
        binding = max(limits, key=lambda name: limits[name])
        return limits[binding], binding


def measure_ceilings(
    device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (), clock: Clock | None = None
) -> Ceilings:
    """Measure the ceilings; takes some seconds.

    Args:
        dtypes: of products; default float32, on a GPU bfloat16, float16 and float32.
        clock: replaces the device's clock: use the clock that times the calls compared with the ceilings.
    """
    clock = clock or clock_for(device)[1]
    default = (
        (torch.bfloat16, torch.float16, torch.float32) if is_cuda(device) else (torch.float32,)
    )
    return Ceilings(
        device=device,
        flops={
            dtype_name(dtype): max(
                matmul_rate(device, dtype, clock), linear_rate(device, dtype, clock)
            )
            for dtype in dtypes or default
        },
        bytes_per_second=copy_rate(device, clock),
        exponentials=exponential_rate(device),
    )


def matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of torch.mm of two square matrices, with a preallocated result.

    The matrices are smaller than _SIDE if that would take seconds: torch has no fast product of float16 for some
    processors.
    """
    side = _SIDE[_kind(device)]
    small = max(1, side // 8)
    expected = _median_seconds(_product(device, dtype, small), clock) * (side / small) ** 3
    while expected > _PRODUCT_SECONDS and side > small:
        side, expected = side // 2, expected / 8
    return 2 * side**3 / _median_seconds(_product(device, dtype, side), clock)


def linear_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of this package's product of two square matrices on a CPU; 0 on a GPU or without the C++ kernels."""
    if is_cuda(device) or cpu_unavailable_reason():
        return 0.0
    side = _SIDE["cpu"]
    a, b = (torch.randn(1, side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda: expert_linear(a, b, None, "cpu"), clock)


def _product(device: str, dtype: torch.dtype, side: int) -> Call:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def copy_rate(device: str, clock: Clock) -> float:
    """Bytes per second of a copy within the device's memory: read plus written bytes."""
    count = _COPY_BYTES[_kind(device)]
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _median_seconds(lambda: target.copy_(source), clock)


def exponential_rate(device: str) -> float:
    """Exponentials per second of a GPU at its maximum clock; 0 if unknown. 0 on a CPU, which has no such unit."""
    if not is_cuda(device):
        return 0.0
    megahertz = "".join(ask_driver(device, "clocks.max.sm")).split(" ")[0]
    if not megahertz.isdecimal():
        return 0.0
    clock = 1e6 * float(megahertz)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * _EXPONENTIALS_PER_CLOCK * clock


def _median_seconds(call: Call, clock: Clock) -> float:
    """Median of up to _ROUNDS calls, of fewer if they take more than _MOST_SECONDS in total."""
    clock(call)
    seconds: list[float] = []
    while len(seconds) < _ROUNDS and sum(seconds) < _MOST_SECONDS:
        seconds.append(clock(call))
    return statistics.median(seconds)


def _kind(device: str) -> str:
    return "cuda" if is_cuda(device) else "cpu"
