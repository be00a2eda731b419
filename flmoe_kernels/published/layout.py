"""Places of interaction layers in the contents of a checkpoint.

A layer is recognised by its keys, not by the names around it: in some mapping of the file, there are keys
PREFIX + "interaction_experts.0. ..." and PREFIX + "reweight.mlp. ...". The names that DataParallel and
torch.compile add to keys ("module", "_orig_mod") may also stand inside the layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 4
MAX_LISTED = 20
MAX_KEY = 1000  # characters; int() refuses numbers of over 4300 digits
WRAPPERS = ("module", "_orig_mod")

_WRAPPED = rf"(?:(?:{'|'.join(WRAPPERS)})\.)*"
_START = r"(?:^|(?<=\.))"
_EXPERTS = re.compile(rf"{_START}interaction_experts\.{_WRAPPED}\d+\.")
_REWEIGHT = re.compile(rf"{_START}reweight\.{_WRAPPED}mlp\.")
_FUSION = re.compile(rf"{_START}network\.\d+\.{_WRAPPED}(?:attn|mlp)\.")
FUSION_KEY = "fusion_model"  # in files of the published baselines


class LayoutError(ValueError):
    """The contents have no layer, several, or entries that are no parameters."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a layer: all entries of a mapping whose keys start with a prefix."""

    name: str  # keys of the outer mappings and the prefix, joined by dots
    mapping: dict[Any, Any]  # inside the file's contents
    prefix: str  # "", or ends with a dot

    def state_dict(self) -> dict[str, Tensor]:
        """Return the layer's entries, by their keys without the prefix and wrappers."""
        state: dict[str, Tensor] = {}
        for key, value in self.mapping.items():
            if not self._holds(key):
                continue
            if not isinstance(key, str):
                raise LayoutError(f"expected str as keys, got {type(key).__name__}")
            if len(key) > MAX_KEY:
                raise LayoutError(f"expected keys of at most {MAX_KEY} characters, got {len(key)}")
            plain = _plain(key.removeprefix(self.prefix))
            if plain in state:
                raise LayoutError(f"holds two entries for {plain}")
            if problem := _unusable_reason(value):
                raise LayoutError(f"{key!r}: expected a dense tensor, got {problem}")
            state[plain] = value
        return state

    def replace(self, state: Mapping[str, Tensor]) -> None:
        """Replace the layer's entries, in place; the new keys get the prefix and the wrappers of the old keys."""
        wrapped = {"": ""}
        for key in filter(self._holds, self.mapping):
            parts = key.removeprefix(self.prefix).split(".")
            for end in range(1, len(parts) + 1):
                wrapped[_plain(".".join(parts[:end]))] = ".".join(parts[:end])
        entries: dict[Any, Any] = {}
        new = dict(state)
        for key, value in self.mapping.items():
            if not self._holds(key):
                entries[key] = value
                continue
            for plain in list(new):
                known = plain
                while known not in wrapped:
                    known = known.rpartition(".")[0]
                name = self.prefix + wrapped[known] + plain.removeprefix(known)
                entries[name] = new.pop(plain)
        self.mapping.clear()
        self.mapping.update(entries)

    def _holds(self, key: Any) -> bool:
        return not self.prefix or (isinstance(key, str) and key.startswith(self.prefix))


def find_layer(content: Any, name: str | None = None) -> Place:
    """Find the layer in the contents of a file, or the one with this name if there are several.

    name: `Place.name`, or its last parts if these are unique.
    """
    places = [
        Place(".".join([*path, *filter(None, [prefix.removesuffix(".")])]), mapping, prefix)
        for path, mapping in _mappings(content)
        for prefix in _layer_prefixes(mapping)
    ]
    if not places:
        raise LayoutError(_missing(content))
    names = listed(repr(place.name) for place in places)
    if name is None:
        if len(places) > 1:
            raise LayoutError(
                f"holds {len(places)} interaction layers; choose with layer=: {names}"
            )
        return places[0]
    same = [place for place in places if place.name == name]
    ending = [place for place in places if f".{place.name}".endswith(f".{name}")]
    for matches in (same, ending):
        if len(matches) == 1:
            return matches[0]
    raise LayoutError(f"layer: expected one of {names}, got {name!r}")


def listed(items: Iterable[str]) -> str:
    """Format the first items in one line, and the number of further items."""
    names = [name if len(name) < MAX_KEY else f"{name[:100]}..." for name in items]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Yield every dict down to MAX_DEPTH once, and the keys that lead to it."""
    queue: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen = set()  # the same dict may be held several times, also by itself
    for path, value in queue:
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        if len(path) < MAX_DEPTH:
            queue += [((*path, key), x) for key, x in value.items() if isinstance(key, str)]


def _layer_prefixes(mapping: dict[Any, Any]) -> list[str]:
    reweight = _prefixes(mapping, _REWEIGHT)
    return [prefix for prefix in _prefixes(mapping, _EXPERTS) if prefix in reweight]


def _prefixes(mapping: dict[Any, Any], pattern: re.Pattern[str]) -> dict[str, None]:
    """Parts of keys before the pattern, in order."""
    keys = [key for key in mapping if isinstance(key, str) and len(key) <= MAX_KEY]
    return dict.fromkeys(key[: m.start()] for key in keys for m in pattern.finditer(key))


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _missing(content: Any) -> str:
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, expected a state_dict"
    states = dict(_mappings(content))
    for pattern, other in ((_EXPERTS, "reweighting MLP"), (_REWEIGHT, "experts")):
        for state in states.values():
            if _prefixes(state, pattern):
                keys = listed(repr(key) for key in state if isinstance(key, str))
                return f"not an interaction layer: no keys of the {other}; it has {keys}"
    for path, state in states.items():
        if FUSION_KEY in path or _prefixes(state, _FUSION):
            return (
                f"holds a fusion model{''.join(f' {name!r}' for name in path[-1:])} and no interaction layer; "
                "build the model, load its state_dict, and call flmoe_kernels.swap(model)"
            )
    names = [
        ".".join((*path, key))
        for path, state in states.items()
        for key, value in state.items()
        if isinstance(key, str) and not isinstance(value, dict)
    ]
    return f"holds no interaction layer; it has {listed(map(repr, names)) or 'nothing'}"


def _unusable_reason(value: Any) -> str:
    """The reason why a value cannot be a parameter, or ""."""
    if not isinstance(value, Tensor):
        return f"a value of type {type(value).__name__}"
    if value.is_meta:
        return "a tensor on the meta device, which has no values"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    if value.nbytes > value.untyped_storage().nbytes():
        return "a tensor whose elements share memory"
    return ""
