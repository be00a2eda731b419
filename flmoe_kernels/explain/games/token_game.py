"""A sample as a game over its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.targets import require_prediction

from .coalitions import Bools, Floats
from .masked import MaskedModel
from .models import Inputs, describe, game_digest, logits_of, require_model
from .tokens import flat_places, players_of

OUTPUTS = ("logit", "log_prob")


class TokenGame:
    """A game whose players are one sample's valid tokens, numbered modality after modality.

    v(S) is the logit when only the tokens of S are present. Absent tokens are masked out ("drop") or filled;
    filled tokens are still attended, as in the published code. Padded tokens are not players and are not changed.

    With "drop" every modality has a mask, even if the sample had none. If a layer treats a missing mask
    differently (InteractionMoE normalises its reweighting features only with a mask), v(all) differs from its
    logit without masks. For a PairInteractionMoE, where the order of tokens does not matter, each modality is
    cut to the longest coalition of the batch.

    A call maps coalitions (m, n) bool to values (m,) float64, so shapiq can use it as a game.

    Args:
        model: InteractionMoE (or its reference), PairInteractionMoE, or any callable of (inputs, masks) that
            returns logits (B, C) or an object with `logits`, and computes the samples of a batch independently.
            In eval mode.
        inputs: M x (B, L_m, ...), None for a missing modality.
        masks: M x (B, L_m), True or 1 = valid; None for a modality without mask.
        target: the class, any integer; None for the class that the model, not the expert, predicts for the full
            sample.
        output: "logit", or "log_prob", its log-softmax over the classes.
        expert: position or name: v is then the logit of this expert, see `models.logits_of`.
        fill: replacement of absent tokens: "zero", "mean" or "drop".
        baseline: for "mean" the fill of each modality, M x (D_m,) or (L_m, D_m): see `token_means`.
        sample: position in the batch.
        max_batch: coalitions that the model evaluates at once; None: as the available memory allows. 1 if gates of
            a Module may drop tokens, because logits would depend on the other coalitions.

    Attributes:
        players: n.
        tokens: (n, 2), modality and position of each player.
        lengths: L_m.
        target: the class.
        batch_size: coalitions that the model evaluates at once.

    Raises:
        TypeError, ValueError: an invalid argument, or logits of the whole sample that are NaN or inf; the
            message says what was expected and what was passed. A call returns what the model gives, also NaN.
    """

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        masks: Inputs | None = None,
        *,
        target: Any = None,
        output: str = "logit",
        expert: str | int | None = None,
        fill: str = "drop",
        baseline: Sequence[Tensor | None] | None = None,
        sample: int = 0,
        max_batch: int | None = None,
    ) -> None:
        check.require_choice("output", output, OUTPUTS)
        self._sample = sample
        self._masked = MaskedModel.of(
            model, inputs, masks, fill, baseline, expert, max_batch, sample
        )
        self.output = output
        self.lengths = tuple(x.shape[1] for x in self._masked.valid)
        self.tokens = players_of(self._masked.valid, 0)
        self._place = flat_places(self.tokens, self.lengths)
        if target is not None:
            number = check.class_number("target", target)
            if number is None:
                raise TypeError(f"target: expected an int or None, got {type(target).__name__}")
            target = number
        self.target = self._target(target)
        self.batch_size = self._masked.max_batch

    @property
    def players(self) -> int:
        return len(self.tokens)

    @torch.no_grad()
    def __call__(self, coalitions: Bools) -> Floats:
        """Return the values (m,) of coalitions (m, n)."""
        coalitions = require_coalitions(coalitions, self.players)
        require_model(self._masked.model, masking=self._masked.fill == "drop")
        values = np.empty(len(coalitions))
        for start in range(0, len(coalitions), self.batch_size):
            batch = coalitions[start : start + self.batch_size]
            values[start : start + len(batch)] = self._values(batch)
        return values

    def describe(self) -> dict[str, Any]:
        """Return a description of the value function, JSON serializable."""
        masked = self._masked
        more = {"target": self.target, "output": self.output}
        return describe(masked.model, masked.expert, masked.fill, **more)

    def fingerprint(self) -> str:
        """Return a digest of the sample, the model and the value function, see `models.model_digest`."""
        masked = self._masked
        masks = [None] * len(masked.inputs) if masked.masks is None else masked.masks
        tensors = (*masked.inputs, *masks, *masked.fills)
        return game_digest(masked.model, self.describe(), tensors, masked.device)

    def _values(self, coalitions: Bools) -> Floats:
        logits = self._masked.logits(*self._absent(coalitions))
        if logits.shape[0] != len(coalitions):
            raise ValueError(
                f"model: expected logits of {len(coalitions)} samples, got {logits.shape[0]}"
            )
        logits = logits.double()
        if self.output == "log_prob":
            logits = logits.log_softmax(dim=1)
        return logits[:, self.target].cpu().numpy()

    def _absent(self, coalitions: Bools) -> tuple[Tensor, list[Tensor]]:
        absent = np.zeros((len(coalitions), sum(self.lengths)), dtype=np.bool_)
        absent[:, self._place] = ~coalitions
        rows = torch.zeros(len(coalitions), dtype=torch.int64, device=self._masked.device)
        return rows, list(torch.from_numpy(absent).to(rows.device).split(self.lengths, dim=1))

    @torch.no_grad()
    def _target(self, target: int | None) -> int:
        # The prediction uses the sample's own masks, see the class; else one pass gives the number of classes.
        masked = self._masked
        inputs, masks = masked.inputs, masked.masks
        if target is not None:
            everybody = np.ones((1, self.players), dtype=np.bool_)
            inputs, masks = masked.present(*self._absent(everybody))
        logits = logits_of(masked.model, inputs, masks, None)
        classes = logits.shape[1]
        if self.players:
            require_prediction(logits, first=self._sample)
        if self.output == "log_prob" and classes == 1:
            raise ValueError("output: expected 'logit', as a probability of one class is always 1")
        if target is None:
            return int(logits.argmax(dim=1))
        check.require_count("target", target, 0, classes - 1)
        return int(target)


def require_coalitions(coalitions: Any, players: int) -> Bools:
    """Convert coalitions (m, n) to bool. Raises ValueError: another shape."""
    array: Bools = np.asarray(coalitions, dtype=np.bool_)
    if array.ndim != 2 or array.shape[1] != players:
        raise ValueError(f"coalitions: expected (coalitions, {players}), got {array.shape}")
    return array
