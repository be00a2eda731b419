"""The command `check`: kernels that run here, compared with the reference."""

from __future__ import annotations

import typer

from .errors import PACKAGE


def check() -> None:
    """Check this installation: compare every kernel that can run here with the reference, forward and backward."""
    import torch

    from flmoe_kernels.core.backend import CAPABILITIES, CPU, REFERENCE, backend_status
    from flmoe_kernels.core.dtypes import dtype_name
    from flmoe_kernels.profile.first_use import failure

    wrong = 0
    for backend, (runs, reason) in backend_status().items():
        if not runs:
            typer.echo(f"not checked: {backend}: {reason}")
            wrong += backend == CPU  # every installation has the CPU kernels
        if not runs or backend == REFERENCE:
            continue
        on_gpu = backend != CPU and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        for op, backends in CAPABILITIES.items():
            for dtype in backends.get(backend, ()):
                error = failure(op, backend, dtype, device)
                wrong += bool(error)
                name = f"{op} {backend} {dtype_name(dtype)}"
                typer.echo(f"WRONG: {name}: {error}" if error else f"right: {name}")
    if wrong:
        typer.echo(f"error: {wrong} checks of {PACKAGE} failed", err=True)
        raise typer.Exit(code=1)
