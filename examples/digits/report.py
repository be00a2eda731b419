"""Tables of the results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .data import EXPERTS


def print_report(results: Mapping[str, Any], console: Console) -> None:
    for make in (_accuracies, _token_pairs):
        console.print(make(results))
        console.print()
    task, result = list(results["tasks"].items())[-1]
    console.print(f"Report of swap, task {task}:\n{result['swap']}\n", soft_wrap=True, markup=False)


def _table(title: str, caption: str, *columns: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _accuracies(results: Mapping[str, Any]) -> Table:
    table = _table(
        "Test accuracy before and after the swap",
        f"{results['settings']['test_pairs']} pairs of images that were not used in training; "
        "changed: classified differently.",
        *("task", "label", "chance", "reference", "fast", "changed"),
    )
    for name, task in results["tasks"].items():
        accuracies = (task[key] for key in ("chance", "accuracy_before", "accuracy_after"))
        cells = (f"{accuracy:.1%}" for accuracy in accuracies)
        table.add_row(name, task["label"], *cells, str(task["changed_predictions"]))
    return table


def _add_shares(
    table: Table, start: list[str], cells: list[str], most: list[str], expected: str
) -> None:
    """Add a row of shares in the order of EXPERTS: "*" marks `most`, brackets `expected`; then yes, no or tied."""
    marked = []
    for expert, cell in zip(EXPERTS, cells, strict=True):
        cell = f"[{cell}]" if expert == expected else cell
        # Text instead of a string, because rich reads brackets in strings as markup.
        marked.append(Text(("*" if expert in most else "") + cell))
    verdict = Text("yes", "green") if most == [expected] else Text("no", "red")
    if expected in most and len(most) > 1:
        verdict = Text("tied", "yellow")
    table.add_row(*start, *marked, verdict)


def _token_pairs(results: Mapping[str, Any]) -> Table:
    layers, settings = results["token_pair_layer"], results["settings"]
    worst = max(layer["first_sample"]["error"] for layer in layers.values())
    table = _table(
        "The layer over token pairs, whose explanations are exact",
        "Share: |the expert's part of the true class's logit minus its mean over the classes|, in percent of the "
        "sum over experts. [ ] the expert that the labels need by construction, * the largest share, or "
        "those tied: within two standard errors or 5% of it.\n"
        "In the task redundant a single image determines the label: the uniqueness experts can learn it as "
        "well as the redundancy expert, and no loss prevents this.\n"
        "Every patch and pair of patches has an exact value, see the figures: the patches' values add up to "
        f"the logit minus the logit without patches, with an error of {worst:.0e}.\n"
        f"Trained for {settings['pair_steps']} steps of {settings['pair_batch_size']} pairs, the reference layer "
        f"for {settings['steps']} of {settings['batch_size']}.",
        *("task", "accuracy", *EXPERTS, "as expected"),
    )
    for name, layer in layers.items():
        cells = [f"{value:.0%}" for value in layer["share"].values()]
        start = [name, f"{layer['accuracy']:.1%}"]
        _add_shares(table, start, cells, layer["most_relied_on"], layer["expected_expert"])
    return table
