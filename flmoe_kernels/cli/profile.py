"""The command `profile`: time, rates and stages of an operator or of a trained layer on this machine."""

from __future__ import annotations

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


def profile(
    op: Annotated[
        str | None,
        typer.Option(
            help="Operator: pair_moe, expert_attention, routed_mlp, routing or interaction_moe."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Named shape of the operator; an unknown name lists them. Default: the first."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Data type; default float32, on a GPU bfloat16.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="A backend; repeat the option to compare several with the first; all: every backend that "
            "runs here. Default: the backend that is selected for the device."
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            "--pass",
            help="forward, backward or forward+backward (default); for a layer also inference or training. "
            "With --checkpoint the default is inference and training.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    variant: Annotated[
        str | None,
        typer.Option(
            help="Variant of the operator, for example pool for pair_moe; default: the first."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of your own layer: profiles it swapped, next to the reference."
        ),
    ] = None,
    batch: Batch = None,
    tokens: Tokens = None,
    valid: Valid = None,
    heads: Heads = None,
    temperature: Temperature = None,
    layer: LayerName = None,
    gate: GateName = None,
    top_k: TopK = None,
    seconds: Annotated[
        float,
        typer.Option(
            help="Seconds of timing per implementation. Slow calls take longer; they are timed less often."
        ),
    ] = 5.0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a trace to this file, for https://ui.perfetto.dev."),
    ] = None,
    roofline: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with the roofline of this machine to this file; *.svg or *.png: a picture."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all results to this JSON file.")
    ] = None,
    check: Annotated[bool, typer.Option(help="First compare results with the reference.")] = True,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, in separate processes.")
    ] = True,
) -> None:
    """Time an operator or your own layer on this machine: rates, share of the hardware limit, stages, memory."""
    from flmoe_kernels.core.backend import BackendUnavailable
    from flmoe_kernels.profile.check import WrongAnswer
    from flmoe_kernels.profile.request import Request
    from flmoe_kernels.profile.run import Files, run
    from flmoe_kernels.profile.user_layer import user_shape

    if (op is None) == (checkpoint is None):
        fail("expected either --op or --checkpoint, got " + ("both" if op else "neither"))
    settings = {"temperature": temperature, "layer": layer, "gate": gate, "top_k": top_k}
    files = Files(trace=trace, json=json_file, roofline=roofline)
    try:
        files.require_writable()
        if not seconds > 0:
            fail(f"seconds: expected a positive number, got {seconds}")
        phases: list[str | None]
        with needs_extra("demo"):
            if checkpoint is not None:
                refuse(shape=shape, variant=variant)
                sizes = numbers("tokens", tokens), numbers("valid", valid)
                user = user_shape(str(checkpoint), batch, *sizes, {"num_heads": heads, **settings})
                phases = [phase] if phase else ["training", "inference"]
            else:
                refuse(batch=batch, tokens=tokens, valid=valid, heads=heads, **settings)
                phases = [phase]
            names = (op or "interaction_moe", shape if checkpoint is None else user, dtype)
            requests = [
                Request(*names, tuple(backend or ()), each, device, variant) for each in phases
            ]
            run(requests, seconds, files, check=check, memory=memory)
    except WrongAnswer as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(code=1) from error
    except (ValueError, BackendUnavailable) as error:  # BadRequest, CheckpointError and others
        fail(str(error))
