"""Samples as games over their tokens: v(S) is a logit when only the tokens of S are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check

from .coalitions import Bools, Floats, Ints
from .memory import batch_size
from .models import (
    Inputs,
    expert_names,
    expert_place,
    game_digest,
    logits_of,
    require_model,
    takes_tokens_in_any_order,
)

OUTPUTS = ("logit", "log_prob")
FILLS = ("zero", "mean", "drop")


class TokenGame:
    """One sample's valid tokens as players, of all modalities, numbered modality after modality.

    A coalition is the set of tokens that stay. The others are masked out ("drop") or filled: then they are still
    attended, as in the published code. Padded tokens are no players and stay as they are.

    With "drop" every modality gets a mask, also where the sample came without: a layer that treats a missing mask
    otherwise (InteractionMoE normalises the features that weigh its experts only under one) has then another
    v(all) than its logit without masks. A PairInteractionMoE, to which order says nothing, is given no more tokens
    of a modality than the longest coalition of the batch has.

    Calling it takes coalitions (m, n) bool and gives values (m,) float64, so that it is a game for shapiq, too.

    Args:
        model: InteractionMoE (or its reference), PairInteractionMoE, or any callable of (inputs, masks) that
            returns logits (B, C), or an object that has them, and treats each sample of a batch on its own.
            In eval mode.
        inputs: M x (B, L_m, ...), None for a missing modality.
        masks: M x (B, L_m), True or 1 = valid, or None each.
        target: the class; None for the one that the model, not the expert, predicts of the full sample.
        output: "logit", or "log_prob", its log-softmax over the classes.
        expert: position or name: v is then of this expert's own logits, see `models.logits_of`.
        fill: what is done to absent tokens.
        baseline: for "mean" the fill of each modality, M x (D_m,) or (L_m, D_m): see `token_means`.
        sample: which of the B.
        max_batch: coalitions that the model sees at once; None for what the memory at hand allows.

    Attributes:
        players: n.
        tokens: (n, 2), modality and position of each player.
        lengths: L_m.
        target: the class.
        batch_size: coalitions that the model sees at once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        masks: Inputs | None = None,
        *,
        target: int | None = None,
        output: str = "logit",
        expert: str | int | None = None,
        fill: str = "drop",
        baseline: Sequence[Tensor | None] | None = None,
        sample: int = 0,
        max_batch: int | None = None,
    ) -> None:
        check.require_choice("output", output, OUTPUTS)
        check.require_choice("fill", fill, FILLS)
        require_model(model, masking=fill == "drop")
        check.require_count("sample", sample, 0, require_inputs(inputs, masks) - 1)
        self.model, self.output, self.fill = model, output, fill
        self.expert = expert_place(model, expert)
        self._inputs = [None if x is None else x[sample : sample + 1].detach() for x in inputs]
        self._masks = one_sample(masks, sample)
        self._device = next(x.device for x in self._inputs if x is not None)
        self.lengths = tuple(0 if x is None else x.shape[1] for x in self._inputs)
        self.tokens = players_of(self.lengths, self._masks)
        self._place = _flat_places(self.tokens, self.lengths)
        self.fill_values = fill_values(fill, baseline, self._inputs)
        self.target = self._target(target)
        if max_batch is None:
            given = [x for x in self._inputs if x is not None]
            max_batch = batch_size(sum(x.nbytes for x in given), self._device)
        check.require_count("max_batch", max_batch, 1)
        self.batch_size = max_batch

    @property
    def players(self) -> int:
        return len(self.tokens)

    @torch.no_grad()
    def __call__(self, coalitions: Bools) -> Floats:
        """Values (m,) of coalitions (m, n)."""
        coalitions = require_coalitions(coalitions, self.players)
        require_model(self.model, masking=self.fill == "drop")
        values = np.empty(len(coalitions))
        for start in range(0, len(coalitions), self.batch_size):
            batch = coalitions[start : start + self.batch_size]
            values[start : start + len(batch)] = self._values(batch)
        return values

    def describe(self) -> dict[str, Any]:
        """The value function in JSON's types."""
        expert = None if self.expert is None else expert_names(self.model)[self.expert]
        return {
            "of": type(self.model).__name__,
            "target": self.target,
            "output": self.output,
            "expert": expert,
            "fill": self.fill,
        }

    def fingerprint(self) -> str:
        """Of the sample, the model and the value function, see `models.model_digest`."""
        masks: Inputs = [None] * len(self._inputs) if self._masks is None else self._masks
        tensors = (*self._inputs, *masks, *self.fill_values)
        return game_digest(self.model, self.describe(), tensors, self._device)

    def _values(self, coalitions: Bools) -> Floats:
        logits = logits_of(self.model, *self._present(coalitions), self.expert)
        if logits.shape[0] != len(coalitions):
            raise ValueError(
                f"model: expected logits of {len(coalitions)} samples, got {logits.shape[0]}"
            )
        logits = logits.double()
        if self.output == "log_prob":
            logits = logits.log_softmax(dim=1)
        return logits[:, self.target].cpu().numpy()

    def _present(self, coalitions: Bools) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
        """The model's inputs and masks with only the coalitions' tokens, a coalition per sample."""
        m = len(coalitions)
        inside = np.zeros((m, sum(self.lengths)), dtype=np.bool_)
        inside[:, self._place] = coalitions
        kept = torch.from_numpy(inside).to(self._device).split(list(self.lengths), dim=1)
        packs = takes_tokens_in_any_order(self.model)
        inputs: list[Tensor | None] = []
        masks: list[Tensor | None] = []
        for k, x in enumerate(self._inputs):
            mask = None if self._masks is None else self._masks[k]
            if x is None:
                inputs.append(None)
                masks.append(None)
            elif self.fill == "drop":
                x, stays = x.expand(m, *x.shape[1:]), kept[k]
                tokens = packed_tokens(x, stays) if packs else (x, stays)
                inputs.append(tokens[0])
                masks.append(tokens[1])
            else:
                fill = self.fill_values[k]
                assert fill is not None
                stays = kept[k] if mask is None else kept[k] | ~mask.to(torch.bool)
                inputs.append(
                    torch.where(stays.reshape(*stays.shape, *[1] * (x.dim() - 2)), x, fill)
                )
                masks.append(None if mask is None else mask.expand(m, -1))
        return inputs, masks if self.fill == "drop" or self._masks is not None else None

    @torch.no_grad()
    def _target(self, target: int | None) -> int:
        # The prediction is that of the sample as it came, see above; else one pass tells the number of classes.
        whole = (self._inputs, self._masks)
        if target is not None:
            whole = self._present(np.ones((1, self.players), dtype=np.bool_))
        logits = logits_of(self.model, *whole, None)
        classes = logits.shape[1]
        if self.output == "log_prob" and classes == 1:
            raise ValueError("output: expected 'logit', as a probability of one class is always 1")
        if target is None:
            return int(logits.argmax(dim=1))
        check.require_count("target", target, 0, classes - 1)
        return int(target)


