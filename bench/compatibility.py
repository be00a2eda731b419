"""Command `python -m bench.compatibility REPORT...`: a row of the table in docs/compatibility.md.

The reports are JUnit files of pytest: tests on the CPU, and where Triton was selected, tests in its interpreter.
"""

from __future__ import annotations

import platform
import sys
from datetime import date
from importlib import metadata
from xml.etree import ElementTree


def outcome(report: str) -> str:
    """Number of tests of a report that passed, failed and were skipped, for example "141 passed, 3 skipped"."""
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
    outcomes = [outcome(report) for report in reports] + ["not run"] * (2 - len(reports))
    versions = [release("torch"), release("triton"), platform.python_version()]
    print("|", " | ".join([*versions, *outcomes, date.today().isoformat()]), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
