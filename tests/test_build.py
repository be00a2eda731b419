"""Tests of the sdist, the wheel, installation, and import without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "flmoe_kernels", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "pyproject.toml")
BUILD = [sys.executable, "setup.py", "build_ext"]
CHECK_IMPORT = """
import flmoe_kernels
from flmoe_kernels import _native
print(flmoe_kernels.__file__, _native.__file__, sep="\\n")
print("".join(_native.cuda_build()))
print(flmoe_kernels.core.backend.backend_status()["cuda"][1])
"""


def run(
    command: list[str], cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only the sources, as in a fresh checkout, in a folder whose name contains a space."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not run from a source checkout")
    folder = tmp_path_factory.mktemp("a checkout")
    for name in (*SOURCES, "setup.py"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT / "README.md").is_file():
        shutil.copy2(ROOT / "README.md", folder)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    built = run([sys.executable, "-c", code], cwd=checkout)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    return archive


def require_build_tools() -> None:
    for module in ("cmake", "ninja", "pybind11", "setuptools", "pip"):
        pytest.importorskip(
            module, reason=f"{module} is needed to build: see requirements/demo.txt"
        )
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler on PATH")


def test_sdist_holds_what_the_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "flmoe_kernels/py.typed"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[ch]*")}
    assert {"csrc/cuda/cuda.cmake", "csrc/cuda/routing.cu"} <= needed
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_from_the_sdist_imports_with_no_compiler(sdist: Path, tmp_path: Path) -> None:
    require_build_tools()
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    build = [*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(wheels), "."]
    # Unoptimised, because this test does not measure speed and such a build takes a fraction of the time.
    built = run(build, cwd=unpacked, env={"CMAKE_BUILD_TYPE": "Debug"})
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("flmoe_kernels/_native")]
    assert "flmoe_kernels/py.typed" in names
    assert not [
        name for name in names if name.startswith(("csrc/", "tests/", "bench/", "examples/"))
    ]

    target = tmp_path / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    installed = run(install, cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.rmtree(unpacked)
    environment = {"PYTHONPATH": str(target), "PATH": str(empty)}
    imported = run([sys.executable, "-c", CHECK_IMPORT], cwd=empty, env=environment)
    assert imported.returncode == 0, imported.stderr
    *files, cuda, reason = imported.stdout.splitlines()
    assert all(file.startswith(str(target)) for file in files)
    # The module has CUDA kernels if the log of the build says so; it was loaded with nothing but the package.
    log = built.stdout + built.stderr
    if "CUDA kernels for sm_" in log:
        assert cuda.startswith("sm_80 sm_90a")
    else:
        assert f"CUDA kernels are not built: {cuda}" in " ".join(log.split())
        assert cuda in reason


def test_no_compiler_says_what_to_install(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    result = run(BUILD, cwd=checkout, env={"PATH": str(tmp_path)})
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr
    assert "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("tool", ["cmake", "ninja", "pybind11"])
def test_missing_build_tool_names_the_pip_command(checkout: Path, tool: str) -> None:
    # None in sys.modules makes the import fail as if the package were not installed.
    code = f"""
import runpy, shutil, sys
sys.modules[{tool!r}] = None
which = shutil.which
shutil.which = lambda name, **options: None if name == {tool!r} else which(name, **options)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = run([sys.executable, "-c", code], cwd=checkout)
    assert result.returncode != 0
    assert f"pip install {tool}" in result.stderr
    assert "Traceback" not in result.stderr


NVCC = """#!/bin/sh
echo "nvcc: no host compiler of this version" >&2
exit 1
"""


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> Path:
    program = tmp_path / "nvcc"
    program.write_text(NVCC)
    program.chmod(0o755)
    return program


def without_kernels(checkout: Path, folder: Path) -> Path:
    """A checkout whose C++ files are all broken, so that a failing build does not compile kernels first."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("build", "dist"))
    shutil.rmtree(folder / "csrc")
    kernels = ("cpu/kernels/kernel.cpp", "cpu/avx512bf16/kernel.cpp")
    for name in ("bindings/module.cpp", "cpu/dispatch.cpp", *kernels):
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("this is not C++;\n")
    shutil.copytree(checkout / "csrc" / "cuda", folder / "csrc" / "cuda")
    return folder


@pytest.mark.slow
def test_values_of_flmoe_cuda(checkout: Path, tmp_path: Path, broken_nvcc: Path) -> None:
    """Without a working nvcc, FLMOE_CUDA=1 is an error."""
    require_build_tools()
    nvcc = str(broken_nvcc)
    wrong = run(BUILD, cwd=checkout, env={"FLMOE_CUDA": "yes"})
    assert wrong.returncode != 0
    assert "FLMOE_CUDA: expected 1, 0 or nothing, got 'yes'" in wrong.stderr
    missing = run(BUILD, cwd=checkout, env={"CUDACXX": "no-such-nvcc"})
    assert missing.returncode != 0
    assert "CUDACXX='no-such-nvcc' is not an executable program" in missing.stderr

    broken = without_kernels(checkout, tmp_path / "broken")
    required = run(BUILD, cwd=broken, env={"FLMOE_CUDA": "1", "CUDACXX": nvcc})
    assert required.returncode != 0
    assert "FLMOE_CUDA=1 requires the CUDA kernels, but" in required.stderr
    assert "nvcc cannot compile a program here" in " ".join(required.stderr.split())
