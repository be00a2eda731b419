"""Steps of a dense encoder layer before and after its attention, with separate or with fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Limits = dict[str, Any]  # arguments of kernels on counted rows
Drop = tuple[Tensor | None, float]  # seed and rate of a dropout
NONE: Drop = (None, 0.0)


class Weights(NamedTuple):
    """Weights of one encoder layer, (E, ...) each; also their gradients, or flags that select them."""

    gain1: Any
    shift1: Any
    qkv: Any
    proj: Any
    proj_bias: Any
    gain2: Any
    shift2: Any
    w_in: Any
    b_in: Any
    w_out: Any
    b_out: Any


class Saved(NamedTuple):
    """Tensors of a layer for the backward; `total1` of the first layer is the rows. Fused steps leave normed1 and
    normed2 empty: their backward computes the norms again."""

    total1: Tensor
    mean1: Tensor
    rstd1: Tensor
    normed1: Tensor
    qkv: Tensor  # (E * views, rows, 3, heads, width of a head)
    attended: Tensor
    lse: Tensor
    total2: Tensor
    mean2: Tensor
    rstd2: Tensor
    normed2: Tensor
    hidden: Tensor


class Stream(NamedTuple):
    """Rows residual + dropout(update); without an update, the residual."""

    residual: Tensor
    update: Tensor | None = None
    dropout: Drop = NONE


class Separate:
    """A kernel for each operation, for all widths and dtypes."""

    fused = False

    def __init__(self, kernels: Any, eps: float, self_residual: bool) -> None:
        self.kernels = kernels
        self.eps = eps
        self.self_residual = self_residual

    def qkv(self, x: Stream, w: Weights, limits: Limits) -> tuple[list[Tensor], Tensor]:
        """Return total1, mean1, rstd1, normed1, and the product with w.qkv."""
        total, normed, mean, rstd = self.kernels.norm(
            x.residual, x.update, w.gain1, w.shift1, *x.dropout, self.eps, **limits
        )
        saved = [x.residual if x.update is None else total, mean, rstd, normed]
        return saved, self.kernels.linear(normed, w.qkv, None, **limits)

    def mlp(
        self,
        residual: Tensor | None,
        attended: Tensor,
        w: Weights,
        dropouts: Sequence[Drop],
        limits: Limits,
        save: bool,
    ) -> tuple[list[Tensor], Stream]:
        """Return total2, mean2, rstd2, normed2, hidden, and the layer's result; dropouts: of the attention branch,
        within the MLP, and of the MLP."""
        branch = self.kernels.linear(attended, w.proj, w.proj_bias, **limits)
        total, normed, mean, rstd = self.kernels.norm(
            residual, branch, w.gain2, w.shift2, *dropouts[0], self.eps, **limits
        )
        update, hidden = self.kernels.mlp(
            normed, w.w_in, w.b_in, w.w_out, w.b_out, *dropouts[1], **limits
        )
        return [total, mean, rstd, normed, hidden], Stream(total, update, dropouts[2])

    def mlp_backward(
        self,
        grads: tuple[Tensor, Tensor],
        x: Saved,
        w: Weights,
        dropouts: Sequence[Drop],
        wants: Sequence[bool],
        limits: Limits,
    ) -> tuple[Tensor, ...]:
        """Gradients of the residual, the attention branch, and gain2 to b_out, of which `wants` selects; those not
        wanted are empty. grads: of the result's residual and update."""
        stream, update = grads
        no = update.new_empty(0)
        normed, *mlp = self.kernels.mlp_backward(
            update,
            x.normed2,
            x.hidden,
            w.w_in,
            w.w_out,
            *dropouts[1],
            (any(wants[:4]), *wants[4:]),
            **limits,
        )
        if not any(wants[:4]):
            return no, no, no, no, *mlp
        norm = self.kernels.norm_backward(
            stream,
            normed,
            x.total2,
            x.mean2,
            x.rstd2,
            w.gain2,
            *dropouts[0],
            self.self_residual,
            wants[:4],
            **limits,
        )
        return *norm, *mlp

    def qkv_backward(
        self,
        grads: tuple[Tensor | None, Tensor],
        x: Saved,
        w: Weights,
        dropout: Drop,
        wants: Sequence[bool],
        limits: Limits,
    ) -> tuple[Tensor, ...]:
        """Gradients of total1's residual and update, gain1, shift1 and qkv, of which `wants` selects; those not
        wanted are empty. grads: gradient of total1 that does not pass through the norm, and gradient of the
        product with w.qkv. dropout: seed and rate of the update's dropout."""
        stream, qkv = grads
        no = qkv.new_empty(0)
        normed, weight, _ = self.kernels.linear_backward(
            qkv, x.normed1, w.qkv, any(wants[:4]), wants[4], False, **limits
        )
        if not any(wants[:4]):
            return no, no, no, no, weight
        norm = self.kernels.norm_backward(
            stream,
            normed,
            x.total1,
            x.mean1,
            x.rstd1,
            w.gain1,
            *dropout,
            False,
            wants[:4],
            **limits,
        )
        return *norm, weight


