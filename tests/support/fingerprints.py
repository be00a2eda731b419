"""Writer of flmoe_kernels/published/fingerprints.py, from checkouts of the published repositories.

    python -m tests.support.fingerprints fl_i2moe=PATH i2moe=PATH fastmoe=PATH

PATH is a git checkout. Every version in its history counts; of FastMoE, the releases from 1.0 on and HEAD.
Run `make format` afterwards.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from flmoe_kernels.published import fingerprints
from flmoe_kernels.published.source import fingerprint
from tests.support import fastmoe, lineage, lineage_sparse

# The classes that a file's layers consist of; empty for all classes and functions.
LINEAGE = {
    "src/imoe/InteractionMoE.py": (),
    "src/imoe/InteractionMoERegression.py": ("InteractionMoERegression",),
    "src/common/fusion_models/transformer.py": (),
    "src/common/modules/common.py": ("MLP",),
    "src/common/modules/moe.py": (),
    "src/common/modules/transformer.py": ("Attention", "Linear", "MLP", "TransformerEncoderLayer"),
}
FASTMOE: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        *("fmoe/functions.py", "fmoe/layers.py", "fmoe/linear.py", "fmoe/transformer.py"),
        *(f"fmoe/gates/{name}.py" for name in ("base_gate", "naive_gate", "noisy_gate", "utils")),
        *(f"fmoe/gates/{name}.py" for name in ("gshard_gate", "switch_gate")),
        "fmoe/utils.py",
    ),
    (),
)

Table = dict[str, tuple[str, ...]]


def git(path: str, *arguments: str) -> str:
    command = ["git", "-C", path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table_of(path: str, files: dict[str, tuple[str, ...]]) -> Table:
    """Fingerprints by "Class.method" or function of all versions in a checkout."""
    releases = [tag for tag in git(path, "tag").split() if tag.startswith("v1.")]
    commits = [*releases, "HEAD"] if releases else git(path, "rev-list", "--all").split()
    found: dict[str, set[str]] = defaultdict(set)
    for commit in commits:
        present = git(path, "ls-tree", "-r", "--name-only", commit).splitlines()
        for file in (name for name in files if name in present):
            for name, node in functions(git(path, "show", f"{commit}:{file}"), files[file]):
                found[name].add(fingerprint(node))
    return {name: tuple(sorted(prints)) for name, prints in sorted(found.items())}


def functions(source: str, classes: tuple[str, ...] = ()) -> list[tuple[str, ast.FunctionDef]]:
    """Functions and methods other than __init__ of a source text, with their names."""
    tree = ast.parse(source)
    result = [("", node) for node in tree.body if not classes]
    for kind in ast.walk(tree):
        if isinstance(kind, ast.ClassDef) and (not classes or kind.name in classes):
            result += [(f"{kind.name}.", node) for node in kind.body]
    return [
        (owner + node.name, node)
        for owner, node in result
        if isinstance(node, ast.FunctionDef) and node.name != "__init__"
    ]


@functools.cache
def stand_ins() -> Table:
    """Fingerprints of the stand-ins for published classes, for tests in which they count as published code."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in (fastmoe, lineage, lineage_sparse):
        for name, node in functions(Path(str(module.__file__)).read_text(encoding="utf-8")):
            found[name].add(fingerprint(node))
    return {name: tuple(prints) for name, prints in found.items()}


def main() -> None:
    paths = dict(argument.split("=", 1) for argument in sys.argv[1:])
    tables = {
        name: table_of(path, FASTMOE if name == "fastmoe" else LINEAGE)
        for name, path in paths.items()
    }
    text = f'"""{fingerprints.__doc__}"""\n\nfrom __future__ import annotations\n\n'
    text += f"FINGERPRINTS: dict[str, dict[str, tuple[str, ...]]] = {tables!r}\n"
    Path(str(fingerprints.__file__)).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
