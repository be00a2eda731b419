"""The main job on real data: train the reference layer, swap it, show what changed and what not; then the
same tasks with the layer over token pairs, whose answers are explained exactly.

    python -m examples.digits [--out demo_out] [--seed 0] [--quick]

Needs scikit-learn, matplotlib and tqdm (the extra "demo") and no network.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Results

__all__ = ["main", "run"]

INTERRUPTED = 130
EXTRAS = ("sklearn", "matplotlib", "tqdm")


def run(out: str | Path = "demo_out", *, seed: int = 0, quick: bool = False) -> Results:
    """Run the demo and write OUT/demo.json, OUT/demo.png, OUT/demo_pairs.png and one checkpoint per task.

    Every file appears whole or not at all, whenever the run ends. Given the seed, everything but
    times and memory is the same in every run on one machine.

    Args:
        out: folder for the results; made if missing.
        seed: of the split, the pairs, the initial weights and the noise.
        quick: pass through every stage in seconds, learning next to nothing.

    Returns:
        All that was found.

    Raises:
        ModuleNotFoundError: an optional package is missing.
        OSError: the folder cannot be written.
        DemoError: the kernels are not built, or the swap left the layer.
    """
    # All of them now: a missing plotting package should not be found after the training.
    for name in EXTRAS:
        importlib.import_module(name)
    from rich.console import Console

    from .figure import write_figure
    from .pair_figure import write_pair_figure
    from .pipeline import run_pipeline
    from .report import print_report
    from .results import write_json
    from .settings import Settings

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    results = run_pipeline(Settings.choose(seed, quick), folder, console)
    write_json(results, folder / "demo.json")
    write_figure(results, folder / "demo.png")
    write_pair_figure(results.pairs, folder / "demo_pairs.png")
    print_report(results, console)
    console.print(
        f"{results.seconds:.0f} s; written: demo.json, demo.png, demo_pairs.png, checkpoints",
        end=" ",
    )
    console.print(f"in {folder}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(out: str | Path = "demo_out", *, seed: int = 0, quick: bool = False) -> int:
    """Run the demo as a command: 0 done, 1 the layers differ, 2 it cannot run, 130 interrupted.

    Raises:
        ModuleNotFoundError: an optional package is missing.
    """
    try:
        results = run(out, seed=seed, quick=quick)
    except KeyboardInterrupt:
        print("interrupted: files already written are whole", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from .pipeline import DemoError

        if not isinstance(error, DemoError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not results.same:
        print("error: the two layers differ by more than rounding; see the table", file=sys.stderr)
        return 1
    return 0
