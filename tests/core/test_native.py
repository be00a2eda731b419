"""Tests of the native module with address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flmoe_kernels.core.backend import instruction_sets

ROOT = Path(__file__).resolve().parents[2]


def runtime_libraries() -> list[str]:
    """Paths of the compiler's sanitizer runtime and of libstdc++, which LD_PRELOAD loads before Python."""
    if sys.platform != "linux":
        pytest.skip("the runtime is loaded with LD_PRELOAD")
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    if not compiler:
        pytest.skip("no C++ compiler on PATH")
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [*compiler, f"-print-file-name={name}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(answer).is_absolute():
            pytest.skip(f"{' '.join(compiler)} has no {name}")
        found.append(answer)
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module with both sanitizers, unoptimised, because this compiles fastest."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not run from a source checkout")
    runtime_libraries()
    folder = tmp_path_factory.mktemp("sanitized")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT,
        env=os.environ
        | {
            "FLMOE_SANITIZE": "address,undefined",
            # The sanitizers check host code; the GPU's blocks run on the host as their twin.
            "FLMOE_CUDA": "0",
            "CMAKE_BUILD_TYPE": "Debug",
            "CXXFLAGS": "-O0 -g1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (module,) = folder.rglob("_native*")
    return module


def start(module: Path, isa: str, *arguments: str) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "FLMOE_ISA": isa,
        "LD_PRELOAD": ":".join(runtime_libraries()),
        # Python keeps memory until exit; new memory is filled with NaN, so that reads of it become visible.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.native_driver", str(module), *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_every_kernel_stays_in_its_buffers(sanitized: Path) -> None:
    started = [(isa, start(sanitized, isa)) for isa in instruction_sets()]
    assert started
    for isa, process in started:
        output, _ = process.communicate()
        assert process.returncode == 0, f"{isa}: {output[-4000:]}"
        used, pool, calls = output.split()[-3:]
        assert (used, pool) == (isa, "threads")
        assert int(calls) > 4000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "report"),
    [("read", "READ of size 4"), ("write", "WRITE of size 4"), ("scratch", "WRITE of size 4")],
)
def test_the_sanitizer_detects_an_overrun_by_one_element(
    sanitized: Path, mistake: str, report: str
) -> None:
    process = start(sanitized, "baseline", mistake)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "heap-buffer-overflow" in output
    assert report in output
    assert ("take_scratch" in output) == (mistake == "scratch")
