"""Validation of arguments; errors name the argument, the expectation and the value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .dtypes import FLOATS, autocast_dtype


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) Tensor, got layout {value.layout}")


def readable(value: Tensor) -> bool:
    """Whether values can be read without cost: on a CPU, not in a trace, neither fake nor batched."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if isinstance(value, FakeTensor) or is_batched(value):
        return False
    tracers = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
    return all(torch._C._get_dispatch_mode(tracer) is None for tracer in tracers)


def is_batched(value: Tensor) -> bool:
    """Whether a tensor has its own values in every call of a function under vmap; False in a trace."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def require_same(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Check that a tensor has the same dtype and device as another argument."""
    if value.dtype != reference.dtype:
        raise TypeError(f"{name}: expected dtype {reference.dtype} as {other}, got {value.dtype}")
    if value.device != reference.device:
        raise ValueError(
            f"{name}: expected device {reference.device} as {other}, got {value.device}"
        )


def require_floating(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def require_probability(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")


def require_seed(name: str, value: Tensor, device: torch.device) -> None:
    require_tensor(name, value)
    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{name}: expected one int64, got shape {tuple(value.shape)} of {value.dtype}"
        )
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def require_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"{name}: expected an int from {least}{upper}, got {value}")


def class_number(name: str, value: Any) -> int | None:
    """Return a single class as an int: of any integer type, or a tensor or array of no dimensions; None for
    others.

    Raises:
        TypeError: a bool, or a number that is not an integer.
    """
    if isinstance(value, (list, tuple)) or getattr(value, "shape", ()) != ():
        return None
    kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    try:
        if not kind.startswith("bool"):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an int, got {kind}")


def require_classes(
    name: str, value: Any, batch: int, classes: int, device: torch.device
) -> Tensor:
    """Return a class for each sample, (B,) int64, of one class for all or of B classes.

    Args:
        value: an integer, see class_number; or (B,), a tensor on the device, a numpy array or a list.
    """
    number = class_number(name, value)
    if number is not None:
        require_count(name, number, 0, classes - 1)
        return torch.full((batch,), number, device=device)
    each = require_array(name, value, device)
    if each.dtype.is_floating_point or each.dtype.is_complex or each.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {each.dtype}")
    each = each.to(torch.int64)
    require_index(name, each, (batch,), classes, device)
    return each


def require_array(name: str, value: Any, device: torch.device) -> Tensor:
    """Return a tensor as it is; a numpy array or a list as a tensor on the device."""
    if isinstance(value, Tensor):
        require_tensor(name, value)
        return value
    try:
        if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
            return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: expected integers, got {value!r}") from error
    raise TypeError(f"{name}: expected an int or a Tensor, got {type(value).__name__}")


def require_positive(name: str, value: float) -> None:
    """Check for a positive number whose inverse is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 1e-37 < value < 1e37:
        raise ValueError(f"{name}: expected a positive number (1e-37 to 1e37), got {value}")


def require_index(
    name: str, value: Tensor, shape: tuple[int, ...], count: int, device: torch.device
) -> None:
    """Check for int64 values within 0..count - 1."""
    require_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    # Where values are not read, index_select raises an error.
    if readable(value) and value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= count:
            raise ValueError(f"{name}: expected values from 0 to {count - 1}, got {low} to {high}")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Check that value has this shape, whose dimensions are called `letters`; -1 stands for an unknown size."""
    if tuple(value.shape) != shape:
        expected = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name}: expected {letters} = ({expected}), got {tuple(value.shape)}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to autocast's dtype if it is on, as torch's own products do; float64 is not cast."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def padded_masks(masks: Any, inputs: Any) -> Any:
    """A mask or None for every input: missing masks count as all valid. Invalid arguments are not changed."""
    if not isinstance(masks, (list, tuple)) or not isinstance(inputs, (list, tuple)):
        return masks
    return [*masks, *[None] * (len(inputs) - len(masks))]


