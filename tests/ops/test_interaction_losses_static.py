"""interaction_moe's own Triton kernels compiled for sm_80, sm_90 and sm_100, without a GPU.

What is compiled, and with which arguments, is interaction_triton_static.py's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
try:
    TRITON = version("triton")
except PackageNotFoundError:
    pytest.skip("the package triton is not installed", allow_module_level=True)
# The launch table was chosen with these; another compiler may use other numbers, within the same bounds.
TABLE_WRITTEN_WITH = TRITON.startswith("3.7.")
KERNELS = {"losses", "mean", "gradient", "features", "features_gradient", "mix", "mix_gradient"}
KIB = 1024
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Those that were printed, also where the compiler's process did not end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SUPPORT / "interaction_triton_static.py")],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"after {len(found)} kernels:\n{result.stderr[-4000:]}"
    return found


def named(report: Report) -> str:
    return "{case}: {kernel} on sm_{architecture}".format_map(report)


def test_every_kernel_was_compiled(reports: list[Report]) -> None:
    for case in {report["case"] for report in reports}:
        for architecture in (80, 90, 100):
            here = (case, architecture)
            kernels = {r["kernel"] for r in reports if (r["case"], r["architecture"]) == here}
            assert kernels == KERNELS, here


def test_registers_do_not_spill(reports: list[Report]) -> None:
    # Another version's compiler may spill a few bytes of a table that was not chosen with it.
    limit = 0 if TABLE_WRITTEN_WITH else 64
    assert not {named(r): r["spilled"] for r in reports if r["spilled"] > limit}


def test_many_blocks_fit_an_sm(reports: list[Report]) -> None:
    """What is bound by bytes or latency needs them: a quarter of the threads that an SM holds, or more."""
    for report in reports:
        assert report["shared"] <= 16 * KIB, named(report)
        assert report["registers"] <= 128, named(report)
        assert not report["matrix"], named(report)


def test_shared_memory_is_the_tables(reports: list[Report]) -> None:
    if not TABLE_WRITTEN_WITH:
        pytest.skip("the table was written with Triton 3.7")
    for kernel in KERNELS:
        found = [r for r in reports if r["kernel"] == kernel]
        assert max(r["shared"] for r in found) == found[0]["expected"], kernel
