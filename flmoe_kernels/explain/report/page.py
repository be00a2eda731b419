"""Findings as a self-contained web page with embedded figures, without scripts."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from flmoe_kernels.core.figures import printable
from flmoe_kernels.explain.attribution.targets import LOGIT
from flmoe_kernels.explain.estimators.indices import RG, SII
from flmoe_kernels.explain.estimators.results import MAGNITUDE
from flmoe_kernels.explain.figures.curves import METRIC_NAMES, compare
from flmoe_kernels.explain.masking.drops import MaskingDrops
from flmoe_kernels.explain.reliability import RULE

from .findings import TOP_ROWS, Findings, token_name, versions
from .pictures import Picture
from .sentences import classes, interaction, of_sample, overall, ranks

_TOP_TOKENS = 5
PM = "\N{PLUS-MINUS SIGN}"
# With this policy a browser runs no script and loads no file, even if an escape were missing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-top: 1px solid #bbb; padding-top: 1rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; max-width: calc(100vw - 2rem); }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top;
  max-width: 16rem; }
tbody th { font-weight: inherit; }
td.number, th.number { text-align: right; white-space: nowrap; }
.finding { font-size: 1.15rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
@media (max-width: 30rem) {
  h1 { font-size: 1.5rem; }
  h2 { font-size: 1.25rem; }
  table, dd { font-size: .8125rem; }
  th, td { padding-right: .5rem; }
  dd { margin-left: 1rem; }
}
"""


