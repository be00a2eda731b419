"""Base class of all gates: sizes, accumulated losses, FL-I2MoE's hooks."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.ops.routing.api import Routing


class Gate(nn.Module):
    """Base class of all gates.

    Losses: in training, with gradients recorded, the losses of successive calls are added up until get_loss clears
    them, so that every modality and view counts. A backward pass through one of these calls ends the step: the sum
    stays readable, but the next training call starts a new sum, because the graph has been freed (a pass with
    create_graph=True does not end the step). In eval mode or under no_grad, the loss of a call replaces the stored
    loss, except for a sum of training calls that is not finished. A loop that neither calls get_loss nor runs a
    backward pass should run under no_grad, because the graph of every call is kept.

    With activation checkpointing, the recomputation in the backward pass is not counted again; use_reentrant=True
    runs the first pass under no_grad, so that no loss has a gradient. Compiled code cannot detect either case:
    torch.compile inside a checkpoint counts twice, and a compiled training call does not notice the backward pass.
    There, call get_loss in every training step, even if the loss is not used, and with a checkpoint around
    compiled code call it again after the backward pass, to discard what was counted twice.

    Args:
        d_model: token width D.
        num_expert, world_size: experts per process, and number of processes; E = num_expert * world_size.
        top_k: experts per token.

    Attributes:
        loss: the accumulated loss since the last get_loss, a scalar or None.
        topk_logits: the last call's index, detached, in a list of length 1 (the published list grows without end).
        backend: backend of the routing; None for the choice by device.
        spread: whether capacities and losses count the tokens of all ranks of `group`, and are then the same on
            all ranks; default False. RoutedMLP sets it if several ranks have experts.
        group: the process group; None for the default group.
        Only the last three are copied and pickled.
    """

    TRANSIENT = ("loss", "_first", "indicates")

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int) -> None:
        super().__init__()
        check.require_count("d_model", d_model, 1)
        check.require_count("num_expert", num_expert, 1)
        check.require_count("world_size", world_size, 1)
        self.d_model = d_model
        self.num_expert, self.world_size = num_expert, world_size
        self.tot_expert = num_expert * world_size
        check.require_count("top_k", top_k, 1, self.tot_expert)
        self.top_k = top_k
        self.backend: str | None = None
        self.spread = False
        self.group: Any = None
        self.loss: Tensor | None = None
        self.topk_logits: list[Tensor] = []
        self.indicates: Any = None
        # The first loss in the sum `loss`, while training calls still add to it. Not a count, because compiled
        # code would be recompiled for every value.
        self._first: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: int | None = None) -> Routing:
        """Route x (N, D).

        Args:
            x: (N, D).
            mask: (N) bool, True = valid.
            tokens: number of tokens for the capacity; default N. The published capacity also counts padding, which
                packed rows do not contain.

        Returns:
            Routing: index (N, K), -1 for a dropped choice, and weight (N, K).
        """
        index, weight, loss = self.route(x, mask, x.shape[0] if tokens is None else tokens)
        self.set_loss(loss)
        if self._counts():
            self._watch(weight, loss)
        self.set_topk_logit(index)
        return Routing(index, weight)

    def route(self, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return index, weight and this call's loss, a scalar."""
        raise NotImplementedError

    def clean_logits(self, x: Tensor) -> Tensor:
        """Logits (N, E) that determine the choice in eval mode."""
        raise NotImplementedError

    @property
    def may_drop(self) -> bool:
        """Whether a token's experts may depend on the other tokens of a call, as with a capacity.

        Explanations then evaluate each sample alone. A subclass without a limit returns False.
        """
        return True

    def _for_all_experts(self, logits: Tensor) -> Tensor:
        if logits.shape[1] != self.tot_expert:
            raise ValueError(
                f"gate: expected logits of {self.tot_expert} experts, got {logits.shape[1]}"
            )
        return logits

    def set_loss(self, loss: Tensor) -> None:
        """Add or store the loss of a call."""
        if not self._counts():
            if self._first is None and not _inside_backward():
                self.loss = loss
        elif self._first is None or self.loss is None or _escaped(self.loss):
            self.loss = self._first = loss
        else:
            self.loss = self.loss + loss

    def _counts(self) -> bool:
        """Whether a call is part of a training step, and not recomputed in a backward pass."""
        return self.training and torch.is_grad_enabled() and not _inside_backward()

    def _watch(self, *outputs: Tensor) -> None:
        """End the step on a backward pass through any of a call's outputs."""
        if self._first is None or torch.compiler.is_compiling():
            return
        # Weak references, because the garbage collector does not see cycles through the graph.
        gate, first = weakref.ref(self), weakref.ref(self._first)

        def passed(_grad: Tensor) -> None:
            held = gate()
            # In a backward pass gradients are recorded only with create_graph=True, which keeps the graph.
            if held is not None and held._first is first() and not torch.is_grad_enabled():
                held._first = None

        for output in outputs:
            if output.requires_grad:
                output.register_hook(passed)

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """Return the accumulated loss, a scalar or None, and by default clear it."""
        loss = self.loss
        if clear:
            self.loss = self._first = None
        return loss

    @property
    def has_loss(self) -> bool:
        return self.loss is not None

    def set_topk_logit(self, logit: Tensor) -> None:
        """Store the indices of a call in topk_logits, replacing those of an earlier call."""
        self.topk_logits = [logit.detach()]

    def reset_topk_logit(self) -> None:
        self.topk_logits = []

    def get_topk_logit(self, clear: bool = True) -> list[Tensor]:
        kept = self.topk_logits
        if clear:
            self.topk_logits = []
        return kept

    def set_topk_indicates(self, indicate: Any) -> None:
        """Store any object for get_topk_indicate; the gate does not use it."""
        self.indicates = indicate

    def get_topk_indicate(self, clear: bool = True) -> Any:
        kept = self.indicates
        if clear:
            self.indicates = None
        return kept

    def __getstate__(self) -> dict[str, Any]:
        # A loss with a graph can be neither copied nor pickled.
        return {**self.__dict__, **dict.fromkeys(self.TRANSIENT), "topk_logits": []}

    def extra_repr(self) -> str:
        return f"experts={self.tot_expert}, top_k={self.top_k}"


def _inside_backward() -> bool:
    """Whether this runs within a backward pass, for example as a recomputation by checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _escaped(loss: Tensor) -> bool:
    """Whether this was computed in a torch.func transform that has ended."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or not functorch.is_functorch_wrapped_tensor(loss):
        return False
    levels = [level.level() for level in functorch.get_interpreter_stack() or ()]
    return functorch.maybe_get_level(loss) not in levels
