"""Build of the native module `flmoe_kernels._native`; the static metadata is in pyproject.toml.

CMakeLists.txt describes the compilation. This file finds the tools, runs CMake with ninja and copies
the module to where setuptools expects it. If the build fails, a message says what is missing and how
to install it.

Environment:
    CXX, CXXFLAGS, LDFLAGS, CMAKE_BUILD_TYPE    as everywhere with CMake
    FLMOE_SANITIZE                              sanitizers to compile in: "address,undefined"
    FLMOE_CUDA                                  1: build the CUDA kernels or fail; 0: do not build them;
                                                unset: build them if nvcc works
    CUDACXX, CUDA_HOME, CUDA_PATH               location of nvcc; default: PATH, then /usr/local/cuda
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
    "macOS: xcode-select --install), or set CXX=/path/to/compiler."
)


def stop(message: str) -> NoReturn:
    """End the build with a message. Raises SystemExit, so that setuptools prints no traceback."""
    raise SystemExit(f"\nflmoe_kernels: cannot build the native module: {message}\n")


def check_platform() -> None:
    """Stop with a clear message if CMake would fail later: platform, compiler, Python headers."""
    if sys.platform == "win32":
        stop(
            "Windows with MSVC is not supported: the kernels need GCC or Clang. "
            "Use Linux (WSL works)."
        )
    if "CXX" in os.environ:
        # CXX may contain arguments or start with a launcher, as in "ccache g++".
        compiler = os.environ["CXX"].split()[:1]
        if not compiler or shutil.which(compiler[0]) is None:
            stop(f"CXX={os.environ['CXX']!r} is not an executable program. {COMPILER_HELP}")
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        stop(f"no C++ compiler (c++, g++, clang++) on PATH. {COMPILER_HELP}")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        stop(
            f"the header Python.h is not in {headers}. Install the development files of this Python "
            "(Debian/Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)."
        )


def find_program(name: str, directory_attribute: str) -> str | None:
    """Path of a program: from the Python package of the same name, otherwise from PATH.

    The package comes first, because the programs of a virtual environment are not on PATH if the
    environment is not activated (with --no-build-isolation).
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
            "With --no-build-isolation the build tools must be installed first: run\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}\n"
            "or build without --no-build-isolation."
        )
    cmake, ninja, pybind11 = (str(path) for path in tools.values())
    return cmake, ninja, pybind11


def cuda_mode() -> str:
    """Value of CMake's option FLMOE_CUDA."""
    value = os.environ.get("FLMOE_CUDA", "")
    if value not in CUDA_MODES:
        stop(f"FLMOE_CUDA: expected 1, 0 or nothing, got {value!r}.")
    return CUDA_MODES[value]


def find_nvcc() -> str | None:
    """Path of nvcc: from environment variables, else on PATH, else where NVIDIA installs it."""
    path = os.environ.get("CUDACXX")
    if path:
        return shutil.which(path) or stop(f"CUDACXX={path!r} is not an executable program.")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in homes:
        nvcc = home and shutil.which("nvcc", path=str(Path(home) / "bin"))
        if nvcc:
            return nvcc
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def version_of(nvcc: str | None) -> str:
    """Output of nvcc --version; an upgrade can replace the program under the same path."""
    if nvcc is None:
        return ""
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    return result.stdout


def build_directory(*choices: str) -> Path:
    """Build folder that is kept, so that the next build compiles only what changed.

    CMake cannot change the Python, compiler, flags or source folder of an existing build folder, so
    each combination has its own.
    """
    key = "\0".join((str(ROOT), *choices))
    return ROOT / "build" / f"native-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


class CMakeExtension(Extension):
    """An extension whose sources are listed in CMakeLists.txt."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, compile and copy the module to where setuptools expects it."""

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
            # With build isolation the tools' paths differ in every build: set them every time.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DFLMOE_SANITIZE={choices['FLMOE_SANITIZE']}",
            f"-DFLMOE_CUDA={cuda}",
        ]
        if nvcc is not None:
            os.environ["CUDACXX"] = nvcc  # CMake reads this variable first
        self.run_cmake("configuring", configure)
        self.run_cmake("compiling", [cmake, "--build", str(folder)])

        built = folder / f"_native{suffix}"
        if not built.is_file():
            stop(f"CMake finished but did not build {built.name}; see the log above.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def run_cmake(self, step: str, command: list[str]) -> None:
        self.announce(f"flmoe_kernels: {step} the native module", level=2)
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            stop(
                f"{step} with CMake failed (exit code {code}); "
                "see the first line with 'error' in the log above."
            )


setup(
    ext_modules=[CMakeExtension("flmoe_kernels._native")],
    cmdclass={"build_ext": CMakeBuild},
)