def packed_tokens(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept tokens (B, L) of x (B, L, ...) moved up in their order, to the longest row's number of them.

    Returns:
        (B, K, ...) and the mask (B, K). Waits for a GPU.
    """
    longest = int(kept.sum(dim=1).max()) if len(kept) else 0
    order = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True)[1][:, :longest]
    rows = torch.arange(len(kept), device=kept.device).unsqueeze(1)
    return x[rows, order], kept.gather(1, order)


def require_coalitions(coalitions: Any, players: int) -> Bools:
    """Coalitions (m, n) as bool. Raises ValueError: another shape."""
    found: Bools = np.asarray(coalitions, dtype=np.bool_)
    if found.ndim != 2 or found.shape[1] != players:
        raise ValueError(f"coalitions: expected (coalitions, {players}), got {found.shape}")
    return found


def require_inputs(inputs: Any, masks: Any) -> int:
    """The batch size B of inputs M x (B, L_m, ...) or None, at least one given, and masks that fit.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"inputs: expected a list of Tensors, got {type(inputs).__name__}")
    given = [(m, x) for m, x in enumerate(inputs) if x is not None]
    if not given:
        raise ValueError("inputs: expected at least one modality, got none")
    for m, x in given:
        check.require_tensor(f"inputs[{m}]", x)
        if x.dim() < 3 or x.shape[0] != given[0][1].shape[0]:
            batch = given[0][1].shape[0] if given[0][1].dim() > 2 else "batch"
            raise ValueError(
                f"inputs[{m}]: expected ({batch}, tokens, features), got {tuple(x.shape)}"
            )
    check.require_masks(inputs, masks)
    return int(given[0][1].shape[0])


def one_sample(masks: Inputs | None, sample: int) -> list[Tensor | None] | None:
    """Masks of one sample, batch 1; None where all are None."""
    if masks is None or all(mask is None for mask in masks):
        return None
    return [None if mask is None else mask[sample : sample + 1].detach() for mask in masks]