def page(findings: Findings, pictures: Mapping[str, Picture], files: Sequence[str]) -> str:
    """Return the page. `pictures` maps file names to pictures; names with "sample_" belong to a sample."""
    title = f"Explanations of {findings.features.samples} samples"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="finding">{escape(overall(findings))}</p>',
        _contents(findings),
        "<h2>Experts</h2>",
        _figure(pictures["expert_weights.png"]),
        "<h2>Does the model need the identified tokens?</h2>",
        "<p>The tokens that the explanation identifies, or all other tokens, are masked. Comprehensiveness should "
        "be higher, and sufficiency lower, than for as many random tokens; a gap within two standard errors is "
        "not distinguishable. In the curves, bars are two standard errors over samples, if known, and the band is "
        "two standard deviations over repeats.</p>",
        _figure(pictures["faithfulness.png"]),
        _aopc(findings),
        *(_figure(pictures[f"pair_masking_{name}.png"]) for name in findings.pair_masking),
        *(_sample(findings, s, pictures) for s in range(findings.features.samples)),
        _glossary(findings),
        "<h2>Parameters</h2>",
        _summary(findings),
        _footer(findings, files),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1
) -> str:
    """Format a table: the first `words` columns are text, the others numbers. Cells are escaped here."""

    def cell(tag: str, place: int, value: Any) -> str:
        kind = "" if place < words else ' class="number"'
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", place, name) for place, name in enumerate(columns))
    lines = [
        "<tr>" + "".join(cell("td", place, value) for place, value in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return _framed_table(caption, f"<thead><tr>{head}</tr></thead>\n", lines)


def _framed_table(caption: str, head: str, lines: Sequence[str]) -> str:
    return (
        # Wide tables scroll alone; the focus lets them scroll by keyboard.
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n{head}<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div>"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _summary(findings: Findings) -> str:
    request, layer = findings.request, findings.layer
    architecture = layer["architecture"]
    facts = {
        **findings.sources,
        "layer": f"{architecture['compat']}, {architecture['num_modalities']} modalities of width "
        f"{architecture['hidden_dim']}, {architecture['num_classes']} classes, {layer['num_heads']} heads, "
        f"temperature {layer['temperature']:g}",
        "tokens by modality": ", ".join(map(str, findings.features.lengths)),
        "samples": f"{findings.features.samples} of {findings.features.total}",
        "experts": ", ".join(findings.experts),
        "scores of tokens": request.attribution,
        "pairs": f"{request.pairs}, of the {request.top} tokens of largest score in each modality",
        "values of pairs": f"{request.method}, at most {request.budget} coalitions per sample",
        "class explained": request.target
        or ("predicted" if findings.features.labels is None else "label"),
        "absent tokens": request.fill,
        "first token never masked": ", ".join(map(findings.modality, request.exempt)) or "-",
        "random sets of tokens": f"{request.repeats}, seed {request.seed}",
    }
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(printable(str(value)))}</td></tr>'
        for name, value in facts.items()
    ]
    return _framed_table("Request", "", lines)


def _contents(findings: Findings) -> str:
    """Format the findings of the samples, with links."""
    lines = []
    for s in range(findings.samples):
        name, _, finding = of_sample(findings, s).partition(",")
        lines.append(f'<li><a href="#sample_{s}">{name}</a>,{escape(finding)}</li>')
    return f'<nav aria-label="Samples"><ul>{"".join(lines)}</ul></nav>'


def _aopc(findings: Findings) -> str:
    rows: list[tuple[str, ...]] = []
    measured: dict[str, MaskingDrops] = {findings.attribution.index: findings.faithfulness}
    measured |= {f"pairs by {name}": drops for name, drops in findings.pair_masking.items()}
    for name, drops in measured.items():
        for row in drops.rows():
            if row["metric"] == findings.metric and row["budget"] is None:
                verdict = compare(drops, row["kind"], findings.metric) or "-"
                own = _with_error(row["identified"], row["standard_error"])
                random = _with_error(row["random"], row["random_std"])
                gap = _with_error(row["gap"], 0.0)
                rows.append((f"{name}: {row['kind']}", verdict, own, random, gap))
    metric = METRIC_NAMES[findings.metric]
    table = _table(
        f"Mean drop of the target's {metric} over the budgets (AOPC); identified {PM} standard error, random {PM} "
        "standard deviation over repeats; gap above 0: better than random",
        ("tokens by", "verdict", "identified", "random", "gap"),
        rows,
        words=2,
    )
    why = "The layer has one class, whose probability is always 1: its logit is shown."
    about = [why] if findings.metric == LOGIT else []
    return table + _paragraphs(
        *about, *_notes(findings, {name: drops.notes for name, drops in measured.items()})
    )


def _paragraphs(*sentences: str) -> str:
    return "\n".join(f'<p class="note">{escape(sentence)}</p>' for sentence in sentences)


def _notes(findings: Findings, notes: Mapping[str, Sequence[str]]) -> list[str]:
    """The notes of results as sentences, each once; with the names of the results, unless all have it."""
    names: dict[str, list[str]] = {}
    for name, own in notes.items():
        for note in own:
            names.setdefault(note, []).append(name)
    sentences = []
    for note, of in names.items():
        note = re.sub(r"modality (\d+)", lambda found: findings.modality(int(found[1])), note)
        text = f"for {' and '.join(of)}, {note}." if len(of) < len(notes) else f"{note}."
        sentences.append(text[0].upper() + text[1:])
    return sentences


def _sample(findings: Findings, s: int, pictures: Mapping[str, Picture]) -> str:
    weights = findings.attribution.weights[s].tolist()
    experts = zip(findings.experts, weights, strict=True)
    first = findings.pairs[s][SII]
    how = first.method.replace("_", " ")
    if not first.exact:
        how = f"estimated from {first.draws} draws"
    note = (
        f"{len(first)} candidates: {first.candidates}, of {first.players} valid tokens; {how}, "
        f"{first.evaluations} coalitions evaluated."
    )
    notes = _notes(findings, {name: x.notes for name, x in findings.pairs[s].items()})
    finding = interaction(findings, s)
    parts = [
        f'<section id="sample_{s}" aria-labelledby="title_{s}">',
        f'<h2 id="title_{s}">Sample {s}: {escape(classes(findings, s))}</h2>',
        f"<p>{escape(finding[0].upper() + finding[1:])}.</p>",
        f"<p>Logit of the explained class {float(findings.logits[s, findings.target[s]]):.4g}. Weights of the "
        "experts: "
        + escape(", ".join(f"{name} {weight:.2f}" for name, weight in experts))
        + ".</p>",
        _pairs_table(findings, s),
        _paragraphs(note, *notes),
        *(_figure(x) for name, x in pictures.items() if name.startswith(f"sample_{s:05d}_")),
        _tokens_table(findings, s),
        "</section>",
    ]
    return "\n".join(parts)


def _pairs_table(findings: Findings, s: int) -> str:
    values = findings.pairs[s]
    rows, places = [], ranks(values[SII].values, values[SII].standard_errors)
    for k in values[SII].ranked(TOP_ROWS, MAGNITUDE):
        tokens = values[SII].tokens[values[SII].pairs[k]].tolist()
        names = (token_name(findings, s, m, position) for m, position in tokens)
        numbers = (
            _with_error(float(x.values[k]), float(x.standard_errors[k]), "+")
            for x in (values[SII], values[RG])
        )
        rows.append((places[k], " with ".join(names), *numbers))
    return _table(
        f"Top pairs by |{SII}|, in units of the logit, {PM} standard error",
        ("rank", "tokens", SII, RG),
        rows,
        words=2,
    )


def _with_error(value: float, error: float, sign: str = "") -> str:
    """Format a number, "-" for NaN, with its error, "?" for NaN."""
    if math.isnan(value):
        return "-"
    known = "?" if math.isnan(error) else f"{error:.2g}"
    return f"{value:{sign}.3g}" + (f" {PM} {known}" if error else "")


def _tokens_table(findings: Findings, s: int) -> str:
    result = findings.attribution
    rows = []
    for m, values in enumerate(result.of()):
        own = values[s].masked_fill(~result.valid[m][s], torch.nan).double().cpu().numpy()
        places = ranks(own, np.zeros_like(own))
        order = np.argsort(-np.abs(own), kind="stable")[: np.isfinite(own).sum()]
        for k in order[:_TOP_TOKENS].tolist():
            rows.append((places[k], token_name(findings, s, m, k), f"{own[k]:+.3g}"))
    return _table(
        f"Tokens of largest |attribution| in each modality ({result.index})",
        ("rank", "token", "value"),
        rows,
        words=2,
    )


def _glossary(findings: Findings) -> str:
    names = findings.request.modality_names
    first = "0" if names is None else escape(printable(names[0]))
    return (
        "<h2>How to read this</h2>\n"
        f"<dl>\n<dt>{first}:3</dt><dd>The token at position 3 of {escape(findings.modality(0))}; positions are "
        "counted from 0.</dd>\n"
        "<dt>SII</dt><dd>Shapley interaction index: the effect of two tokens together minus their effects "
        "alone, averaged over coalitions of the other tokens. Above 0: synergy, below 0: overlap.</dd>\n"
        "<dt>RG</dt><dd>Redundancy gap: the part of the logit that either of the two tokens alone keeps. "
        "Substitutes have a large RG and an SII below 0.</dd>\n"
        "<dt>rank, tied</dt><dd>Values are tied, that is, not distinguishable, if they differ by at most two "
        f"standard errors or {RULE}. Values that are tied, directly or through others, share a "
        "rank; a value of unknown error has none (?). In figures, pairs tied by their errors look alike. A larger "
        "budget reduces the errors.</dd>\n"
        "<dt>standard error</dt><dd>Of a pair's Monte Carlo estimate; none if exact, ? if unknown. Among many "
        "pairs the largest value is more likely than the others to be too large.</dd>\n</dl>"
    )


def _footer(findings: Findings, files: Sequence[str]) -> str:
    links = "".join(
        f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in sorted(files)
    )
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"<h2>Files</h2>\n<ul>{links}</ul>\n"
        f'<p class="note">Seed {findings.request.seed}; {escape(software)}.</p>'
    )
