"""Resources of the CUDA kernels in the native module, without a GPU: python -m bench.aot.cuda."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass

import triton

from flmoe_kernels.core.backend import native

_RESOURCES = re.compile(
    r"Function (\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) "
    r"LOCAL:(?P<local>\d+)"
)
# pair_kernel<flmoe::BFloat16, 4, (flmoe::cuda::PairMode)0> of a demangled name.
_KERNEL = re.compile(r"(\w+)<(.*?)>\(")


@dataclass(frozen=True)
class Kernel:
    """A kernel for an architecture: registers and spilled bytes per thread, static shared bytes per block."""

    kernel: str
    arguments: str
    architecture: str
    registers: int
    spilled: int
    shared: int
    instructions: int
    matrix: int


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dump(option: str) -> str:
    """Output of Triton's cuobjdump for the native module."""
    module = native().__file__
    assert module is not None
    return output(triton.knobs.nvidia.cuobjdump.path, option, module)


def kernels() -> list[Kernel]:
    """All kernels of the native module, by name and architecture."""
    architectures = native().cuda_build()[0]
    code: dict[tuple[str, str], tuple[int, int]] = {}
    for label, part in _parts(dump("--dump-sass"), architectures):
        for name, text in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", part, re.DOTALL):
            lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)
            code[label, name] = (len(lines), sum("HMMA" in line for line in lines))
    found = []
    for label, part in _parts(dump("--dump-resource-usage"), architectures):
        for match in _RESOURCES.finditer(part):
            demangled = output("c++filt", match[1])
            plain = re.sub(r"\bflmoe::(\w+::)*|\(anonymous namespace\)::", "", demangled)
            name = _KERNEL.search(plain)
            assert name is not None, demangled
            instructions, matrix = code[label, match[1]]
            found.append(
                Kernel(
                    kernel=name[1],
                    arguments=name[2].strip(),
                    architecture=label,
                    registers=int(match["registers"]),
                    spilled=int(match["stack"]) + int(match["local"]),
                    shared=int(match["shared"]),
                    instructions=instructions,
                    matrix=matrix,
                )
            )
    return found


def _parts(text: str, architectures: str) -> list[tuple[str, str]]:
    """The output for each architecture."""
    found = []
    for part in re.split("Fatbin elf code:", text)[1:]:
        label = re.search(r"arch = (sm_\d+)", part)
        assert label is not None
        # Some versions of cuobjdump omit the "a" of sm_90a.
        architecture = f"{label[1]}a" if f"{label[1]}a" in architectures else label[1]
        found.append((architecture, part))
    return found


if __name__ == "__main__":
    assert shutil.which("c++filt"), "c++filt is not installed"
    rows = [asdict(kernel) for kernel in kernels()]
    print("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
