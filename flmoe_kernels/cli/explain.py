"""The command `explain`: encoded samples and a checkpoint in, a folder with findings and a page out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import fail, needs_extra


def explain(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of the published layer.")],
    data: Annotated[
        Path,
        typer.Option(
            help="An .npz: inputs_0, inputs_1, .. (samples, tokens, width); if known masks_0, .., "
            "tokens_0, .., image_0, .., labels."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results, made if missing.")] = Path(
        "explain_out"
    ),
    samples: Annotated[int | None, typer.Option(help="The first so many; default 4")] = None,
    attribution: Annotated[
        str | None, typer.Option(help="Scores of tokens; default gradient_rollout")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Of pairs: auto, exact or sampling; default auto")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Coalitions evaluated for a sample; default 3072")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(help="Tokens of a modality whose pairs are asked about; default 5"),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Across modalities, or all; default across")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="label, predicted or a class; default label if known, else predicted"),
    ] = None,
    fill: Annotated[
        str | None, typer.Option(help="Absent tokens: zero, mean or drop; default zero")
    ] = None,
    exempt: Annotated[
        list[int] | None,
        typer.Option(help="A modality whose token 0 drop curves never mask; may be repeated."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Random sets next to identified ones; default 10")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of coalitions and random sets; default 0")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="See swap; default 4")] = None,
    temperature: Annotated[float | None, typer.Option(help="See swap; default 1.0")] = None,
    gate: Annotated[str | None, typer.Option(help="See swap.")] = None,
    top_k: Annotated[int | None, typer.Option(help="See swap; default 2; Switch: 1")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One sample, hardly estimated.")] = False,
) -> None:
    """Explain samples: experts, tokens, token pairs, and whether the model needs them; as a page."""
    options = dict(locals())
    from flmoe_kernels.explain.report.request import Request

    layer = {name: options.pop(name) for name in ("temperature", "gate", "top_k")}
    options["layer"] = {"num_heads": options.pop("heads"), **layer}
    options["exempt"] = tuple(exempt or ())
    try:
        request = Request.of(options, options.pop("quick"))
    except ValueError as error:
        fail(str(error))
    with needs_extra("demo"):
        from flmoe_kernels.explain.report.command import main

        raise typer.Exit(main(request))
