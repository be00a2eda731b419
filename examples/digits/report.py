"""The results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .data import EXPERTS
from .measure import GROUPS, Times
from .results import Results, TaskResult


def print_report(results: Results, console: Console) -> None:
    for table in _tables(results):
        console.print(table)
        console.print()


def _tables(results: Results) -> Iterator[Table]:
    yield _accuracies(results)
    yield _experts(results)
    yield _token_pairs(results)
    yield _differences(results)
    yield _costs(results)


def _table(title: str, caption: str, *columns: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _accuracies(results: Results) -> Table:
    samples = results.settings.test_pairs
    table = _table(
        "Test accuracy before and after the swap",
        f"{samples} pairs of digits that nothing was trained on; changed: classified differently.",
        *("task", "label", "chance", "reference", "fast", "changed"),
    )
    for result in results.tasks:
        table.add_row(
            result.task.name,
            result.task.meaning,
            f"{result.task.chance:.1%}",
            f"{result.before:.1%}",
            f"{result.after:.1%}",
            str(result.changed),
        )
    return table


def _experts(results: Results) -> Table:
    table = _table(
        "What each task relied on",
        "Share: |the expert's weighted logits less their mean over the classes|, all classes "
        "together, in percent of all experts'; below it the mean weight and the change of accuracy without it.\n"
        "[ ] the expert that the labels should need, * the one relied on most by that measure.",
        *("task", *EXPERTS, "as expected"),
    )
    for result in results.tasks:
        cells = [_expert_cell(result, e) for e in range(len(EXPERTS))]
        verdicts = [
            Text("yes", "green") if expected else Text("no", "red")
            for expected in result.as_expected.values()
        ]
        measures = Text(f"{result.task.name}\n  weight\n  without it")
        table.add_row(measures, *cells, Text("\n").join(verdicts), end_section=True)
    return table


def _expert_cell(result: TaskResult, e: int) -> Text:
    found, name = result.reliance, EXPERTS[e]
    change = round(100 * (found.without[e] - result.after))
    cells = {
        "share": f"{found.share[e]:.0%}",
        "weight": f"{found.weight[e]:.2f}",
        "accuracy_lost": f"{change:+d} pt",
    }
    if name == result.task.expert:
        cells = {measure: f"[{cell}]" for measure, cell in cells.items()}
    marks = {measure: "*" if most == name else "" for measure, most in found.most.items()}
    # Text, since brackets are rich's markup in a plain string.
    return Text("\n".join(marks[measure] + cell for measure, cell in cells.items()))


def _token_pairs(results: Results) -> Table:
    worst = max(result.sample.error for result in results.pairs)
    settings = results.settings
    table = _table(
        "The layer over token pairs, whose explanations are exact",
        "Share: |the expert's part of the true class's logit less its mean over the classes|, in "
        "percent of all experts'; marks as above.\n"
        "In the task redundant either image alone tells the label: the two uniqueness experts can carry it as "
        "well as redundancy, and no loss forbids it.\n"
        "Every patch and pair of patches has an exact value, see demo_pairs.png: the patches' values add up "
        f"to the logit less that of no patches, but for {worst:.0e}.\n"
        f"Trained for {settings.pair_steps} steps of {settings.pair_batch_size} pairs, "
        f"the reference layer for {settings.steps} of {settings.batch_size}.",
        *("task", "accuracy", *EXPERTS, "as expected"),
    )
    for result in results.pairs:
        cells = []
        for name, share in zip(EXPERTS, result.share, strict=True):
            cell = f"[{share:.0%}]" if name == result.task.expert else f"{share:.0%}"
            cells.append(Text(("*" if name == result.most else "") + cell))
        verdict = Text("yes", "green") if result.as_expected else Text("no", "red")
        table.add_row(result.task.name, f"{result.accuracy:.1%}", *cells, verdict)
    return table


def _differences(results: Results) -> Table:
    table = _table(
        "The same answers",
        "Largest absolute difference over all tasks, one batch each, no dropout, the same noise;\n"
        "then the distance of each layer from the reference in float64.",
        *("", "difference", "of values to", "reference", "fast", "rounding only"),
    )
    for group in GROUPS:
        found = results.worst(group)
        same = Text("yes", "green") if results.same_in(group) else Text("NO", "bold red")
        numbers = (found.largest, found.scale, found.reference_error, found.fast_error)
        table.add_row(group, *(f"{number:.1e}" for number in numbers), same)
    return table


def _costs(results: Results) -> Table:
    settings = results.settings
    busy = (
        f"\nOther programs were running (load {results.load:.1f}): take the times as indicative."
        if results.busy
        else ""
    )
    table = _table(
        "What it costs",
        f"Batch {settings.batch_size}, medians of alternating calls; memory: growth of the process "
        f"during one step.{busy}",
        *("", "reference", "fast", "ratio"),
    )
    for name, times in results.times.items():
        table.add_row(name, _ms(times.reference), _ms(times.fast), _ratio(times))
    reference, fast = (results.memory[which].bytes for which in ("reference", "fast"))
    ratio = f"{reference / fast:.1f}x" if fast else "-"
    table.add_row("peak memory of a step", f"{_mib(reference)}", f"{_mib(fast)}", ratio)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _ratio(times: Times) -> str:
    return f"{times.speed_up:.1f}x"
