"""A process that compiles: reads "architecture name" a line, answers with a JSON object a line.

Its own process since the compiler is native code that may end it, and since a process in which Triton interprets
kernels cannot compile them. Run by compile.py: python -m bench.aot.worker MODULE.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback

from bench.aot.architectures import ARCHITECTURES
from bench.aot.cases import Case, listed


def main() -> None:
    cases = listed(sys.argv[1])
    # Whatever a compiler prints is not the answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        number, name = line.rstrip("\n").split(" ", 1)
        print(json.dumps(answer(cases[name], int(number))), file=answers, flush=True)


def answer(case: Case, number: int) -> dict[str, object]:
    try:
        report = case.built(ARCHITECTURES[number]).launch.compile(number)
    except Exception as error:  # The next kernel is compiled whatever this one did.
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"report": dataclasses.asdict(report)}


if __name__ == "__main__":
    main()
