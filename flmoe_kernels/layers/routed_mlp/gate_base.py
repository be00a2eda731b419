"""What all gates have in common: their sizes, the losses that they gather, and FL-I2MoE's hooks."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.ops.routing.api import Routing


class Gate(nn.Module):
    """What all gates have in common.

    Losses: in training, with gradients recorded, those of successive calls add up until get_loss takes them, so
    that every modality and view counts. A backward pass through one of these calls ends the step: what nobody
    took stays to be looked at, and the next training call starts afresh, for its graph is gone (a pass with
    create_graph=True ends nothing). In eval mode or under no_grad a call's loss takes the place of what was
    there, but for a sum that training calls are still adding to, which is left as it is. A loop that neither
    takes losses nor goes backward should run under no_grad, for each call's graph is kept.

    What activation checkpointing computes again during a backward pass is not counted again; its
    use_reentrant=True runs the first pass under no_grad, where no loss has a gradient. Compiled code cannot tell
    either: torch.compile inside of a checkpoint counts again, and a compiled training call does not see the
    backward pass. Take the loss in every training step there, wanted or not, and with a checkpoint around
    compiled code call get_loss once more after the backward pass, to throw away what it counted again.

    Args:
        d_model: token width D.
        num_expert, world_size: experts of one process, and processes; E = num_expert * world_size.
        top_k: experts of a token.

    Attributes:
        loss: gathered and not yet taken, a scalar; None before.
        topk_logits: the last call's index, detached, in a list of one (the published list grows without end).
        backend: of the routing; None for the choice by device.
        spread: whether the tokens of all ranks of `group` count in capacities and in losses, which then are the
            same on all; False. RoutedMLP sets it where experts live on several ranks.
        group: the process group; None for the default one.
        None but the last three is copied or pickled.
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
        # The first loss of those that `loss` is the sum of, while training calls still add to it. Not a count: a
        # compiled call would be compiled anew for each value.
        self._first: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: int | None = None) -> Routing:
        """Route x (N, D).

        Args:
            x: (N, D).
            mask: (N) bool, True = valid.
            tokens: how many tokens a capacity is a share of; default N. Rows that were packed without their
                padding are fewer than the tokens that the published capacity counts.

        Returns:
            Routing: index (N, K), -1 for a dropped choice, and weight (N, K).
        """
        index, weight, loss = self.route(x, mask, len(x) if tokens is None else tokens)
        self.set_loss(loss)
        if self._counts():
            self._watch(weight, loss)
        self.set_topk_logit(index)
        return Routing(index, weight)

    def route(self, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """index, weight and this call's loss, a scalar."""
        raise NotImplementedError

    def clean_logits(self, x: Tensor) -> Tensor:
        """(N, E): what the choice in eval mode is by."""
        raise NotImplementedError

    def set_loss(self, loss: Tensor) -> None:
        """Gather a call's loss."""
        if not self._counts():
            if self._first is None and not _inside_backward():
                self.loss = loss
        elif self._first is None or self.loss is None:
            self.loss = self._first = loss
        else:
            self.loss = self.loss + loss

    def _counts(self) -> bool:
        """Whether a call now is one of a training step, and not computed again for its backward pass."""
        return self.training and torch.is_grad_enabled() and not _inside_backward()

    def _watch(self, *outputs: Tensor) -> None:
        """End the step on a backward pass through any of a call's outputs."""
        if self._first is None or torch.compiler.is_compiling():
            return
        # Weak, or the graph would hold the gate that holds the graph, where no collector looks.
        gate, first = weakref.ref(self), weakref.ref(self._first)

        def passed(_grad: Tensor) -> None:
            held = gate()
            # Gradients are recorded with create_graph=True alone, which keeps the graph.
            if held is not None and held._first is first() and not torch.is_grad_enabled():
                held._first = None

        for output in outputs:
            if output.requires_grad:
                output.register_hook(passed)

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """The gathered loss, a scalar, or None; by default it is forgotten."""
        loss = self.loss
        if clear:
            self.loss = self._first = None
        return loss

    @property
    def has_loss(self) -> bool:
        return self.loss is not None

    def set_topk_logit(self, logit: Tensor) -> None:
        """Keep the indices of a call in topk_logits, in place of an earlier call's."""
        self.topk_logits = [logit.detach()]

    def reset_topk_logit(self) -> None:
        self.topk_logits = []

    def get_topk_logit(self, clear: bool = True) -> list[Tensor]:
        kept = self.topk_logits
        if clear:
            self.topk_logits = []
        return kept

    def set_topk_indicates(self, indicate: Any) -> None:
        """Keep anything for get_topk_indicate; the gate does not look at it."""
        self.indicates = indicate

    def get_topk_indicate(self, clear: bool = True) -> Any:
        kept = self.indicates
        if clear:
            self.indicates = None
        return kept

    def __getstate__(self) -> dict[str, Any]:
        # A loss on a graph can be neither copied nor pickled.
        return {**self.__dict__, **dict.fromkeys(self.TRANSIENT), "topk_logits": []}

    def extra_repr(self) -> str:
        return f"experts={self.tot_expert}, top_k={self.top_k}"


def _inside_backward() -> bool:
    """Whether this runs within a backward pass, as what checkpointing computes again does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
