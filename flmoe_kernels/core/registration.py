"""Registration of operators with torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch.autograd import forward_ad

from . import flops as formulas
from .backend import CPU, BackendUnavailable, transforms_active

_LEVELS = 64  # of nested torch.vmap
_library = torch.library.Library("flmoe", "FRAGMENT")


class Derivative(NamedTuple):
    """The derivative of an operator.

    inputs: number of the first arguments that may have a gradient.
    save: save(*arguments, *results) returns the tensors and the other values that `backward` needs.
    backward: backward(*gradients of the results, *tensors, *values, wants, backend) returns the gradients of
        the arguments; unwanted ones may have any value. Default: flmoe::<name>_backward, called with `wants` if
        its schema has them.
    results: number of the first results that have a gradient.
    """

    inputs: int
    save: Callable[..., tuple[Sequence[torch.Tensor | None], tuple]]
    backward: Callable[..., Any] | None = None
    results: int = 1


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    derivative: Derivative | None = None,
    *,
    flops: formulas.Formula,
    fake_by_backend: bool = False,
) -> None:
    """Register the operator flmoe::name.

    The backend is the operator's last argument, so that the same backend computes values and gradients.

    Args:
        name: the operator's name.
        schema: "(arguments) -> results" without the backend, which is appended as `str backend='cpu'`.
        run: run(backend, *arguments) computes the results.
        fake: fake(*arguments) returns empty results with the right shapes and dtypes.
        flops: flops(*arguments) counts the FLOP of the matrix products.
        fake_by_backend: fake(backend, *arguments) instead, because shapes of results depend on the backend.
    """
    arguments, results = schema.split(" -> ")
    torch.library.define(f"flmoe::{name}", f"({arguments[1:-1]}, str backend='{CPU}') -> {results}")
    operator = getattr(torch.ops.flmoe, name)
    count = len(operator.default._schema.arguments) - 1

    def kernel(*args: Any) -> Any:
        if _has_tangent(args):
            # Without this error the results would have no tangents, as if they were constant.
            raise _unavailable(name, "forward-mode AD")
        return run(backend_of(args), *args[:count])

    def backend_of(args: Sequence[Any]) -> str:
        # torch omits a trailing argument that equals the default in its schema.
        return args[count] if len(args) > count else CPU

    def empty(*args: Any) -> Any:
        return fake(*((backend_of(args),) if fake_by_backend else ()), *args[:count])

    torch.library.impl(f"flmoe::{name}", ("cpu", "cuda"), kernel)
    torch.library.register_fake(f"flmoe::{name}", empty)
    formulas.register(operator, flops, count)
    if derivative is not None:
        _differentiate(name, count, *derivative)
    elif name.endswith("_backward"):
        first_order_only(name)


def _differentiate(
    name: str,
    count: int,
    inputs: int,
    save: Callable[..., tuple],
    backward: Callable[..., Any] | None,
    results: int,
) -> None:
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        *arguments, ctx.backend = inputs
        output = (output,) if isinstance(output, torch.Tensor) else output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[results:])
        tensors, ctx.values = save(*arguments, *output)
        ctx.save_for_backward(*tensors)

    def derivative(ctx: Any, *grads: Any) -> tuple:
        grads = grads[:results]
        if all(grad is None for grad in grads):
            return (None,) * (count + 1)
        wants = ctx.needs_input_grad[:inputs]
        compute = backward or _backward_operator(name)
        # The saved tensors are read once: checkpointing and hooks unpack them at every read.
        found = compute(*grads, *ctx.saved_tensors, *ctx.values, wants, ctx.backend)
        found = (found,) if isinstance(found, torch.Tensor) else found
        wanted = [grad if want else None for grad, want in zip(found, wants, strict=True)]
        return (*wanted, *(None,) * (count + 1 - inputs))

    torch.library.register_autograd(
        f"flmoe::{name}", _checked(name, derivative), setup_context=setup
    )


@functools.cache
def _backward_operator(name: str) -> Callable[..., Any]:
    operator: Callable[..., Any] = getattr(torch.ops.flmoe, f"{name}_backward")
    if any(each.name == "wants" for each in operator.default._schema.arguments):  # type: ignore[attr-defined]
        return operator
    return lambda *args: operator(*args[:-2], args[-1])


def _checked(name: str, derivative: Callable[..., tuple]) -> Callable[..., tuple]:
    def backward(ctx: Any, *grads: Any) -> tuple:
        if _transformed(grads):
            raise _unavailable(name, "a derivative of their backward pass")
        return derivative(ctx, *grads)

    return backward


def define_derivative(
    name: str, place: int, setup: Callable[..., None], derivative: Callable[..., tuple]
) -> None:
    """Register the derivative of an operator with respect to its first argument and the list of tensors at
    position `place`.

    torch.library.register_autograd supports lists, too, but flattens all arguments and gradients as pytrees, which
    takes 0.5 ms for 120 tensors. The operator returns a tensor and a list of tensors.

    Args:
        setup: setup(ctx, arguments, results), as setup_context.
        derivative: derivative(ctx, gradient of the first result) returns the gradient of the first argument and
            the list of those of the tensors. `ctx.needs_input_grad[2:]` are the flags of the first argument and
            the listed tensors.
    """
    operator = getattr(torch.ops.flmoe, name).default
    count = len(operator._schema.arguments)
    checked, internal = _checked(name, derivative), torch._C

    def below(keyset: Any, args: Sequence[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with internal._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & internal._after_autograd_keyset, *args)

    class Refused(torch.autograd.Function):
        """The given tensors, whose derivative is refused."""

        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple([x.view_as(x) for x in tensors])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> NoReturn:
            raise _no_derivative(f"flmoe::{name}_backward")

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: Sequence[Any], *_: torch.Tensor) -> Any:
            results = below(keyset, args)
            # torch omits a trailing argument that equals the default in its schema.
            setup(ctx, args if len(args) == count else (*args, CPU), results)
            ctx.listed = args[place]
            return results[0], *results[1]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            first, listed = checked(ctx, grads[0])
            found = [first, *listed]
            if torch.is_grad_enabled():
                # The saved tensors do not depend on the listed ones, so their second derivative would be zero.
                places = [i for i, grad in enumerate(found) if grad is not None]
                refused = Refused.apply(*[found[i] for i in places], *ctx.listed)
                for i, grad in zip(places, refused, strict=False):
                    found[i] = grad
            return None, None, *found

    def call(keyset: Any, *args: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        needed = any(x.requires_grad for x in (args[0], *args[place]))
        if not (needed and torch.is_grad_enabled()):
            return below(keyset, args)
        result, *listed = Derivative.apply(keyset, args, args[0], *args[place])
        return result, listed

    _library.impl(name, call, "Autograd", with_keyset=True)


def _has_tangent(args: Sequence[Any]) -> bool:
    """Whether a tensor carries a tangent of forward-mode AD."""
    if forward_ad._current_level < 0:
        return False
    flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,))]
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    # autograd hides tangents from functions without a rule for them.
    with forward_ad._set_fwd_grad_enabled(True):
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _transformed(grads: Sequence[Any]) -> bool:
    """Whether a backward pass runs in a transform that the kernels do not support.

    They support vmap alone, as in torch.autograd.grad with is_grads_batched: torch calls them once per gradient.
    """
    if not transforms_active():
        return _has_tangent(grads)
    stack = torch._C._functorch.get_interpreter_stack()
    vmap = torch._C._functorch.TransformType.Vmap
    return torch.is_grad_enabled() or any(level.key() != vmap for level in stack or ())


def _unavailable(name: str, what: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"flmoe::{name}: the kernels do not support {what}; backend='reference' does"
    )


def _no_derivative(op: str, times: str = "differentiable once") -> NotImplementedError:
    return NotImplementedError(
        f"{op} has no derivative: the kernels are {times}; "
        "backend='reference' is differentiable any number of times"
    )


def first_order_only(*names: str, times: str = "differentiable once") -> None:
    """Raise an error when operators without a derivative are differentiated, instead of returning zeros."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def refusal(op: str) -> Callable[..., NoReturn]:
        def refuse(ctx: Any, *grads: Any) -> NoReturn:
            raise _no_derivative(op, times)

        return refuse

    for op in (f"flmoe::{name}" for name in names):
        torch.library.register_autograd(op, refusal(op), setup_context=setup)


def loop_over_gradients(name: str) -> None:
    """Let torch.autograd.grad with is_grads_batched call a backward operator once for each gradient.

    torch has this fallback only for operators without lists of tensors. The operator's first argument must be the
    gradient, and it must return a list of tensors.
    """
    operator = getattr(torch.ops.flmoe, name)
    internal: Any = torch
    missing = 7919  # the number of gradients at a level without a batch

    def run(grad: torch.Tensor, *args: Any) -> list[torch.Tensor]:
        # The level of the vmap is not that of this thread: a GPU's backward has a thread of its own.
        for level in reversed(range(1, _LEVELS)):
            gradients = internal._remove_batch_dim(grad, level, missing, 0)
            if len(gradients) != missing:
                break
        else:
            raise _unavailable(name, "this batch of gradients")
        results = zip(*(operator(each, *args) for each in gradients), strict=True)
        return [internal._add_batch_dim(torch.stack(each), 0, level) for each in results]

    torch.library.impl(f"flmoe::{name}", "Batched", run)