class Fused(Separate):
    """Kernels that keep blocks of whole rows on chip; see `fits` of the backend."""

    fused = True

    def qkv(self, x: Stream, w: Weights, limits: Limits) -> tuple[list[Tensor], Tensor]:
        rows = x.residual
        out, *statistics = self.kernels.norm_linear(
            rows, w.gain1, w.shift1, w.qkv, self.eps, **limits
        )
        return [rows, *statistics, rows.new_empty(0)], out

    def mlp(
        self,
        residual: Tensor | None,
        attended: Tensor,
        w: Weights,
        dropouts: Sequence[Drop],
        limits: Limits,
        save: bool,
    ) -> tuple[list[Tensor], Stream]:
        branch, inner, outer = dropouts
        total = self.kernels.add_linear(residual, attended, w.proj, w.proj_bias, *branch, **limits)
        norm, weights = (w.gain2, w.shift2), (w.w_in, w.b_in, w.w_out, w.b_out)
        out, *statistics, hidden = self.kernels.norm_mlp(
            total, norm, weights, inner, outer, self.eps, save, **limits
        )
        return [total, *statistics, total.new_empty(0), hidden], Stream(out)

    def mlp_backward(
        self,
        grads: tuple[Tensor, Tensor],
        x: Saved,
        w: Weights,
        dropouts: Sequence[Drop],
        wants: Sequence[bool],
        limits: Limits,
    ) -> tuple[Tensor, ...]:
        branch, inner, _ = dropouts
        saved, norm = (x.total2, x.mean2, x.rstd2, x.hidden), (w.gain2, w.shift2)
        rest = (inner, branch, self.self_residual, wants)
        return self.kernels.norm_mlp_backward(*grads, saved, norm, w.w_in, w.w_out, *rest, **limits)

    def qkv_backward(
        self,
        grads: tuple[Tensor | None, Tensor],
        x: Saved,
        w: Weights,
        dropout: Drop,
        wants: Sequence[bool],
        limits: Limits,
    ) -> tuple[Tensor, ...]:
        saved, norm = (x.total1, x.mean1, x.rstd1), (w.gain1, w.shift1)
        return self.kernels.norm_linear_backward(
            *grads, saved, norm, w.qkv, dropout, wants, **limits
        )


def steps_of(
    kernels: Any, rows: Tensor, hidden: int, eps: float = 0.0, self_residual: bool = False
) -> Separate:
    """The steps of layers on rows (..., width) with MLPs of `hidden` columns: fused where the backend can."""
    fits = getattr(kernels, "fits", None)
    fused = fits is not None and fits(rows.dtype, rows.shape[-1], hidden)
    return (Fused if fused else Separate)(kernels, eps, self_residual)
