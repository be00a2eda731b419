"""Findings as a self-contained web page with embedded figures, without scripts."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from flmoe_kernels.explain.estimators.indices import RG, SII
from flmoe_kernels.explain.estimators.results import MAGNITUDE
from flmoe_kernels.explain.reliability import CONFIDENCE_95, RULE

from .findings import TOP_ROWS, Findings
from .pictures import Picture
from .sentences import classes, interaction, overall

_TOP_TOKENS = 5
# With this policy a browser runs no script and loads no file, even if an escape were missing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .8rem; }
figcaption, .note { color: #444; font-size: .9rem; }
"""
_GLOSSARY = f"""<h2>How to read this</h2>
<dl><dt>0:3</dt><dd>The token at position 3 of modality 0; positions are counted from 0.</dd>
<dt>SII</dt><dd>Shapley interaction index: the effect of two tokens together minus their effects alone, averaged
over coalitions of the other tokens. Above 0: synergy, below 0: overlap.</dd>
<dt>RG</dt><dd>Redundancy gap: the part of the logit that either of the two tokens alone keeps. Substitutes have a
large RG and an SII below 0.</dd>
<dt>tied</dt><dd>Not distinguishable: the values differ by at most two standard errors or {RULE}.</dd>
<dt>95% interval</dt><dd>Of a pair's Monte Carlo estimate, 1.96 standard errors to both sides; none if exact, ? if
unknown. Among many pairs the largest value is more likely than the others to be too large. A larger budget reduces
the errors.</dd>
<dt>kind</dt><dd>Synergy: together the tokens have more than the sum of their effects, or less than the better one
alone. Redundancy: they share a part of their effect. Independent: their effects add up, whatever other tokens are
present. Undecided: not certain at this budget, or the sign depends on other tokens.</dd></dl>"""


def page(findings: Findings, pictures: Mapping[str, Picture], files: Sequence[str]) -> str:
    """Return the page. `pictures` maps file names to pictures; names with "sample_" belong to a sample."""
    title = f"Explanations of {findings.samples} samples"
    parameters = {
        **findings.sources,
        "layer": findings.layer,
        "samples": f"{findings.samples} of {findings.features.total}",
        **findings.request.as_dict(),
    }
    links = (f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in sorted(files))
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escape(overall(findings))}</p>",
        "<h2>Experts</h2>",
        _figure(pictures["expert_weights.png"]),
        "<h2>Does the model need the identified tokens?</h2>",
        "<p>The tokens that the explanation identifies, or all other tokens, are masked. Comprehensiveness should "
        "be higher, and sufficiency lower, than for as many random tokens. In the curves, bars are two standard "
        "errors over samples, if known, and the band is two standard deviations over repeats.</p>",
    ]
    for name, drops in findings.drops.items():
        body += [_figure(pictures[f"{name}.png"]), f"<pre>{escape(drops.table())}</pre>"]
    body += [_sample(findings, s, pictures) for s in range(findings.samples)]
    body += [
        _GLOSSARY,
        "<h2>Parameters</h2>",
        f"<pre>{escape(json.dumps(parameters, indent=1, default=str, ensure_ascii=False))}</pre>",
        f"<h2>Files</h2>\n<ul>{''.join(links)}</ul>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a table; cells are escaped here."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    lines = [line("th", columns), *(line("td", row) for row in rows)]
    return f"<table>\n<caption>{escape(caption)}</caption>\n" + "\n".join(lines) + "\n</table>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture[0]).decode("ascii")
    caption = escape(picture[1])
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{caption}">\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _sample(findings: Findings, s: int, pictures: Mapping[str, Picture]) -> str:
    weights = zip(findings.experts, findings.attribution.weights[s].tolist(), strict=True)
    notes = dict.fromkeys(note for values in findings.pairs[s].values() for note in values.notes)
    parts = [
        f'<h2 id="sample_{s}">Sample {s}: {escape(classes(findings, s))}</h2>',
        f"<p>{escape(interaction(findings, s))}.</p>",
        f"<p>Logit of the explained class {float(findings.logits[s, findings.target[s]]):.4g}. Weights of the "
        f"experts: {escape(', '.join(f'{name} {weight:.2f}' for name, weight in weights))}.</p>",
        _pairs_table(findings, s),
        *(f'<p class="note">note: {escape(note)}</p>' for note in notes),
        *(_figure(x) for name, x in pictures.items() if name.startswith(f"sample_{s:05d}_")),
        _tokens_table(findings, s),
    ]
    return "\n".join(parts)


def _pairs_table(findings: Findings, s: int) -> str:
    values, rows = findings.pairs[s], []
    for k in values[SII].ranked(TOP_ROWS, MAGNITUDE).tolist():
        numbers = (
            _with_interval(float(x.values[k]), float(x.standard_errors[k]))
            for x in (values[SII], values[RG])
        )
        rows.append((findings.pair_name(s, k), *numbers, *values[SII].kinds[k : k + 1]))
    caption = f"Top pairs by |{SII}|, in units of the logit, with 95% intervals"
    return _table(caption, ("tokens", SII, RG, "kind"), rows)


def _with_interval(value: float, error: float) -> str:
    """Format a number, "-" for NaN, with its 95% interval, "?" if it is unknown; none if exact."""
    if math.isnan(value):
        return "-"
    if math.isnan(error):
        return f"{value:+.3g} (?)"
    reach = CONFIDENCE_95 * error
    return f"{value:+.3g}" + (f" ({value - reach:+.2g} to {value + reach:+.2g})" if error else "")


def _tokens_table(findings: Findings, s: int) -> str:
    result, rows = findings.attribution, []
    for m, values in enumerate(result.of()):
        own = values[s].masked_fill(~result.valid[m][s], torch.nan).double().cpu().numpy()
        order = np.argsort(-np.abs(own), kind="stable")[: np.isfinite(own).sum()]
        names = (findings.token_name(s, m, k) for k in order[:_TOP_TOKENS].tolist())
        rows += [(name, f"{own[k]:+.3g}") for name, k in zip(names, order, strict=False)]
    caption = f"Tokens of largest |attribution| in each modality ({result.index})"
    return _table(caption, ("token", "value"), rows)
