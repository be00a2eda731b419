"""The public function `attribute`: attribution of a logit to tokens, by expert."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.extras import progress_bar
from flmoe_kernels.explain.games.masked import fill_values
from flmoe_kernels.explain.games.memory import choose_batch
from flmoe_kernels.explain.games.models import Inputs, expert_names, logits_of, require_model
from flmoe_kernels.explain.games.tokens import require_samples, valid_tokens
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.pair_interaction_moe.module import EXPLAINED, PairInteractionMoE

from .experts import ALL, TOKENS, Experts, check_readout, readout_weights, require_unchanged
from .integrated import GAUSS, RULES, LogitsOf, Path, integrated_gradients
from .rollout import attention_rollout, gradient_rollout
from .targets import LOGIT, require_finite, require_prediction, resolve_targets
from .values import (
    EXPERT,
    EXPLAINS,
    GRADIENT_ROLLOUT,
    INTEGRATED,
    METHODS,
    MIXTURE,
    ROLLOUT,
    Attribution,
)

MAX_STEPS = 4096  # the nodes of "gauss_legendre" take time like n_steps^3: some ten seconds


def attribute(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None = None,
    *,
    method: str = GRADIENT_ROLLOUT,
    target: Any = None,
    multi_label: bool = False,
    explains: str = MIXTURE,
    readout: str | int = TOKENS,
    baseline: Sequence[Tensor | None] | None = None,
    n_steps: int = 32,
    rule: str = GAUSS,
    magnitude: bool = False,
    max_batch: int | None = None,
    progress: bool | None = None,
) -> Attribution:
    """Attribute the target's logit to each token, by expert. No L x L map is ever stored.

    With z_e the target's logit of expert e and w_e its weight in the mixture, the score of expert e is w_e z_e,
    its part of the mixture's logit (explains="mixture"), or z_e (explains="expert"). Per expert:

    - attention_rollout: a = r R, R = A_n ... A_1 over the layers, A = (P + I) / 2 with P the mean over heads of
      the softmax rows; r the readout's weights of the last layer's tokens. Describes the attention, independently
      of the score. Source: arXiv 2005.00928.
    - gradient_rollout: a = r R with A = (C + I) / (its row sums), C the mean over heads of relu(P * dP), dP the
      score's gradient by the attention probabilities; w_e is constant, because it does not depend on them.
      Source: arXiv 2103.15679, which does not divide by the row sums.
    - integrated_gradients: (x - x0) * integral over t of the score's gradient at x0 + t (x - x0), summed over the
      token's features; the token's values sum to score(x) - score(x0) up to `completeness_error`, the
      rule's error. Source: arXiv 1703.01365. With explains="mixture" the experts' weights move with t. Those of
      FL-I2MoE come from features that are L2-normalised if masks are given. These jump at a zero baseline:
      their gradient grows like 1 / t and its integral diverges, so values depend on the rule and completeness
      does not hold. Use another baseline, or explains="expert", which uses the weights at x for all t.

    The published evaluator's attributions are those of the mixture (`normalized` scales them): rollouts with
    readout="all", integrated gradients with rule="right", n_steps=16 and magnitude=True. Difference: in layers
    without a residual around the attention (compat "i2moe") there is no I.

    If gates may drop tokens, a sample's logits depend on its batch. Rollouts and the predicted class are those of
    the given batch; integrated gradients evaluate one row at a time.

    Args:
        model: InteractionMoE or its reference (swap() converts a published layer), or a FusionTransformer; for
            integrated_gradients also PairInteractionMoE, or any differentiable callable of (inputs, masks) that
            returns logits. A model without experts counts as one expert, "model". In eval mode. The gradients of
            its parameters are not changed. A layer with a forward hook or a changed method is refused, because its
            experts may not add up to what it returns; integrated_gradients takes a function that calls it.
        inputs: M x (B, L_m, D_m); None for a missing modality if the model accepts it.
        masks: M x (B, L_m), True or 1 = valid; None for a modality without mask.
        method: "attention_rollout", "gradient_rollout" or "integrated_gradients".
        target, multi_label: see `resolve_targets`; by default the class that the model predicts.
        explains: "mixture" or "expert"; a model without experts is the mixture.
        readout: of the rollouts: "tokens", uniform over all valid tokens; "all", uniform over all rows of R, as
            published: rows of padded tokens, which attend to valid ones, count too; "latent", uniform over the
            modalities and the valid tokens of each, the mean of the latent's parts; or a modality, whose part of
            the latent is the mean of its tokens.
        baseline: x0, M x (D_m,) or (L_m, D_m), such as `token_means`; by default 0.
        n_steps, rule: at most MAX_STEPS nodes of the quadrature: "gauss_legendre" (default) converges
            geometrically on these smooth models; use "midpoint" for functions with kinks (ReLU networks);
            "right" is the published rule.
        magnitude: take the mean of |.| over a token's features instead of their sum.
        max_batch: rows of one pass of integrated gradients, samples times steps; None: as memory allows; 1 if
            gates may drop tokens.
        progress: show a bar of integrated gradients on standard error; None: if it is a terminal.

    Returns:
        Attribution.

    Raises:
        TypeError, ValueError: an invalid argument, or a model that gives NaN or inf; the message says what was
            expected and what was passed.

    Cost: a rollout takes one pass per expert, with gradients two passes and a backward; memory O(B L (D + H d))
    and the blocks of scores. Integrated gradients: per expert and sample n_steps passes and backwards, max_batch
    rows in memory.
    """
    check.require_choice("method", method, METHODS)
    check.require_choice("explains", explains, EXPLAINS)
    require_model(model, masking=False)
    require_samples(inputs, masks)
    with torch.inference_mode(False):
        # Copies are made outside inference mode, because autograd rejects inference tensors.
        inputs = [None if x is None else x.detach().clone() for x in inputs]
        if masks is not None:
            masks = [None if mask is None else mask.clone() for mask in masks]
        if method == INTEGRATED:
            path = _path(model, inputs, baseline, n_steps, rule, max_batch)
            wanted = target, multi_label
            return _by_path(model, inputs, masks, wanted, explains, path, magnitude, progress)
        check_readout(readout, len(inputs))
        # Padded rows have zero gradient, so they matter only for attention rollouts.
        padded = readout == ALL and method == ROLLOUT
        experts = Experts.of(model, inputs, masks, padded)
        return _by_rollout(experts, masks, method, (target, multi_label), explains, readout)


def _by_rollout(
    experts: Experts,
    masks: Inputs | None,
    method: str,
    wanted: tuple[Any, bool],
    explains: str,
    readout: str | int,
) -> Attribution:
    valid = valid_tokens(experts.inputs, masks)
    start, whole = readout_weights(readout, valid), torch.cat(valid, dim=1)
    rows: list[Tensor] = []
    logits: list[Tensor] = []
    with torch.no_grad():
        weights = experts.reweight(experts.inputs, masks)
        for e in range(len(experts.names)):
            own, records = experts.run(e, experts.inputs, masks)
            logits.append(own)
            if method == ROLLOUT:
                rows.append(attention_rollout(start, records, whole, experts.residual))
        mixture = (torch.stack(logits, dim=1) * weights.unsqueeze(2)).sum(dim=1)
    there = whole.any(dim=1)
    require_prediction(mixture, there)
    targets = resolve_targets(wanted[0], mixture, wanted[1])
    factors = weights if explains == MIXTURE else torch.ones_like(weights)
    if method == GRADIENT_ROLLOUT:
        for e in range(len(experts.names)):
            with torch.enable_grad():
                own, records = experts.run(e, experts.inputs, masks)
                score = (targets.read(own, LOGIT) * factors[:, e]).sum()
                gradients = torch.autograd.grad(score, [record.out for record in records])
            rows.append(gradient_rollout(start, records, gradients, whole, experts.residual))
    scores = torch.stack([targets.read(own, LOGIT) for own in logits], dim=1) * factors
    lengths = [x.shape[1] for x in valid]
    values = torch.stack(rows, dim=1).masked_fill(~whole.unsqueeze(1), 0.0)
    require_finite(scores, "logits of the experts", there)
    require_finite(values, "attention and gradients", there)
    # Attention rollouts do not include the expert's weight; a gradient of w_e z_e does.
    shares = weights if explains == EXPERT or method == ROLLOUT else torch.ones_like(weights)
    return Attribution(
        index=method,
        explains=explains,
        experts=experts.names,
        values=values.split(lengths, dim=2),
        mixture=torch.einsum("be,bel->bl", shares.double(), values).split(lengths, dim=1),
        valid=tuple(valid),
        weights=weights.double(),
        targets=targets.weights,
        multi_label=targets.multi_label,
        scores=scores,
        completeness_error=None,
        budget=1,
        settings={"readout": readout if isinstance(readout, str) else int(readout)},
    )


def _parts(
    model: Any, inputs: Inputs, masks: Inputs | None, explains: str
) -> tuple[tuple[str, ...], list[LogitsOf], Tensor, Tensor]:
    """Names and logits of the parts whose gradients are integrated; logits of the mixture; the parts' weights."""
    if isinstance(model, ReferenceInteractionMoE):
        experts = Experts.of(model, inputs, masks)
        with torch.no_grad():
            weights = experts.reweight(inputs, masks)
            own = [experts.run(e, inputs, masks)[0] for e in range(len(experts.names))]
        mixture = (torch.stack(own, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        functions = [experts.scores(e, explains == MIXTURE) for e in range(len(own))]
        return experts.names, functions, mixture, weights
    if isinstance(model, PairInteractionMoE):
        require_unchanged(model, EXPLAINED)
    with torch.no_grad():
        mixture = logits_of(model, inputs, masks, None)
    # PairInteractionMoE adds its experts with weight 1; any other model is a single part.
    names = expert_names(model)
    places: list[int | None] = [*range(len(names))] if names else [None]
    functions = [functools.partial(logits_of, model, expert=place) for place in places]
    return names or ("model",), functions, mixture, mixture.new_ones((len(mixture), len(places)))


def _by_path(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None,
    wanted: tuple[Any, bool],
    explains: str,
    path: Path,
    magnitude: bool,
    progress: bool | None,
) -> Attribution:
    names, functions, mixture, weights = _parts(model, inputs, masks, explains)
    valid = valid_tokens(inputs, masks)
    require_prediction(mixture, torch.cat(valid, dim=1).any(dim=1))
    targets = resolve_targets(wanted[0], mixture, wanted[1])
    shares = weights.double() if explains == EXPERT else torch.ones_like(weights).double()
    values: list[list[Tensor]] = [[] for _ in inputs]
    together: list[Tensor] = []
    errors, scores = [], []
    total = len(functions) * len(mixture) * path.n_steps
    with progress_bar(progress, total, "integrated gradients") as advance:
        for logits, share in zip(functions, shares.unbind(dim=1), strict=True):
            own, score, error = integrated_gradients(logits, inputs, masks, targets, path, advance)
            errors.append(error)
            scores.append(score)
            for m, x in enumerate(own):
                values[m].append(_of_tokens(x, valid[m], magnitude))
            weighted = [torch.einsum("b,b...->b...", share, x) for x in own]
            together = (
                [x + y for x, y in zip(together, weighted, strict=True)] if together else weighted
            )
    return Attribution(
        index=INTEGRATED,
        explains=explains,
        experts=names,
        values=tuple(torch.stack(by_expert, dim=1) for by_expert in values),
        mixture=tuple(_of_tokens(x, v, magnitude) for x, v in zip(together, valid, strict=True)),
        valid=tuple(valid),
        weights=weights.double(),
        targets=targets.weights,
        multi_label=targets.multi_label,
        scores=torch.stack(scores, dim=1),
        completeness_error=torch.stack(errors, dim=1),
        budget=path.n_steps,
        settings={"rule": path.rule, "n_steps": path.n_steps, "magnitude": int(magnitude)},
    )


def _of_tokens(values: Tensor, valid: Tensor, magnitude: bool) -> Tensor:
    """Reduce values (B, L, ...) over features to (B, L); 0 for padding."""
    features = values.flatten(2)
    reduced = features.abs().mean(dim=2) if magnitude else features.sum(dim=2)
    return reduced.masked_fill(~valid, 0.0)


def _path(
    model: Any,
    inputs: Inputs,
    baseline: Sequence[Tensor | None] | None,
    n_steps: int,
    rule: str,
    max_batch: int | None,
) -> Path:
    check.require_choice("rule", rule, RULES)
    check.require_count("n_steps", n_steps, 1, MAX_STEPS)
    fill = "zero" if baseline is None else "mean"
    starts = [
        None if x is None or start is None else start.expand_as(x)
        for x, start in zip(inputs, fill_values(fill, baseline, inputs), strict=True)
    ]
    # A backward pass needs about twice the memory of a forward pass.
    max_batch = choose_batch(max_batch, model, inputs, copies=2)
    return Path(starts, rule, int(n_steps), max_batch)