def players_of(lengths: Sequence[int], masks: Inputs | None) -> Ints:
    """Modality and position (n, 2) of the valid tokens of one sample, of masks M x (1, L_m)."""
    found = [np.zeros((0, 2), dtype=np.int64)]
    for m, length in enumerate(lengths):
        mask = None if masks is None else masks[m]
        valid = np.ones(length, dtype=np.bool_)
        if mask is not None:
            valid = mask[0].to(torch.bool).cpu().numpy()
        position = np.flatnonzero(valid)
        found.append(np.stack([np.full_like(position, m), position], axis=1))
    return np.concatenate(found)


@torch.no_grad()
def token_means(
    samples: Iterable[tuple[Inputs, Inputs | None]], *, exempt: Sequence[int] = ()
) -> list[Tensor]:
    """Each modality's mean token (D_m, ...) over the valid tokens of a data set: the baseline of fill="mean".

    Args:
        samples: batches of (inputs, masks); a modality may be missing from some, not from all.
        exempt: modalities whose token 0 is left out of the mean, as `faithfulness` leaves it unmasked, and under
            the same rule: where a batch has one token of the modality alone, it counts.

    Returns:
        Summed in float64, in the dtype and on the device of the first batch that has the modality.

    Raises:
        TypeError, ValueError: no batches, one of another number of modalities, a modality without one valid
            token, exempt that names no modality, or one twice.
    """
    if len(set(exempt)) < len(exempt):
        raise ValueError(f"exempt: expected each modality once, got {tuple(exempt)}")
    sums: list[Tensor | None] = []
    counts: list[float] = []
    like: list[Tensor | None] = []
    for inputs, masks in samples:
        if not sums:
            sums, like = [None] * len(inputs), [None] * len(inputs)
            counts = [0.0] * len(inputs)
            for m in exempt:
                check.require_count("exempt", m, 0, len(inputs) - 1)
        if len(inputs) != len(sums):
            raise ValueError(f"samples: expected {len(sums)} modalities, got {len(inputs)}")
        if any(x is not None for x in inputs):
            require_inputs(inputs, masks)
        for m, x in enumerate(inputs):
            if x is None:
                continue
            mask = None if masks is None else masks[m]
            counted = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if mask is not None:
                counted = mask.to(torch.bool, copy=True)
            if m in exempt and x.shape[1] > 1:
                counted[:, 0] = False
            # A padded token may hold anything, NaN too.
            kept = torch.where(
                counted.reshape(*counted.shape, *[1] * (x.dim() - 2)), x.double(), 0.0
            )
            part, known = kept.sum(dim=(0, 1)), sums[m]
            sums[m] = part if known is None else known + part
            counts[m] += float(counted.sum())
            like[m] = x if like[m] is None else like[m]
    means = []
    for m, (total, count, example) in enumerate(zip(sums, counts, like, strict=True)):
        if total is None or example is None or not count:
            raise ValueError(f"samples: expected a valid token of modality {m}, got none")
        means.append((total / count).to(example.dtype))
    if not means:
        raise ValueError("samples: expected batches of (inputs, masks), got none")
    return means


def _flat_places(tokens: Ints, lengths: Sequence[int]) -> Ints:
    """(n,): where each player stands in the concatenated modalities."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return (starts[tokens[:, 0]] + tokens[:, 1]).astype(np.int64)


def fill_values(
    fill: str, baseline: Sequence[Tensor | None] | None, inputs: Inputs
) -> list[Tensor | None]:
    """What absent tokens of each modality become, to be broadcast over (m, L_m, ...); None with "drop"."""
    if fill != "mean" and baseline is not None:
        raise ValueError(f"baseline: expected None with fill={fill!r}")
    if fill == "drop":
        return [None] * len(inputs)
    for m, x in enumerate(inputs):
        if x is not None:
            check.require_floating(f"inputs[{m}]", x)
    if fill == "zero":
        return [None if x is None else x.new_zeros(()) for x in inputs]
    if not isinstance(baseline, list | tuple) or len(baseline) != len(inputs):
        raise ValueError(
            f"baseline: expected {len(inputs)} Tensors with fill='mean', one for each modality"
        )
    fills: list[Tensor | None] = []
    for m, (x, mean) in enumerate(zip(inputs, baseline, strict=True)):
        if x is None:
            fills.append(None)
            continue
        check.require_tensor(f"baseline[{m}]", mean)
        assert mean is not None
        check.require_same(f"baseline[{m}]", mean, f"inputs[{m}]", x)
        if tuple(mean.shape) not in (tuple(x.shape[2:]), tuple(x.shape[1:])):
            raise ValueError(
                f"baseline[{m}]: expected {tuple(x.shape[2:])} or {tuple(x.shape[1:])}, got "
                f"{tuple(mean.shape)}"
            )
        fills.append(mean.detach())
    return fills
