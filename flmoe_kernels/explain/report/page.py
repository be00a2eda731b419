"""Findings as a self-contained web page with embedded figures, without scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flmoe_kernels.core.figures import printable
from flmoe_kernels.explain.attribution.targets import PROB
from flmoe_kernels.explain.estimators.indices import RG, SII
from flmoe_kernels.explain.estimators.results import MAGNITUDE
from flmoe_kernels.explain.masking.drops import MaskingDrops

from .findings import TOP_ROWS, Findings, token_name, versions
from .pictures import Picture

_TOP_TOKENS = 5
# With this policy a browser runs no script and loads no file, even if an escape were missing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-top: 1px solid #bbb; padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
tbody th { font-weight: inherit; }
td.number, th.number { text-align: right; overflow-wrap: normal; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
"""


def page(findings: Findings, pictures: Mapping[str, Picture], files: Sequence[str]) -> str:
    """Return the page. `pictures` maps file names to pictures; names with "sample_" belong to a sample."""
    title = f"Explanations of {findings.features.samples} samples"
    body = [
        f"<h1>{escape(title)}</h1>",
        _contents(findings),
        _summary(findings),
        "<h2>Experts</h2>",
        _figure(pictures["expert_weights.png"]),
        "<h2>Does the model need the identified tokens?</h2>",
        "<p>The tokens that the explanation identifies, or all other tokens, are masked. Comprehensiveness should "
        "be higher, and sufficiency lower, than for as many random tokens.</p>",
        _figure(pictures["faithfulness.png"]),
        _aopc(findings),
        *(_figure(pictures[f"pair_masking_{name}.png"]) for name in findings.pair_masking),
        *(_sample(findings, s, pictures) for s in range(findings.features.samples)),
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


def _facts(caption: str, facts: Mapping[str, Any]) -> str:
    """Format a table of names and values; the name is the header of its row."""
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    ]
    return _framed_table(caption, "", lines)


def _framed_table(caption: str, head: str, lines: Sequence[str]) -> str:
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n{head}<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>"
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
        "experts": ", ".join(findings.attribution.experts),
        "scores of tokens": request.attribution,
        "pairs": f"{request.pairs}, of the {request.top} tokens of largest score in each modality",
        "values of pairs": f"{request.method}, at most {request.budget} coalitions per sample",
        "class explained": request.target
        or ("predicted" if findings.features.labels is None else "label"),
        "absent tokens": request.fill,
        "first token never masked": ", ".join(f"modality {m}" for m in request.exempt) or "-",
        "random sets of tokens": f"{request.repeats}, seed {request.seed}",
    }
    return _facts("Request", {name: printable(str(x)) for name, x in facts.items()})


def _contents(findings: Findings) -> str:
    """Format the links to the samples."""
    links = "".join(
        f'<li><a href="#sample_{s}">Sample {s}</a></li>' for s in range(findings.features.samples)
    )
    return f'<nav aria-label="Samples"><ul>{links}</ul></nav>'


def _aopc(findings: Findings) -> str:
    rows = []
    measured: dict[str, MaskingDrops] = {findings.attribution.index: findings.faithfulness}
    measured |= {f"pairs by {name}": drops for name, drops in findings.pair_masking.items()}
    for name, drops in measured.items():
        for row in drops.rows():
            if row["metric"] == PROB and row["budget"] is None:
                numbers = (row[key] for key in ("identified", "random", "random_std", "gap"))
                rows.append((name, row["kind"], *(_number(x) for x in numbers)))
    return _table(
        "Mean drop of the target's probability over the budgets (AOPC); gap above 0: better than random",
        ("tokens identified by", "measure", "identified", "random", "std of random", "gap"),
        rows,
        words=2,
    )


def _sample(findings: Findings, s: int, pictures: Mapping[str, Picture]) -> str:
    target, label = int(findings.target[s]), findings.label(s)
    weights = findings.attribution.weights[s].tolist()
    experts = zip(findings.attribution.experts, weights, strict=True)
    first = findings.pairs[s][SII]
    text = "" if label is None else f", label {label}"
    how = first.method.replace("_", " ")
    if not first.exact:
        how = f"estimated from {first.draws} draws"
    note = (
        f"{len(first)} candidates: {first.candidates}, of {first.players} valid tokens; {how}, "
        f"{first.evaluations} coalitions evaluated."
    )
    parts = [
        f'<section id="sample_{s}" aria-labelledby="title_{s}">',
        f'<h2 id="title_{s}">Sample {s}</h2>',
        f"<p>Explained: class {target} (logit {float(findings.logits[s, target]):.4g}); predicted "
        f"{findings.predicted[s]}{escape(text)}. Weights of the experts: "
        + escape(", ".join(f"{name} {weight:.2f}" for name, weight in experts))
        + ".</p>",
        _pairs_table(findings, s),
        f'<p class="note">{escape(note)}</p>',
        *(_figure(x) for name, x in pictures.items() if name.startswith(f"sample_{s:05d}_")),
        _tokens_table(findings, s),
        "</section>",
    ]
    return "\n".join(parts)


def _pairs_table(findings: Findings, s: int) -> str:
    values = findings.pairs[s]
    rows = []
    for k in values[SII].ranked(TOP_ROWS, MAGNITUDE):
        tokens = values[SII].tokens[values[SII].pairs[k]].tolist()
        names = (token_name(findings, s, m, position) for m, position in tokens)
        numbers = []
        for name in (SII, RG):
            numbers += [
                f"{values[name].values[k]:+.3g}",
                _number(float(values[name].standard_errors[k])),
            ]
        rows.append((*names, *numbers))
    return _table(
        f"Top pairs by |{SII}|, in units of the logit",
        ("token", "token", SII, "std. error", RG, "std. error"),
        rows,
        words=2,
    )


def _tokens_table(findings: Findings, s: int) -> str:
    result = findings.attribution
    rows = []
    for m, values in enumerate(result.of()):
        size = values[s].abs().masked_fill(~result.valid[m][s], -1.0)
        for position in size.sort(descending=True, stable=True)[1][:_TOP_TOKENS].tolist():
            if bool(result.valid[m][s, position]):
                name = token_name(findings, s, m, position)
                rows.append((name, f"{float(values[s, position]):+.3g}"))
    return _table(
        f"Tokens of largest attribution in each modality ({result.index})", ("token", "value"), rows
    )


def _footer(findings: Findings, files: Sequence[str]) -> str:
    links = "".join(
        f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in sorted(files)
    )
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        "<h2>How to read this</h2>\n"
        "<dl>\n<dt>0:3</dt><dd>The token at position 3 of modality 0, both counted from 0.</dd>\n"
        "<dt>SII</dt><dd>Shapley interaction index: the effect of two tokens together minus their effects "
        "alone, averaged over coalitions of the other tokens. Above 0: synergy, below 0: overlap.</dd>\n"
        "<dt>RG</dt><dd>Redundancy gap: the part of the logit that either of the two tokens alone keeps. "
        "Substitutes have a large RG and an SII below 0.</dd>\n"
        "<dt>std. error</dt><dd>Standard error of a pair's Monte Carlo estimate; 0 if exact. Among many pairs "
        "the largest value is more likely than the others to be too large.</dd>\n</dl>\n"
        f"<h2>Files</h2>\n<ul>{links}</ul>\n"
        f'<p class="note">Seed {findings.request.seed}; {escape(software)}.</p>'
    )


def _number(value: float) -> str:
    """Format a number; NaN, such as the spread of no repeats, is a dash."""
    return f"{value:.3g}" if value == value else "-"
