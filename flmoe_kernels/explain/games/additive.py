"""A sample of PairInteractionMoE as a 2-additive game, from one pass of the layer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.layers.pair_interaction_moe.module import PairInteractionMoE

from .coalitions import Bools, Floats, Ints
from .models import (
    Inputs,
    changed_pairs_reason,
    describe,
    expert_place,
    game_digest,
    require_model,
)
from .token_game import require_coalitions
from .tokens import flat_places, players_of, require_inputs, rows_of, valid_tokens


class TwoAdditiveGame:
    """The game of `TokenGame(model, ..., output="logit", fill="drop")` for a PairInteractionMoE, in closed form.

    v(S) = v(none) + sum of single[i] + sum of pair[i, j], i < j in S. Its Shapley interaction index is pair[i, j].
    Quantities without a closed form are estimated on this game: a coalition costs n^2 products, not a pass of
    the layer.

    Args:
        model, inputs, masks, target, expert, sample: as TokenGame.

    Attributes:
        players, tokens, lengths, target, batch_size: as TokenGame.
        value, baseline: v(all) and v(none).
        single: (n,), terms of a token with the anchors.
        pair: (n, n), symmetric, 0 within a modality. Memory is O(n^2).

    Raises:
        TypeError, ValueError: as TokenGame; also ValueError if terms are not finite, and for a layer with a
            forward hook or with a changed method, norm or projection.
    """

    batch_size = 4096

    def __init__(
        self,
        model: PairInteractionMoE,
        inputs: Inputs,
        masks: Inputs | None = None,
        *,
        target: Any = None,
        expert: str | int | None = None,
        sample: int = 0,
    ) -> None:
        if not isinstance(model, PairInteractionMoE):
            raise TypeError(f"model: expected a PairInteractionMoE, got {type(model).__name__}")
        if reason := changed_pairs_reason(model):
            raise ValueError(f"{reason}; a TokenGame calls the layer")
        require_model(model, masking=True)
        check.require_count("sample", sample, 0, require_inputs(inputs, masks) - 1)
        self._expert = expert_place(model, expert)
        one = slice(sample, sample + 1)
        own = [None if x is None else x[one].detach() for x in inputs]
        mine = rows_of(masks, one)
        explanation = model.explain(own, mine, target)
        self.lengths = explanation.lengths
        self.tokens = players_of(valid_tokens(own, mine), 0)
        self.target = int(explanation.target)
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        kept = flat_places(self.tokens, self.lengths)
        single = [self._of_expert(explanation.anchor_map(m)) for m in range(len(self.lengths))]
        self.single = np.concatenate(single)[kept]
        pair = np.zeros((starts[-1], starts[-1]))
        for m, n in itertools.combinations(range(len(self.lengths)), 2):
            phi = self._of_expert(explanation.pair_map(m, n))
            pair[starts[m] : starts[m + 1], starts[n] : starts[n + 1]] = phi
        self.pair: Floats = (pair + pair.T)[np.ix_(kept, kept)]
        # An expert's part of the logit has its own baseline; the mixture's baseline also includes the bias.
        whole, by_expert = explanation.baseline, explanation.expert_baseline
        self.baseline = float(whole if self._expert is None else by_expert[0, self._expert])
        self.value = self.baseline + float(self.single.sum() + self.pair.sum() / 2)
        if not np.isfinite(self.value):
            raise ValueError(
                "inputs: expected valid tokens that are finite and give finite logits, "
                f"got v(none) = {self.baseline} and v(all) = {self.value}"
            )
        self._model, self._sample = model, [*own, *(mine or [])]
        more = {"target": self.target, "output": "logit"}
        self._described = describe(model, self._expert, "drop", **more)

    @property
    def players(self) -> int:
        return len(self.tokens)

    def __call__(self, coalitions: Bools) -> Floats:
        """Return the values (m,) of coalitions (m, n)."""
        inside = require_coalitions(coalitions, self.players).astype(np.float64)
        pairs = np.einsum("mi,mi->m", inside @ self.pair, inside) / 2
        return self.baseline + inside @ self.single + pairs

    def interactions(self, pairs: Ints) -> Floats:
        """Return the exact Shapley interaction index (p,) of pairs (p, 2) of players."""
        return self.pair[pairs[:, 0], pairs[:, 1]]

    def describe(self) -> dict[str, Any]:
        return dict(self._described)

    def fingerprint(self) -> str:
        """Digest of sample, model and value function; the terms are left out, as last bits differ by machine."""
        device = next(x.device for x in self._sample if x is not None)
        return game_digest(self._model, self._described, self._sample, device)

    def _of_expert(self, terms: Tensor) -> Floats:
        """Select the terms (1, E, ...) of one expert, or sum over all experts, in float64."""
        doubled = terms[0].to(torch.float64).cpu()
        whole = doubled.sum(dim=0) if self._expert is None else doubled[self._expert]
        return whole.numpy()
