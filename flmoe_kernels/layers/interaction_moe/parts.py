"""Looking at the parts of a layer: what each must be made of, and what is said where it is not."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class UnsupportedLayer(ValueError):
    """The fast layer cannot stand in for this one: names the part and what is unexpected."""


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def child_of(module: nn.Module, path: str, name: str, kind: type[ModuleT]) -> ModuleT:
    child = getattr(module, name, None)
    if not isinstance(child, kind):
        found = "nothing" if child is None else type(child).__name__
        raise UnsupportedLayer(f"{joined(path, name)}: expected {kind.__name__}, got {found}")
    return child


def plain_module(module: nn.Module, path: str, kind: type[ModuleT]) -> ModuleT:
    """The module itself when it computes exactly what torch's class of that name does."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        raise UnsupportedLayer(f"{path}: expected {kind.__name__}, got {type(module).__name__}")
    return module


def expect_linear(module: nn.Module, path: str, fan_in: int, fan_out: int, bias: bool) -> None:
    linear = plain_module(module, path, nn.Linear)
    if (linear.in_features, linear.out_features) != (fan_in, fan_out):
        raise UnsupportedLayer(
            f"{path}: expected a map from {fan_in} to {fan_out}, got {linear.in_features} to "
            f"{linear.out_features}"
        )
    if (linear.bias is not None) != bias:
        raise UnsupportedLayer(f"{path}: {'has no bias' if bias else 'has an unexpected bias'}")


def dropout_rate(module: nn.Module, path: str, name: str) -> float:
    return float(
        plain_module(child_of(module, path, name, nn.Module), joined(path, name), nn.Dropout).p
    )


def sequence_of(module: nn.Module, path: str, name: str) -> list[nn.Module]:
    network = child_of(module, path, name, nn.Module)
    if not isinstance(network, nn.Sequential | nn.ModuleList):
        raise UnsupportedLayer(
            f"{joined(path, name)}: expected Sequential, got {type(network).__name__}"
        )
    return list(network)
