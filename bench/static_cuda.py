"""What nvcc made of the native module's CUDA kernels, without a GPU: python -m bench.static_cuda [--out FILE].

Reads the machine code of every architecture with cuobjdump, of NVIDIA's toolkit or of the package triton, and
writes registers, spilled bytes and shared memory per kernel. tests/core/test_cuda_static.py holds the module to
it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import rows
from flmoe_kernels.core.backend import native

RESULTS = Path(__file__).with_name("results") / "static" / "route.json"
_RESOURCES = re.compile(
    r"Function (\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) "
    r"LOCAL:(?P<local>\d+)"
)
# route_kernel<256, flmoe::route::PlaceRows> of a demangled name.
_KERNEL = re.compile(r"(\w+)<(\(int\))?(\d+), (.*)>\(")
_ATOMIC = re.compile(r"\b(?:atom|red)\.\S+")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture: per thread registers and spilled bytes, per block shared bytes."""

    kernel: str
    threads: int
    architecture: str
    registers: int
    spilled: int
    shared: int


def find_cuobjdump() -> str | None:
    """cuobjdump beside nvcc or on PATH, else the copy in the package triton; None where there is none."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    home = os.environ.get("CUDA_HOME")
    places += [Path(home) / "bin"] if home else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    on_path = shutil.which("cuobjdump")
    found = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return on_path or next(filter(None, found), None)


def lack() -> str:
    """Why nothing can be read here, or ""."""
    architectures, reason = native().cuda_build()
    if not architectures:
        return f"the native module was built without CUDA ({reason})"
    if find_cuobjdump() is None:
        return "there is no cuobjdump: not beside nvcc, not on PATH, not in the package triton"
    return "" if shutil.which("c++filt") else "there is no c++filt to read names with"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _dump(option: str) -> str:
    tool, module = find_cuobjdump(), native().__file__
    assert tool is not None
    assert module is not None
    return _output(tool, option, module)


def kernels() -> list[Kernel]:
    """Every kernel of the native module, by name and architecture."""
    found = []
    for part in _dump("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        label = re.search(r"arch = (sm_\d+)", part)
        assert label is not None
        # cuobjdump's versions differ in whether they show the "a" of sm_90a.
        exact = f"{label[1]}a"
        architecture = exact if exact in native().cuda_build()[0] else label[1]
        for match in _RESOURCES.finditer(part):
            name = _KERNEL.search(_output("c++filt", match[1]))
            assert name is not None, f"a kernel that is no block of routing: {match[1]}"
            found.append(
                Kernel(
                    re.sub(r"\bflmoe::(route::)?", "", name[4]).strip(),
                    int(name[3]),
                    architecture,
                    int(match["registers"]),
                    int(match["stack"]) + int(match["local"]),
                    int(match["shared"]),
                )
            )
    return sorted(found, key=lambda k: (k.kernel, k.threads, int(k.architecture[3:].rstrip("a"))))


def atomics() -> list[str]:
    """Atomic operations in the kernels' PTX; with none, no result can depend on who comes first."""
    ptx = _dump("--dump-ptx")
    assert "match.any" in ptx, "this is not the kernels' PTX"
    return _ATOMIC.findall(ptx)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that is written")
    out = parser.parse_args().out
    reason = lack()
    if reason:
        raise SystemExit(reason)
    nvcc = re.search(r"release (\S+),", _output("nvcc", "--version"))
    facts = {
        "nvcc": nvcc[1] if nvcc else None,
        "built_for": native().cuda_build()[0],
        "atomics": atomics(),
        "kernels": [asdict(kernel) for kernel in kernels()],
    }
    rows.save(out, facts)
    for kernel in kernels():
        print(
            f"{kernel.kernel:22} {kernel.threads:5} {kernel.architecture:7} {kernel.registers:4} registers, "
            f"{kernel.spilled} bytes spilled, {kernel.shared} bytes shared"
        )


if __name__ == "__main__":
    main()
