"""The encoder's row-wise Triton kernels, and the operators on them, in Triton's interpreter: the case files below
in a process of their own.

Whether kernels are interpreted is settled for a process when Triton is imported, and other tests compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CASES = ("encoder_rows_triton_cases.py", "encoder_op_triton_cases.py")


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *CASES],
        cwd=TESTS,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
