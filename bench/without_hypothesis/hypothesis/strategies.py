"""Strategies that nothing is ever drawn from: every name is one, and gives itself whatever is done to it."""

from __future__ import annotations

from typing import Any


class _Strategy:
    def __call__(self, *arguments: Any, **named: Any) -> _Strategy:
        return self

    def __getattr__(self, name: str) -> _Strategy:
        return self

    def __or__(self, other: Any) -> _Strategy:
        return self


def __getattr__(name: str) -> _Strategy:
    return _Strategy()
