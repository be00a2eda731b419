"""Checks of the parts of a layer; errors name the part, what was expected and what it got."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from flmoe_kernels.core.backend import transforming

from .kept import traced
from .snapshot import HOOKS, has_global_hook

ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")

# As of the import of this package, because a program may replace them.
FORWARDS: dict[Any, Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU)
}


# Pre-hooks of pruning and of the old weight and spectral norm, which compute a parameter before a call.
RECOMPUTES = (BasePruningMethod, WeightNorm, SpectralNorm)
# Modules of FSDP, whose hooks gather parameters.
_GATHERING = ("torch.distributed.fsdp.", "torch.distributed._composable.")

# Methods of this package's classes, likewise.
_METHODS: dict[Any, dict[str, Any]] = {}
# A subclass may have other ones, because a call does not run them.
_FREE = ("__init__", "extra_repr", "reset_parameters")

_TORCH_FUNCTIONS: tuple[Any, ...] = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    nn.Parameter.__torch_function__,  # of DTensor and fake tensors, too
)


class UnsupportedLayer(ValueError):
    """A fast layer cannot replace a layer; the message names the unsupported part."""


def is_integer(x: object) -> TypeGuard[int]:
    """Whether x is an integer of Python or numpy, not a bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def child_of(module: nn.Module, path: str, name: str, kind: type[ModuleT]) -> ModuleT:
    child = getattr(module, name, None)
    if not isinstance(child, kind):
        actual = "nothing" if child is None else type(child).__name__
        raise UnsupportedLayer(f"{joined(path, name)}: expected {kind.__name__}, got {actual}")
    return child


def plain_module(module: nn.Module | None, path: str, kind: type[ModuleT]) -> ModuleT:
    """Return the module; UnsupportedLayer unless it computes what torch's class `kind` does."""
    if not isinstance(module, kind) or type(module).forward is not FORWARDS[kind]:
        raise UnsupportedLayer(f"{path}: expected {kind.__name__}, got {class_name(module)}")
    if isinstance(module, LazyModuleMixin):
        raise UnsupportedLayer(
            f"{path}: {class_name(module)} has no parameters before its first call"
        )
    return module


def class_name(module: object) -> str:
    """The name of a module's class, with its package if it is neither torch.nn's nor this package's."""
    kind = type(module)
    known = kind.__module__.startswith(("torch.nn.modules.", "flmoe_kernels.", "builtins"))
    return kind.__name__ if known else f"{kind.__module__}.{kind.__name__}"


def check_hooks(part: nn.Module, path: str) -> None:
    """Check that a part has no hook on its calls, because the kernels do not call it."""
    for name in HOOKS:
        if getattr(part, name):
            kind = name.strip("_").removesuffix("_hooks").replace("_", " ")
            raise UnsupportedLayer(
                f"{path}: has a {kind} hook, which would never run, because the kernels do not call this part"
            )


def check_methods(part: nn.Module, path: str, only: Collection[str] = ()) -> None:
    """Check that no method of a part is replaced on the instance, and that a call runs `forward`.

    only: the methods to check; by default all.
    """
    for name, value in vars(part).items():
        original = getattr(type(part), name, None)
        if not callable(original) or (only and name not in only):
            continue
        # Tools that restore a method leave the class's own method on the instance, which changes nothing.
        if getattr(value, "__func__", None) is original and value.__self__ is part:
            continue
        raise UnsupportedLayer(f"{joined(path, name)}: replaced on this instance")
    # Both are read now, because tracers replace nn.Module.__call__.
    if type(part).__call__ is not nn.Module.__call__:
        raise UnsupportedLayer(f"{path}: {class_name(part)}.__call__ is not nn.Module's")


def record_methods(kind: type[ModuleT]) -> type[ModuleT]:
    """Remember the methods of a class for `check_inherited`; usable as a decorator."""
    methods = {name: x for name, x in vars(kind).items() if inspect.isfunction(x)}
    _METHODS[kind] = {name: x for name, x in methods.items() if name not in _FREE}
    return kind


def check_inherited(part: nn.Module, path: str, only: Collection[str] = ()) -> None:
    """Check that the class of a part has the methods of this package's class that it is or extends.

    only: the methods to check; by default all.
    """
    owners: dict[str, type] = {}
    for kind in reversed(type(part).__mro__):
        owners |= dict.fromkeys(_METHODS.get(kind, {}), kind)
    for name, owner in owners.items():
        if only and name not in only:
            continue
        if getattr(type(part), name) is not _METHODS[owner][name]:
            raise UnsupportedLayer(
                f"{path}: {class_name(part)}.{name} is not that of this package's {owner.__name__}"
            )


def check_plain(layer: nn.Module, path: str, reason: str = "", only: Collection[str] = ()) -> None:
    """Check that a call of a layer runs this package's methods and no hook that could change its result.

    Functions that do not call the layer compute the same then. Hooks that compute a parameter (`RECOMPUTES`) and
    those of FSDP, which gather parameters, are allowed.

    Args:
        reason: for the error, why the hook or method would not run.
        only: the methods to check; by default all.
    """
    if has_global_hook():
        raise UnsupportedLayer("torch.nn.modules.module: a hook on all modules is registered")
    for kind in ("pre_hook", "hook"):
        for hook in getattr(layer, f"_forward_{kind}s").values():
            module = getattr(hook, "__module__", None) or ""
            if isinstance(hook, RECOMPUTES) or module.startswith(_GATHERING):
                continue
            name = getattr(hook, "__qualname__", None) or class_name(hook)
            raise UnsupportedLayer(
                f"{path}: has a forward {kind.replace('_', '-')}, {name}"
                + (reason and f", which would not run, because {reason}")
            )
    try:
        check_methods(layer, path, only)
        check_inherited(layer, path, only)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"{error}{reason and f', but {reason}'}") from None


