"""Builds the native module `flmoe_kernels._native`; everything static is in pyproject.toml.

CMake (CMakeLists.txt) knows how to compile; this file finds the tools, runs CMake with ninja and
puts the module where setuptools expects it. Every failure ends in one message that says what was
missing and how to get it.

Environment:
    CXX, CXXFLAGS, LDFLAGS, CMAKE_BUILD_TYPE    as everywhere with CMake
    FLMOE_SANITIZE                              sanitizers to compile in: "address,undefined"
    FLMOE_CUDA                                  1: build the CUDA kernels or fail; 0: leave them out; unset: build
                                                them where nvcc works
    CUDACXX, CUDA_HOME, CUDA_PATH               where nvcc is; else PATH and /usr/local/cuda
    CUDAHOSTCXX, CUDAFLAGS                      the C++ compiler that nvcc calls, and options for nvcc
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = (
    *("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_BUILD_TYPE", "FLMOE_SANITIZE"),
    *("CUDAHOSTCXX", "CUDAFLAGS"),
)
CUDA_MODES = {"": "AUTO", "1": "ON", "0": "OFF"}
COMPILER_HELP = (
    "Install GCC 11 or newer, or Clang 14 or newer "
    "(Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install), or name one with CXX=/path/to/compiler."
)


def stop(message: str) -> NoReturn:
    """End the build with a message. SystemExit, so that setuptools adds no traceback to it."""
    raise SystemExit(f"\nflmoe_kernels: cannot build the native module: {message}\n")


def check_platform() -> None:
    """Everything CMake would trip over later, said early and in words."""
    if sys.platform == "win32":
        stop(
            "Windows with MSVC is not supported: the kernels need GCC or Clang. "
            "Use Linux (WSL works) or macOS."
        )
    if "CXX" in os.environ:
        # CXX may carry arguments or a launcher in front, as in "ccache g++".
        compiler = os.environ["CXX"].split()[:1]
        if not compiler or shutil.which(compiler[0]) is None:
            stop(f"CXX={os.environ['CXX']!r} is no program that runs here. {COMPILER_HELP}")
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        stop(f"there is no C++ compiler (c++, g++, clang++) on PATH. {COMPILER_HELP}")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        stop(
            f"the header Python.h is not in {headers}. Install this Python's development files "
            "(Debian/Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)."
        )


def find_program(name: str, directory_attribute: str) -> str | None:
    """The program from the Python package of that name, else from PATH.

    The package first: with --no-build-isolation in a virtual environment that is not activated,
    the environment's own programs are not on PATH.
    """
    try:
        directory = getattr(importlib.import_module(name), directory_attribute)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=str(directory)) or shutil.which(name)


def find_pybind11() -> str | None:
    try:
        return str(importlib.import_module("pybind11").get_cmake_dir())
    except ImportError:
        return None


def find_tools() -> tuple[str, str, str]:
    """Paths of cmake, ninja and pybind11's CMake files."""
    tools = {
        "cmake": find_program("cmake", "CMAKE_BIN_DIR"),
        "ninja": find_program("ninja", "BIN_DIR"),
        "pybind11": find_pybind11(),
    }
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        stop(
            f"not installed in this Python environment: {', '.join(missing)}. "
            "With --no-build-isolation the build tools must be there beforehand: run\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}\n"
            "or leave out --no-build-isolation."
        )
    cmake, ninja, pybind11 = (str(path) for path in tools.values())
    return cmake, ninja, pybind11


def cuda_mode() -> str:
    """What CMake's FLMOE_CUDA is to be."""
    wanted = os.environ.get("FLMOE_CUDA", "")
    if wanted not in CUDA_MODES:
        stop(f"FLMOE_CUDA: expected 1, 0 or nothing, got {wanted!r}.")
    return CUDA_MODES[wanted]


def find_nvcc() -> str | None:
    """nvcc by the variables that name it, else on PATH, else where NVIDIA's installers put it."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named) or stop(f"CUDACXX={named!r} is no program that runs here.")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in homes:
        found = home and shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def version_of(nvcc: str | None) -> str:
    """What nvcc says of itself: the program of one path can be another one tomorrow."""
    if nvcc is None:
        return ""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout


def build_directory(*choices: str) -> Path:
    """A folder that survives the build, so that the next one compiles only what changed.

    CMake cannot change the Python, compiler, flags or source folder in place, so each combination
    has a folder of its own.
    """
    key = "\0".join((str(ROOT), *choices))
    return ROOT / "build" / f"native-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


class CMakeExtension(Extension):
    """An extension whose sources only CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, compile, copy the module to where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        check_platform()
        cmake, ninja, pybind11 = find_tools()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        choices = {name: os.environ.get(name, "") for name in ENVIRONMENT}
        cuda = cuda_mode()
        nvcc = None if cuda == "OFF" else find_nvcc()
        nvcc_key = (nvcc or "", version_of(nvcc))
        folder = build_directory(sys.base_prefix, suffix, cuda, *nvcc_key, *choices.values())
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            # Tool paths change from build to build under build isolation: set them every time.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DFLMOE_SANITIZE={choices['FLMOE_SANITIZE']}",
            f"-DFLMOE_CUDA={cuda}",
        ]
        if nvcc is not None:
            os.environ["CUDACXX"] = nvcc  # where CMake looks first
        self.run_cmake("configuring", configure)
        self.run_cmake("compiling", [cmake, "--build", str(folder)])

        built = folder / f"_native{suffix}"
        if not built.is_file():
            stop(f"CMake finished without making {built.name}; see the log above.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def run_cmake(self, step: str, command: list[str]) -> None:
        self.announce(f"flmoe_kernels: {step} the native module", level=2)
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            stop(
                f"{step} with CMake failed (exit code {code}); "
                "the reason is in the log above, at the first line that says 'error'."
            )


setup(
    ext_modules=[CMakeExtension("flmoe_kernels._native")],
    cmdclass={"build_ext": CMakeBuild},
)
