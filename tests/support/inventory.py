"""Pytest plugin: records which operator, backend, dtype and behaviour the tests cover.

    FLMOE_INVENTORY=/tmp/seen PYTHONPATH=tests/support python -m pytest -p inventory
    python tests/support/inventory.py /tmp/seen > inventory.json

Processes that a test starts record as well, where they run pytest or Python with this environment.
A record is made at the kernel itself, below autograd and torch.compile.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("FLMOE_INVENTORY", "")
KERNEL_KEYS = ("CPU", "CUDA", "CompositeExplicitAutograd")
BACKENDS = ("reference", "cpu", "triton", "cuda")
SEEN: set[tuple[str, str, str, str]] = set()


def record(operator: str, args: tuple, behaviour: str) -> None:
    """Note (operator, backend, dtype, behaviour), as the arguments of a kernel show them."""
    import torch

    floats = [x for x in args if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
    dtype = str(floats[0].dtype).removeprefix("torch.") if floats else "-"
    named = [x for x in args if isinstance(x, str) and x in BACKENDS]
    SEEN.add((operator, named[-1] if named else "cpu", dtype, behaviour))


def wrap_registrations() -> None:
    """Record every call of a kernel that is registered from now on; opcheck and gradcheck are marked."""
    import torch

    register = torch.library.Library.impl
    active: list[str] = []

    @functools.wraps(register)
    def impl(
        library: Any, name: Any, kernel: Callable, dispatch_key: str = "", **options: Any
    ) -> Any:
        operator = str(name).removeprefix("flmoe::")
        if library.ns != "flmoe" or (dispatch_key or library.dispatch_key) not in KERNEL_KEYS:
            return register(library, name, kernel, dispatch_key, **options)

        @functools.wraps(kernel)
        def call(*args: Any) -> Any:
            record(operator, args, active[-1] if active else "call")
            return kernel(*args)

        return register(library, name, call, dispatch_key, **options)

    def marked(function: Callable, behaviour: str) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            active.append(behaviour)
            try:
                return function(*args, **kwargs)
            finally:
                active.pop()

        return call

    torch.library.Library.impl = impl
    torch.library.opcheck = marked(torch.library.opcheck, "opcheck")
    torch.autograd.gradcheck = marked(torch.autograd.gradcheck, "gradcheck")


def write() -> None:
    path = Path(FOLDER) / f"{os.getpid()}.json"
    path.write_text(json.dumps(sorted(SEEN)))


if FOLDER and __name__ != "__main__":
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    wrap_registrations()
    atexit.register(write)


def main(folder: str) -> None:
    seen = {
        tuple(row) for path in Path(folder).glob("*.json") for row in json.loads(path.read_text())
    }
    table: dict[str, dict[str, dict[str, list[str]]]] = {}
    for operator, backend, dtype, behaviour in sorted(seen):
        table.setdefault(operator, {}).setdefault(backend, {}).setdefault(dtype, []).append(
            behaviour
        )
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