def expect_linear(
    module: nn.Module, path: str, fan_in: int, fan_out: int, bias: bool | None
) -> None:
    """Check a linear map; bias: whether it must have one, None for either."""
    linear = plain_module(module, path, nn.Linear)
    shape = () if linear.weight is None else tuple(linear.weight.shape)
    if shape != (fan_out, fan_in):
        raise UnsupportedLayer(f"{path}.weight: expected shape {(fan_out, fan_in)}, got {shape}")
    if bias is not None and (linear.bias is not None) != bias:
        raise UnsupportedLayer(f"{path}: {'has no bias' if bias else 'has an unexpected bias'}")


def dropout_rate(module: nn.Module, path: str, name: str) -> float:
    where = joined(path, name)
    return rate_of_dropout(child_of(module, path, name, nn.Module), where)


def rate_of_dropout(module: nn.Module, path: str) -> float:
    dropout = plain_module(module, path, nn.Dropout)
    if not isinstance(dropout.p, Real) or not 0 <= dropout.p <= 1:
        raise UnsupportedLayer(f"{path}.p: expected a probability from 0 to 1, got {dropout.p!r}")
    if dropout.inplace:
        raise UnsupportedLayer(f"{path}.inplace: expected False, got {dropout.inplace!r}")
    return float(dropout.p)


def sequence_of(module: nn.Module, path: str, name: str) -> list[nn.Module]:
    network = child_of(module, path, name, nn.Module)
    if not isinstance(network, (nn.Sequential, nn.ModuleList)):
        raise UnsupportedLayer(
            f"{joined(path, name)}: expected Sequential, got {type(network).__name__}"
        )
    return list(network)


def check_parameters(
    layer: nn.Module,
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
    skipped: tuple[str, ...] = (),
) -> None:
    """Check that a layer has exactly the expected parameters, with one floating dtype and one device.

    optional: names of parameters that may be absent. skipped: prefixes of names that are not checked.
    """

    def checked(named: Iterable[tuple[str, T]]) -> dict[str, T]:
        return {name: value for name, value in named if not name.startswith(skipped)}

    expected = checked(expected.items())
    parameters = checked(layer.named_parameters(remove_duplicate=False))
    tensors: dict[str, Tensor] = {
        **parameters,
        **checked(layer.named_buffers(remove_duplicate=False)),
    }
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UnsupportedLayer(f"{unknown[0]}: an unexpected parameter or buffer")
    # An optional name may be absent, but not a buffer.
    if missing := sorted(expected.keys() - parameters.keys() - (set(optional) - tensors.keys())):
        raise UnsupportedLayer(f"{missing[0]}: not a parameter of the layer")
    for name, parameter in parameters.items():
        function = type(parameter).__torch_function__
        if getattr(function, "__func__", function) not in _TORCH_FUNCTIONS:
            raise UnsupportedLayer(
                f"{name}: {class_name(parameter)} has its own torch functions, which the kernels do not call"
            )
        if tuple(parameter.shape) != expected[name]:
            raise UnsupportedLayer(
                f"{name}: expected shape {expected[name]}, got {tuple(parameter.shape)}"
            )
    for what in ("dtype", "device"):
        values = {getattr(tensor, what) for tensor in tensors.values()}
        if len(values) > 1:
            raise UnsupportedLayer(f"parameters differ in {what}: {sorted(map(str, values))}")
    dtype = next(iter(tensors.values())).dtype
    if not dtype.is_floating_point:
        raise UnsupportedLayer(f"parameters are {dtype}, expected a floating dtype")


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the Parameter objects and the modes of the parts of `source` with the same names.

    A parameter that `source` does not have, such as the bias of a head, is removed.
    """
    parameters = dict(source.named_parameters(remove_duplicate=False))
    for name, _ in list(target.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        target.get_submodule(owner).register_parameter(leaf, parameters.get(name))
    modes = {name: part.training for name, part in source.named_modules(remove_duplicate=False)}
    for name, part in target.named_modules():
        part.training = modes.get(name, source.training)


def separate(x: Tensor) -> list[Tensor]:
    """Slices of x along dimension 0 that own their memory: each can be kept alone or changed in place."""
    if not traced() and not transforming():
        return list(_Separate.apply(x))
    copy: Any = torch.unbind_copy  # torch's type hints do not declare its result
    return list(copy(x, 0))


class _Separate(torch.autograd.Function):
    """torch.unbind_copy with a single kernel on a GPU, where torch has one for each slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        # Splitting takes the host less time than unbinding.
        sizes = [x.shape[1]] * x.shape[0] if x.dim() > 1 else []
        parts = x.flatten(0, 1).split_with_sizes(sizes) if sizes else x.unbind(0)
        slices = [torch.empty(x.shape[1:], dtype=x.dtype, device=x.device) for _ in parts]
        torch._foreach_copy_(slices, parts)
        return tuple(slices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.stack(grads)
