"""interaction_moe: the whole layer.

forward is inference of the full view. forward+backward is a training step: task, interaction and gate losses,
and the backward into every parameter. backward is the backward of this loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.profile.cases import BACKWARD, FORWARD, Case
from flmoe_kernels.profile.prepared import Context, Outputs, Prepared, gradients_by_name
from flmoe_kernels.profile.shapes import LayerShape, UserShape
from flmoe_kernels.published.convert import load_layer

from . import draws

INTERACTION_WEIGHT, GATE_WEIGHT = 0.5, 0.01


def shape_of(case: Case) -> LayerShape:
    assert isinstance(case.shape, LayerShape)
    return case.shape


def make_reference(shape: LayerShape) -> ReferenceInteractionMoE:
    """Make the reference with seeded parameters or those of a checkpoint; global generators are not changed."""
    if isinstance(shape, UserShape):
        return load_layer(shape.path, **dict(shape.settings))
    sparse = {"mlp_sparse": True, "num_experts": shape.experts} if shape.experts else {}
    sizes = (shape.modalities, shape.dim, shape.classes, shape.layers, shape.heads)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs'
        fusion = FusionTransformer(*sizes, shape.dropout, **sparse)  # type: ignore[arg-type]
        return ReferenceInteractionMoE(
            shape.modalities,
            fusion,
            fusion_sparse=bool(shape.experts),
            hidden_dim=shape.dim,
            temperature_rw=shape.temperature,
        )


def make_inputs(shape: LayerShape, device: str) -> tuple[list[Tensor], list[Tensor] | None]:
    """Make token sequences and masks; padding is at the end, as in the output of frozen encoders.

    Without padding, a user's layer gets no masks, as in the published code with learned positions.
    """
    generator = draws.generator_of(device)
    inputs = [
        draws.draw(shape.batch, tokens, shape.dim, generator=generator)
        for tokens in shape.padded_tokens
    ]
    masks = [
        torch.arange(tokens, device=device) < torch.tensor(lengths, device=device)[:, None]
        for tokens, lengths in zip(shape.padded_tokens, shape.lengths, strict=True)
    ]
    if isinstance(shape, UserShape) and all(map(torch.all, masks)):
        return inputs, None
    return inputs, masks


def loss_of(layer: Any, outputs: Any) -> Tensor:
    """Return the sum of the task loss, the interaction losses and the gate losses, if any."""
    logits = outputs[2].float()
    loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    loss = loss + INTERACTION_WEIGHT * torch.stack(list(outputs[3])).float().mean()
    if layer.fusion_sparse:
        gates = torch.stack([x for row in outputs[4] for x in row])
        loss = loss + GATE_WEIGHT * gates.float().mean()
    return loss


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    def adopt(reference: ReferenceInteractionMoE) -> Any:
        return reference if name == REFERENCE else InteractionMoE.adopt(reference, backend=name)

    return prepare_layer(case, adopt, dtype)


def prepare_layer(
    case: Case,
    adopt: Callable[[ReferenceInteractionMoE], Any],
    dtype: torch.dtype,
    context: Context = contextlib.nullcontext,
) -> Prepared:
    """Prepare the layer that `adopt` makes from the reference.

    context: entered around each call: autocast, precision of products.
    """
    shape = shape_of(case)
    reference = make_reference(shape).to(case.dtype).to(device=case.device, dtype=dtype)
    inputs, masks = make_inputs(shape, case.device)
    layer = adopt(reference)
    placed = [draws.place(case, x, dtype) for x in inputs]

    def outputs() -> Outputs:
        with context():
            return _outputs(case, layer, placed, masks)

    return Prepared(_timed_call(case.phase, layer, placed, masks, context), outputs)


def _timed_call(
    phase: str,
    layer: Any,
    inputs: list[Tensor],
    masks: list[Tensor] | None,
    context: Context = contextlib.nullcontext,
) -> Callable[[], None]:
    """Make an inference, a training step without optimizer, or the backward of its loss."""
    if phase == FORWARD:
        layer.eval()

        def inference() -> None:
            with torch.no_grad(), context():
                layer.inference(inputs, masks)

        return inference
    layer.train()
    parameters = list(layer.parameters())

    def forward() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        with context():
            return loss_of(layer, layer(inputs, masks))

    if phase == BACKWARD:
        loss = forward()

        def backward() -> None:
            with context():
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)

        return backward

    def step() -> None:
        loss = forward()
        with context():
            loss.backward()

    return step


def _outputs(case: Case, layer: Any, inputs: list[Tensor], masks: list[Tensor] | None) -> Outputs:
    """Compute the results with given noise and without dropout, which differs between contestants."""
    training = layer.training
    layer.eval()
    try:
        if case.phase == FORWARD:
            with torch.no_grad():
                experts, weights, logits = layer.inference(inputs, masks)
            return {"experts": torch.stack(experts), "weights": weights, "logits": logits}
        leaves = [x.detach().requires_grad_() for x in inputs]
        results = _named(layer(leaves, masks, replacements=_noise(case, inputs)))
        named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        named |= {f"inputs.{m}": x for m, x in enumerate(leaves)}
        # The latents are already among the expert latents.
        flowing = {name: x for name, x in results.items() if name != "latents"}
        gradients = gradients_by_name(flowing, named)
    finally:
        layer.train(training)
    return {name: x.detach() for name, x in results.items()} | gradients


def _named(result: Sequence[Any]) -> dict[str, Tensor]:
    """Name the tensors that a layer's forward returns, with gate losses if there are any."""
    experts, weights, logits, losses, *rest = result
    named = {"weights": weights, "logits": logits, "losses": torch.stack(list(losses))}
    if isinstance(experts[0][0], Tensor):  # the I2MoE variant, without latents
        named["expert_logits"] = torch.stack([torch.stack(list(views)) for views in experts])
    else:
        for place, name in enumerate(("expert_logits", "expert_latents")):
            views = [torch.stack([view[place] for view in expert]) for expert in experts]
            named[name] = torch.stack(views)
        named["latents"] = torch.stack(list(rest.pop()))
    if rest:
        named["gate_losses"] = torch.stack([torch.stack(list(views)) for views in rest[0]])
    return named


def _noise(case: Case, inputs: list[Tensor]) -> list[list[Tensor]]:
    """Draw noise for every expert and modality; the values are the same for every contestant."""
    generator = torch.Generator().manual_seed(99)
    count = shape_of(case).fusion_models
    return [
        [draws.place(case, draws.draw(*x.shape, generator=generator), x.dtype) for x in inputs]
        for _ in range(count)
    ]