def widened(inputs: Any, like: Tensor) -> Any:
    """Inputs cast to the dtype of `like` if that loses no precision; other inputs are not changed."""
    if not isinstance(inputs, (list, tuple)):
        return inputs

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dtype == like.dtype:
            return x
        return x.to(like.dtype) if torch.promote_types(x.dtype, like.dtype) == like.dtype else x

    return [cast(x) for x in inputs]


def cast_tensors(values: Any, dtype: torch.dtype) -> Any:
    """The tensors of nested lists cast to a dtype; invalid values are not changed."""
    if isinstance(values, Tensor):
        return values.to(dtype)
    return [cast_tensors(x, dtype) for x in values] if isinstance(values, (list, tuple)) else values


def require_masks(inputs: Sequence[Tensor | None], masks: Sequence[Tensor | None] | None) -> None:
    """Check masks M x (B, L_m), bool or 0/1 or None, for inputs M x (B, L_m, ...); None if the input is None."""
    if masks is None:
        return
    if not isinstance(masks, (list, tuple)):
        raise TypeError(f"masks: expected a list of Tensors or None, got {type(masks).__name__}")
    if len(masks) != len(inputs):
        raise ValueError(f"masks: expected {len(inputs)}, got {len(masks)}")
    for m, (mask, x) in enumerate(zip(masks, inputs, strict=True)):
        if mask is None:
            continue
        name = f"masks[{m}]"
        require_tensor(name, mask)
        if x is None:
            raise ValueError(f"{name}: expected None as inputs[{m}] is, got {tuple(mask.shape)}")
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: expected {tuple(x.shape[:2])} as inputs[{m}], got {tuple(mask.shape)}"
            )
        if mask.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {mask.device}")
        if mask.dtype == torch.bool or not readable(mask):
            continue
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name}: expected 0 (padding) and 1 (valid) only, got other values")


def require_inputs(
    dims: Sequence[int],
    inputs: Sequence[Tensor | None],
    masks: Sequence[Tensor | None] | None,
    parameter: Tensor,
    *,
    optional: bool = False,
) -> None:
    """Check inputs M x (B, L_m, dims[m]) of a layer with its parameters' dtype and device; see require_masks.

    optional: a modality may be None or have no tokens, but not all modalities may be None.
    """
    _require_list("inputs", inputs, len(dims))
    given = [m for m, x in enumerate(inputs) if x is not None or not optional]
    if not given:
        raise ValueError("inputs: expected at least one modality, got None for all")
    for m in given:
        name, x = f"inputs[{m}]", inputs[m]
        require_tensor(name, x)
        assert x is not None
        if x.dim() != 3 or x.shape[2] != dims[m] or not (optional or x.shape[1]):
            raise ValueError(f"{name}: expected (batch, tokens, {dims[m]}), got {tuple(x.shape)}")
        first = inputs[given[0]]
        assert first is not None
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name}: expected batch {first.shape[0]} as inputs[{given[0]}], got {x.shape[0]}"
            )
        require_same(name, x, "the layer's parameters", parameter)
    require_masks(inputs, masks)


def require_replacements(
    name: str, replacements: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> None:
    """Check that replacements[m] has the shape, dtype and device of inputs[m], and is None if that is None."""
    _require_list(name, replacements, len(inputs))
    for m, (noise, x) in enumerate(zip(replacements, inputs, strict=True)):
        own = f"{name}[{m}]"
        if x is None:
            if noise is not None:
                raise ValueError(f"{own}: expected None as inputs[{m}] is")
            continue
        require_tensor(own, noise)
        assert noise is not None
        if noise.shape != x.shape:
            raise ValueError(
                f"{own}: expected {tuple(x.shape)} as inputs[{m}], got {tuple(noise.shape)}"
            )
        require_same(own, noise, f"inputs[{m}]", x)


def _require_list(name: str, value: object, count: int) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of Tensors, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} modalities, got {len(value)}")
