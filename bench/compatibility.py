"""Command `python -m bench.compatibility CPU TRITON`: a row of the table in docs/compatibility.md.

The arguments are JUnit files of pytest: tests on the CPU, and tests in Triton's interpreter, which may be missing.
"""

from __future__ import annotations

import platform
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree


def outcome(report: str) -> str:
    """Number of tests of a report that passed, failed and were skipped, for example "141 passed, 3 skipped"."""
    if not Path(report).exists():
        return "not run"
    suite = ElementTree.parse(report).getroot()[0]
    tests, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    counts = {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def release(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def main(reports: list[str]) -> None:
    versions = [release("torch"), release("triton"), platform.python_version()]
    print("|", " | ".join([*versions, *map(outcome, reports), date.today().isoformat()]), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
