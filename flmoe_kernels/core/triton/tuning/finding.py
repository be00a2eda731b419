"""What was asked and what was found, as checked JSON: a file's content is data, compared and never run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1
# Names of fields and values of a configuration; no table has more or larger ones. And characters of a word.
_MOST_FIELDS, _LARGEST, _LONGEST = 32, 2**16, 256
_MOST_SECONDS = 1e6
Tiles = dict[str, int]


@dataclass(frozen=True, order=True)
class Question:
    """Calls that get the same answer.

    kernel: "pair_moe.accumulate"; kind: its class in the launch table; dtype: "bfloat16"; sizes: the bucket of
    shapes, names and numbers; device: its name; triton, package: versions.
    """

    kernel: str
    kind: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    device: str
    triton: str
    package: str

    def name(self) -> str:
        """A file name that no other question has."""
        text = json.dumps(_question_json(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Finding:
    """The fastest configuration and the table's, with seconds of one run each; of `tried` candidates `refused`
    did not run, or gave other results than the table's."""

    question: Question
    tiles: Tiles
    seconds: float
    table: Tiles
    table_seconds: float
    tried: int
    refused: int


def as_json_value(finding: Finding) -> dict[str, Any]:
    """A finding in JSON's types."""
    return asdict(finding) | {"schema": SCHEMA, "question": _question_json(finding.question)}


def encode(finding: Finding) -> str:
    return json.dumps(as_json_value(finding), indent=1, allow_nan=False) + "\n"


def decode(text: str) -> Finding:
    """The finding of a file's text.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    fields = (
        "schema",
        "question",
        "tiles",
        "seconds",
        "table",
        "table_seconds",
        "tried",
        "refused",
    )
    _expect_keys("the file", content, fields)
    if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
        raise ValueError(f"schema: expected {SCHEMA}, got {_short(content['schema'])}")
    return Finding(
        _question(content["question"]),
        _whole_numbers("tiles", content["tiles"]),
        _seconds("seconds", content["seconds"]),
        _whole_numbers("table", content["table"]),
        _seconds("table_seconds", content["table_seconds"]),
        _whole_number("tried", content["tried"]),
        _whole_number("refused", content["refused"]),
    )


def _question_json(question: Question) -> dict[str, Any]:
    return asdict(question) | {"sizes": dict(question.sizes)}


def _question(content: Any) -> Question:
    words = ("kernel", "kind", "dtype", "device", "triton", "package")
    _expect_keys("question", content, (*words, "sizes"))
    for name in words:
        _expect_word(f"question.{name}", content[name])
    sizes = _whole_numbers("question.sizes", content["sizes"], 2**62)
    return Question(**{name: content[name] for name in words}, sizes=tuple(sizes.items()))


def _expect_word(name: str, value: Any) -> None:
    """Printable, since it may be shown in a terminal."""
    if not isinstance(value, str) or len(value) > _LONGEST or not value.isprintable():
        raise ValueError(
            f"{name}: expected up to {_LONGEST} printable characters, got {_short(value)}"
        )


def _short(value: Any) -> str:
    return ascii(value)[:_LONGEST]


def _expect_keys(name: str, content: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(content, dict) or set(content) != set(keys):
        got = sorted(content) if isinstance(content, dict) else content
        expected = ", ".join(sorted(keys))
        raise ValueError(f"{name}: expected an object of {expected}, got {_short(got)}")


def _whole_numbers(name: str, content: Any, largest: int = _LARGEST) -> Tiles:
    if not isinstance(content, dict) or not 0 < len(content) <= _MOST_FIELDS:
        raise ValueError(f"{name}: expected an object of up to {_MOST_FIELDS} numbers")
    for key in content:
        _expect_word(f"a key of {name}", key)
    return {key: _whole_number(f"{name}.{key}", content[key], largest) for key in content}


def _whole_number(name: str, value: Any, largest: int = _LARGEST) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ValueError(f"{name}: expected a whole number up to {largest}, got {_short(value)}")
    return value


def _seconds(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < _MOST_SECONDS:
        raise ValueError(f"{name}: expected seconds, got {_short(value)}")
    return float(value)
