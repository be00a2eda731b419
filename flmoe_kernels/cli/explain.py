"""The command `explain`: explains samples of a trained layer and writes a page with figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import fail, needs_extra
from .options import GateName, Heads, LayerName, Temperature, TopK


def explain(
    checkpoint: Annotated[
        Path, typer.Option(help="Checkpoint of the published or the fast layer.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="NumPy .npz file with inputs_0, inputs_1, ... (samples, tokens, width). Optional: masks_0, ..., "
            "tokens_0, ... (text), image_0, ..., labels; see docs/explain.md."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; created if missing.")] = Path(
        "explain_out"
    ),
    samples: Annotated[
        int | None, typer.Option(help="Number of samples to explain; default 4.")
    ] = None,
    attribution: Annotated[
        str | None,
        typer.Option(
            help="Method for token scores: gradient_rollout (default), attention_rollout or integrated_gradients."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Method for token pairs: auto (default), exact or sampling.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Evaluations of the layer per sample; default 3072.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(help="Number of tokens per modality whose pairs are scored; default 5."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="Token pairs: across modalities (across, default), all, or screened from those of all tokens."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Class to explain: label, predicted or a number; default: label if given, else predicted."
        ),
    ] = None,
    fill: Annotated[
        str | None, typer.Option(help="How tokens are removed: zero (default), mean or drop.")
    ] = None,
    exempt: Annotated[
        list[int] | None,
        typer.Option(
            help="Modality whose token 0 is never masked (a class token, for example); repeatable."
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Random token sets to compare the identified tokens with; default 10."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed; default 0.")] = None,
    modality_names: Annotated[
        str | None,
        typer.Option(help="Names of the modalities for the page, separated by commas: text,image."),
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(help="Names of the classes for the page, separated by commas.")
    ] = None,
    heads: Heads = None,
    temperature: Temperature = None,
    layer: LayerName = None,
    gate: GateName = None,
    top_k: TopK = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace the files of an earlier run in the folder; other files stay."
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One sample and few evaluations, to try the command.")
    ] = False,
) -> None:
    """Explain predictions by experts, tokens and token pairs; writes an HTML page with figures."""
    options = dict(locals())
    from flmoe_kernels.explain.report.request import Request

    settings = {name: options.pop(name) for name in ("temperature", "layer", "gate", "top_k")}
    options["layer"] = {"num_heads": options.pop("heads"), **settings}
    options["exempt"] = tuple(exempt or ())
    for name in ("modality_names", "class_names"):
        if options[name] is not None:
            options[name] = tuple(part.strip() for part in options[name].split(","))
    del options["force"]
    try:
        request = Request.of(options, options.pop("quick"))
    except ValueError as error:
        fail(str(error))
    with needs_extra("demo"):
        from flmoe_kernels.explain.report.command import main

        raise typer.Exit(main(request, force=force))
