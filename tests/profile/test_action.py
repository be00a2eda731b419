"""Tests of the GitHub action `compare`: its scripts run on the example package in a temporary repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ACTION = ROOT / ".github" / "actions" / "compare"
EXAMPLE = ROOT / "examples" / "ci"
WORKFLOW = EXAMPLE / ".github" / "workflows" / "benchmarks.yml"
SLOW = ("    rows = np.zeros(", "    sum(range(60_000))\n    rows = np.zeros(")


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
    ("change", "code", "message"),
    [
        (("", ""), 0, r"ok: one_hot/5000: expected \d+.\d\dx comparison \("),
        (SLOW, 1, r"SLOWER: one_hot/5000: expected \d+.\d\dx comparison \((?!any)"),
    ],
    ids=["unchanged", "slower"],
)
def test_a_pull_request_of_the_example(
    change: tuple[str, str], code: int, message: str, tmp_path: Path
) -> None:
    """The slower function still passes the low floor for any machine: only its base shows the regression."""
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
    changed = repository / "tinyseries.py"
    changed.write_text(changed.read_text().replace(*change))
    git(repository, "commit", "-q", "--allow-empty", "-a", "-m", "pull request")

    inputs = {"base": base, "install": "touch installed", "python": sys.executable}
    found, output = run_action(repository, suite="benchmarks -k one_hot", **inputs)
    assert found == code, output
    assert re.search(message, output), output
    assert "could not be timed" not in output
    for folder in (repository, tmp_path / "runner" / "compare" / "base"):
        assert (folder / "installed").is_file()
    if code == 1:
        assert output.count("SLOWER: one_hot") >= 2, "a failure must repeat"


def test_the_workflow_of_the_example_uses_the_action() -> None:
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["compare"]["steps"]
    [step] = [step for step in steps if "flmoe_kernels" in step["uses"]]
    path = re.fullmatch(r"OWNER/flmoe_kernels/(.+)@main", step["uses"])
    assert path is not None
    assert ROOT / path[1] == ACTION
    assert step["with"].keys() <= action["inputs"].keys()
    page = (ROOT / "docs" / "ci.md").read_text()
    for file in (WORKFLOW, EXAMPLE / "floors.toml"):
        assert file.read_text() in page, f"docs/ci.md shows another {file.name}"
