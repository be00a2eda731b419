"""Python programs in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can import this checkout, with further environment variables."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(code: str, **environment: str) -> str:
    """Standard output of a program that must succeed."""
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
