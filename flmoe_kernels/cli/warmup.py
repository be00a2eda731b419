"""The command `warmup`: compiles Triton kernels before their first call."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from .errors import fail, needs_extra
from .options import (
    Batch,
    GateName,
    Heads,
    LayerName,
    Temperature,
    Tokens,
    TopK,
    Valid,
    numbers,
    refuse,
)


def warmup(
    op: Annotated[
        list[str] | None, typer.Option(help="An operator, repeatable. Default: all.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A named shape, repeatable. Default: all of the operators."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="A data type, repeatable. Default: bfloat16.")
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            help="forward or forward+backward, repeatable. Default: both (inference and training of a layer).",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="GPU, for example sm_90; it need not exist. Default: the GPU here."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one per processor.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of your own layer, instead of --op and --shape.")
    ] = None,
    batch: Batch = None,
    tokens: Tokens = None,
    valid: Valid = None,
    heads: Heads = None,
    temperature: Temperature = None,
    layer: LayerName = None,
    gate: GateName = None,
    top_k: TopK = None,
) -> None:
    """Compile Triton's kernels in parallel into its cache, before their first call, also without a GPU."""
    settings = {"temperature": temperature, "layer": layer, "gate": gate, "top_k": top_k}
    with needs_extra("triton"):
        import triton

    from flmoe_kernels.profile import first_use
    from flmoe_kernels.profile.cases import BOTH, FORWARD, cases
    from flmoe_kernels.profile.user_layer import user_shape
    from flmoe_kernels.profile.warmup import call_of, target_of, warm_up

    start = time.monotonic()
    phases = phase or (FORWARD, BOTH)
    try:
        gpu = target_of(target)
        if checkpoint is None:
            refuse(batch=batch, tokens=tokens, valid=valid, heads=heads, **settings)
            chosen = cases(op, shape, phases, dtype, device="cuda")
        else:
            refuse(op=op, shape=shape)
            sizes = numbers("tokens", tokens), numbers("valid", valid)
            user = user_shape(str(checkpoint), batch, *sizes, {"num_heads": heads, **settings})
            chosen = cases(["interaction_moe"], [user], phases, dtype or [user.dtype], device="cpu")
        if not chosen:
            fail("expected shapes of the operators, got none")
        checked = dict.fromkeys((case.operator, case.dtype) for case in chosen)
        calls = [*map(call_of, chosen), *first_use.calls(checked)]
        warmed = warm_up(calls, gpu, jobs or len(os.sched_getaffinity(0)))
    except (ValueError, RuntimeError) as error:  # BadRequest, CheckpointError, BackendUnavailable
        fail(str(error))
    for failure in warmed.failures:
        typer.echo(f"error: {failure}", err=True)
    typer.echo(
        f"{gpu}: {warmed.compiled} kernels compiled, {warmed.found} found in {triton.knobs.cache.dir}, "
        f"{time.monotonic() - start:.0f} s"
    )
    raise typer.Exit(code=1 if warmed.failures else 0)
