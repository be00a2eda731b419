"""Compilation of cases, and checks of the resources that the compiler reports."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import triton

from flmoe_kernels.core.triton.target import Architecture, most_shared

from .cases import Built, Case

KIB = 1024
# The Triton release that the launch tables were written with. Other releases may use other resources and may spill
# up to SPARE_SPILLS more bytes.
RELEASE, SPARE_SPILLS = "3.7.", 128
SAME_RELEASE = triton.__version__.startswith(RELEASE)
_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)(?:\b|_)")
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z]\w*::\w+)*(?:\.v(\d))?\.[a-z](\d+)\b")


@dataclass(frozen=True)
class AllowedSpill:
    """Allowed spilled bytes per thread of the cases whose names match `cases`, and the reason."""

    cases: str
    bytes: int
    reason: str


ALLOWED_SPILLS = (
    AllowedSpill(
        "pair_moe/grad_k/pair_base/float32/none, 8 experts",
        40,
        "on sm_100, addresses of eight experts' operands fill the registers, see docs/launch_tables.md",
    ),
)


@dataclass(frozen=True)
class Report:
    """Registers and spilled bytes per thread, shared bytes and warps per block.

    matrix: number of matrix instructions in the PTX, or AMD's code, by name. accesses: number of global loads and
    stores in the PTX by kind and bytes per thread, such as "ld.16" or "st.4".
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    matrix: dict[str, int]
    accesses: dict[str, int]


@dataclass(frozen=True)
class Row:
    """A case on an architecture. report: None if it does not compile. failures: one sentence per failure."""

    case: str
    architecture: Architecture
    report: Report | None
    failures: list[str] = field(default_factory=list)


def compile_case(case: Case, architecture: Architecture) -> Row:
    built = case.built(architecture)
    try:
        report = report_of(built.launch.compile(architecture))
    except Exception as error:  # The compiler raises its own types; the other cases still compile.
        message = str(error).splitlines() or [""]
        failure = f"does not compile: {type(error).__name__}: {message[0]}"
        return Row(case.name, architecture, None, [failure])
    return Row(case.name, architecture, report, failures(case.name, built, report, architecture))


def allowed_spill(case: str) -> int:
    """Largest allowed spill of a case, in bytes per thread."""
    fitting = (spill.bytes for spill in ALLOWED_SPILLS if fnmatch.fnmatchcase(case, spill.cases))
    return max(fitting, default=0)


def failures(case: str, built: Built, report: Report, architecture: Architecture) -> list[str]:
    """Sentences that say which checks a compiled kernel fails."""
    failed = []
    allowed = allowed_spill(case)
    if report.spilled > allowed + (0 if SAME_RELEASE else SPARE_SPILLS):
        failed.append(f"spills {report.spilled} bytes per thread, allowed: {allowed}")
    if report.shared > most_shared(architecture):
        failed.append(f"takes {report.shared} bytes of shared memory, above the limit of a block")
    elif SAME_RELEASE and built.table is not None and report.shared > built.table:
        failed.append(
            f"takes {report.shared} bytes of shared memory, its launch table states {built.table}"
        )
    count = sum(report.matrix.values())
    # AMD's instructions have other sizes.
    least = min(built.least, 1) if isinstance(architecture, str) else built.least
    if count < least:
        failed.append(f"has {count} matrix instructions, expected at least {least}")
    elif count and not built.least:
        failed.append(f"has {count} matrix instructions, but its case states no products")
    return failed


def report_of(compiled: Any) -> Report:
    """Report of a kernel that Triton compiled."""
    if "amdgcn" in compiled.asm:
        return _report_of_amd(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    accesses = (
        f"{kind}.{int(many or 1) * int(bits) // 8}" for kind, many, bits in _ACCESS.findall(ptx)
    )
    return Report(
        resources["REG"],
        resources["STACK"] + resources["LOCAL"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        dict(Counter(_MATRIX.findall(ptx))),
        dict(Counter(accesses)),
    )


def _report_of_amd(compiled: Any) -> Report:
    """The compiler states registers and the scratch memory of a thread at the end of its code."""
    code = compiled.asm["amdgcn"]
    facts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
    return Report(
        facts["vgpr_count"],
        facts["private_segment_fixed_size"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        dict(Counter(_MATRIX.findall(code))),
        {},
    )
