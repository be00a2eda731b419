"""The GPUs that kernels are compiled for: what one SM holds, and how fast the device can be at most.

What an SM holds is the table "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ programming
guide: 64 Ki registers, 64 warps, 32 blocks; shared memory 164 KB (8.0) and 228 KB (9.0, 10.0), of which each block
costs 1 KB more than it asks for; registers are given out in units of 256 a warp, shared memory in units of 128
bytes. 16 exponentials per clock and SM: the guide's table "Throughput of Native Arithmetic Instructions", for 8.0,
9.0 and 10.0 alike. Tensor memory, 512 columns: the section on tcgen05 of the PTX manual. Tensor rates are dense.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
EXPONENTIALS_PER_CLOCK = 16


@dataclass(frozen=True)
class Architecture:
    """A GPU: clock in hertz, tensor FLOP/s of 16-bit and of TF32 products, memory in bytes/s.

    The clock is the one that the tensor rates are stated at. shared: bytes that the blocks of an SM share;
    tensor_memory: columns of an SM, 0 where it has none.
    """

    number: int
    device: str
    multiprocessors: int
    clock: float
    flops_16: float
    flops_tf32: float
    bandwidth: float
    shared: int
    tensor_memory: int
    source: str
    registers: int = 64 * KIB
    warps: int = 64
    blocks: int = 32

    @property
    def name(self) -> str:
        return f"sm_{self.number}"

    @property
    def exponentials(self) -> float:
        """A second, on all SMs."""
        return EXPONENTIALS_PER_CLOCK * self.multiprocessors * self.clock


A100 = Architecture(
    80,
    "A100 SXM 80 GB",
    108,
    1.41e9,
    312e12,
    156e12,
    2.039e12,
    164 * KIB,
    0,
    "NVIDIA A100 data sheet (312 and 156 TFLOP/s, 2039 GB/s) and architecture paper (108 SMs; boost clock "
    "1410 MHz)",
)
H100 = Architecture(
    90,
    "H100 SXM 80 GB",
    132,
    1.83e9,
    989.4e12,
    494.7e12,
    3.35e12,
    228 * KIB,
    0,
    "NVIDIA H100 data sheet (989.4 and 494.7 TFLOP/s, half of what it states with sparsity; 3.35 TB/s) and "
    "architecture paper (132 SMs; the rates are 4096 FLOP per clock and SM at 1830 MHz)",
)
B200 = Architecture(
    100,
    "B200 SXM 192 GB",
    148,
    1.856e9,
    2250e12,
    1125e12,
    8.0e12,
    228 * KIB,
    512,
    "NVIDIA HGX B200 data sheet (2.25 PFLOP/s, half of what it states with sparsity; TF32 half of that; up to "
    "8 TB/s); 148 SMs as the device reports them; clock from 8192 FLOP per clock and SM at that rate",
)
ARCHITECTURES = {each.number: each for each in (A100, H100, B200)}


def parse(names: str) -> tuple[Architecture, ...]:
    """Of "sm_80,sm_90" or "80,90".

    Raises:
        ValueError: names what is not known, and what is.
    """
    found = []
    for name in names.split(","):
        number = name.strip().removeprefix("sm_").rstrip("a")
        if not number.isdigit() or int(number) not in ARCHITECTURES:
            known = ", ".join(each.name for each in ARCHITECTURES.values())
            raise ValueError(f"arch: expected some of {known}, got {name.strip()!r}")
        found.append(ARCHITECTURES[int(number)])
    return tuple(dict.fromkeys(found))
