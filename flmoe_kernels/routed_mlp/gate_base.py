"""What all gates have in common: their sizes, the losses that they gather, and FL-I2MoE's hooks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from .api import Routing

# Calls whose losses are added up before the gate takes it that nobody wants them: each holds its graph.
MAX_PENDING = 256


class Gate(nn.Module):
    """What all gates have in common.

    Losses: in training, with gradients recorded, those of successive calls add up until get_loss takes them, so
    that every modality and view counts. In eval mode or under no_grad a call's loss takes the place of what was
    there, and a training call's the place of such a one. A loss that nobody takes must not hold graphs for ever:
    after MAX_PENDING calls the gate warns once and starts afresh. What activation checkpointing computes again
    during a backward pass is not counted again (its use_reentrant=True runs the first pass under no_grad, where
    no loss has a gradient).

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

    TRANSIENT = ("loss", "indicates")

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
        self._pending = 0
        self._warned = False

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
        if not (self.training and torch.is_grad_enabled()):
            self.loss, self._pending = loss, 0
            return
        if _inside_backward():
            return
        if self.loss is None or self._pending in (0, MAX_PENDING):
            if self._pending == MAX_PENDING and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the losses of {MAX_PENDING} calls of a {type(self).__name__} were never taken and are "
                    "dropped: call get_loss in each training step, or gate_loss of the module around it",
                    stacklevel=2,
                )
            self.loss, self._pending = loss, 1
        else:
            self.loss, self._pending = self.loss + loss, self._pending + 1

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """The gathered loss, a scalar, or None; by default it is forgotten."""
        loss = self.loss
        if clear:
            self.loss, self._pending = None, 0
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
        return {**self.__dict__, **dict.fromkeys(self.TRANSIENT), "topk_logits": [], "_pending": 0}

    def extra_repr(self) -> str:
        return f"experts={self.tot_expert}, top_k={self.top_k}"


def _inside_backward() -> bool:
    """Whether this runs within a backward pass, as what checkpointing computes again does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
