"""Tests of the GitHub action `compare`: its scripts run on the example package in a temporary repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ACTION = ROOT / ".github" / "actions" / "compare"
EXAMPLE = ROOT / "examples" / "ci"
WORKFLOW = EXAMPLE / ".github" / "workflows" / "benchmarks.yml"
# Installs without a network: the packages of this environment are on PYTHONPATH.
INSTALL = (
    f"{sys.executable} -m venv --without-pip .venv && "
    f"{sys.executable} -m pip --python .venv/bin/python install -q --no-index --no-deps --no-build-isolation ."
)
SLOW = ("    rows = np.zeros(", "    sum(range(60_000))\n    rows = np.zeros(")
SKIPPED = (
    "import numpy as np\n",
    "import numpy as np\nimport pytest\n\npytestmark = pytest.mark.skip\n",
)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def run_action(folder: Path, **given: str) -> tuple[int, str]:
    """Run the steps of the action as a runner does, up to the first that fails; return exit code and output."""
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    inputs = {name: str(entry["default"]) for name, entry in action["inputs"].items()} | given
    values = {f"inputs.{name}": value for name, value in inputs.items()}
    values |= {"github.action_path": str(ACTION), "runner.temp": str(folder.parent / "runner")}

    def evaluated(text: str) -> str:
        return re.sub(r"\$\{\{ ([\w.]+) \}\}", lambda match: values[match[1]], text)

    output = ""
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"], "inputs reach a script through its environment"
        environment: Mapping[str, Any] = {
            **{key: x for key, x in os.environ.items() if not key.startswith("PYTEST_")},
            "PYTHONPATH": sysconfig.get_path("purelib"),
            **{key: evaluated(value) for key, value in step["env"].items()},
        }
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        output += done.stdout + done.stderr
        if done.returncode:
            return done.returncode, output
    return 0, output


@pytest.mark.parametrize(
    ("file", "change", "code", "message"),
    [
        (
            "tinyseries.py",
            ("# nothing", ""),
            0,
            r"ok: one_hot/5000: expected \d+.\d\dx comparison \(",
        ),
        (
            "tinyseries.py",
            SLOW,
            1,
            r"SLOWER: one_hot/5000: expected \d+.\d\dx comparison \((?!any)",
        ),
        ("benchmarks/test_tinyseries.py", SKIPPED, 5, "nothing was measured, so the check fails"),
    ],
    ids=["unchanged", "slower", "not measured"],
)
def test_a_pull_request_of_the_example(
    file: str, change: tuple[str, str], code: int, message: str, tmp_path: Path
) -> None:
    """The slower function still passes the low floor for any machine: only its base shows the regression.

    Takes over 10 s: two installations, and two to four runs of pytest.
    """
    repository = tmp_path / "repository"
    shutil.copytree(EXAMPLE, repository, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    floors = repository / "floors.toml"
    quick = "tolerance = 0.5\nseconds = 0.3"
    text = floors.read_text().replace("tolerance = 0.2\nseconds = 2.0", quick)
    floors.write_text(re.sub("ratio = .*", "ratio = 0.01", text))
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "base")
    base = git(repository, "rev-parse", "HEAD").strip()
    changed = repository / file
    changed.write_text(changed.read_text().replace(*change))
    git(repository, "commit", "-q", "--allow-empty", "-a", "-m", "pull request")

    found, output = run_action(repository, base=base, install=INSTALL)
    assert found == code, output
    assert re.search(message, output), output
    assert "could not be timed" not in output
    installed = repository / ".venv" / "lib"
    assert list(installed.rglob("tinyseries.py")), "the pull request was not installed"
    if code == 1:
        assert output.count("SLOWER: one_hot") >= 2, "a failure must repeat"


def test_the_workflow_of_the_example_uses_the_action() -> None:
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    assert len((ACTION / "action.yml").read_text().splitlines()) <= 60
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["compare"]["steps"]
    [step] = [step for step in steps if "flmoe_kernels" in step["uses"]]
    path = re.fullmatch(r"OWNER/flmoe_kernels/(.+)@main", step["uses"])
    assert path is not None
    assert ROOT / path[1] == ACTION
    assert step["with"].keys() <= action["inputs"].keys()
    page = (ROOT / "docs" / "ci.md").read_text()
    for file in (WORKFLOW, EXAMPLE / "floors.toml"):
        assert file.read_text() in page, f"docs/ci.md shows another {file.name}"
