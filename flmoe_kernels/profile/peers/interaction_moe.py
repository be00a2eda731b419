"""interaction_moe: the reference layer, with fused attention, compiled, vectorised over experts, less precise.

Same parameters and inputs, different code. forward is inference, forward+backward a training step: task,
interaction and gate losses, backward into every parameter; backward is that of the step's loss.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import (
    FusionTransformer,
    ReferenceInteractionMoE,
)
from flmoe_kernels.profile.cases import BACKWARD, FORWARD, Case
from flmoe_kernels.profile.prepared import GRADIENT_OF, Context, Outputs, Prepared
from flmoe_kernels.profile.shapes import LayerShape
from tests.support.inputs import draw_replacements
from tests.support.layers import outputs_and_gradients

from . import common
from .layers import VmapInteractionMoE, with_sdpa

SDPA, COMPILED, COMPILED_SDPA, VMAP = "reference+sdpa", "compiled", "compiled+sdpa", "vmap"
# In float32 parameters, for cases in half precision: what people run who do not round their parameters.
TF32, AUTOCAST = "reference, TF32", "compiled+sdpa, autocast"
ORACLE = REFERENCE
PEERS = (REFERENCE, SDPA, COMPILED, COMPILED_SDPA, VMAP, TF32, AUTOCAST)
_COMPILED = (COMPILED, COMPILED_SDPA, AUTOCAST)
_OWN_PRECISION = (TF32, AUTOCAST)
INTERACTION_WEIGHT, GATE_WEIGHT = 0.5, 0.01


def lack(case: Case, name: str) -> str:
    shape = shape_of(case)
    if name in _OWN_PRECISION and case.dtype not in (torch.bfloat16, torch.float16):
        return "it is for cases in half precision"
    if name == VMAP and shape.experts:
        return "vmap cannot choose experts by data"
    if name in _COMPILED and shape.experts:
        return "the index loop of routed experts cannot be compiled whole"
    return common.compile_lack(case) if name in _COMPILED else ""


def version(name: str) -> str:
    return torch.__version__


def shape_of(case: Case) -> LayerShape:
    assert isinstance(case.shape, LayerShape)
    return case.shape


def make_reference(shape: LayerShape) -> ReferenceInteractionMoE:
    """Parameters drawn from a seed of their own; the global generator stays as it is."""
    sparse = {"mlp_sparse": True, "num_experts": shape.experts} if shape.experts else {}
    sizes = (shape.modalities, shape.dim, shape.classes, shape.layers, shape.heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fusion = FusionTransformer(*sizes, shape.dropout, **sparse)  # type: ignore[arg-type]
        return ReferenceInteractionMoE(
            shape.modalities,
            fusion,
            fusion_sparse=bool(shape.experts),
            hidden_dim=shape.dim,
            temperature_rw=shape.temperature,
        )


def contestant(name: str, reference: ReferenceInteractionMoE) -> nn.Module:
    """A layer of this contestant that holds `reference`'s very parameters, or itself."""
    if name in (REFERENCE, TF32):
        return reference
    if name == VMAP:
        return VmapInteractionMoE.adopt(reference)
    if name not in PEERS:
        return InteractionMoE.adopt(reference, backend=name)
    layer = reference if name == COMPILED else with_sdpa(reference)
    if name in _COMPILED:
        common.prepare_compiler()
        # One fusion pass is the unit: the whole forward, twelve or twenty passes unrolled into one graph,
        # compiles for over ten minutes.
        for module in layer.modules():
            if isinstance(module, FusionTransformer):
                module.compile(dynamic=False)
    return layer


def make_inputs(shape: LayerShape, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Token sequences, and a mask for every modality that is padded (as frozen encoders deliver them)."""
    generator = common.generator_of(device)
    inputs = [
        common.draw(shape.batch, length, shape.dim, generator=generator) for length in shape.tokens
    ]
    masks = []
    for length, valid in zip(shape.tokens, shape.valid, strict=True):
        count = length if valid is None else valid
        mask = torch.arange(length, device=device) < count
        masks.append(mask.expand(shape.batch, length).contiguous())
    return inputs, masks


def loss_of(layer: Any, outputs: Any) -> Tensor:
    """Of the task, of the interactions, and of the gates where there are any."""
    logits = outputs[2].float()
    loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    loss = loss + INTERACTION_WEIGHT * torch.stack(list(outputs[3])).float().mean()
    if layer.fusion_sparse:
        gates = torch.stack([x for row in outputs[4] for x in row])
        loss = loss + GATE_WEIGHT * gates.float().mean()
    return loss


def make_layer(case: Case, name: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The contestant's layer, inputs and masks, on the case's device in `dtype`."""
    shape = shape_of(case)
    if name in _OWN_PRECISION:
        dtype = torch.float32
    reference = make_reference(shape).to(case.dtype).to(device=case.device, dtype=dtype)
    inputs, masks = make_inputs(shape, case.device)
    layer = contestant(name, reference)
    return (
        layer,
        [common.place(case, x, dtype) for x in inputs],
        masks,
    )


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    layer, inputs, masks = make_layer(case, name, dtype)
    context = _context_of(case, name)
    return Prepared(
        _timed(case, layer, inputs, masks, context),
        functools.partial(_outputs, case, layer, inputs, masks, context),
    )


def _context_of(case: Case, name: str) -> Context:
    kind = case.device.split(":")[0]
    if name == TF32:
        return functools.partial(common.tf32, case.device)
    if name == AUTOCAST:
        return functools.partial(torch.autocast, kind, case.dtype)
    return contextlib.nullcontext


def _timed(
    case: Case, layer: Any, inputs: list[Tensor], masks: list[Tensor], context: Context
) -> Callable[[], None]:
    if case.phase == FORWARD:
        layer.eval()

        def inference() -> None:
            with torch.no_grad(), context():
                layer.inference(inputs, masks)

        return inference
    layer.train()

    def forward() -> Tensor:
        for parameter in layer.parameters():
            parameter.grad = None
        with context():
            return loss_of(layer, layer(inputs, masks))

    if case.phase == BACKWARD:
        loss, parameters = forward(), list(layer.parameters())

        def backward() -> None:
            with context():
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)

        return backward

    def step() -> None:
        loss = forward()
        with context():
            loss.backward()

    return step


def _outputs(
    case: Case, layer: Any, inputs: list[Tensor], masks: list[Tensor], context: Context
) -> Outputs:
    """Without dropout, which every contestant draws in its own way, and with noise given."""
    training = layer.training
    layer.eval()
    try:
        if case.phase == FORWARD:
            with torch.no_grad(), context():
                experts, weights, logits = layer.inference(inputs, masks)
            return {"experts": torch.stack(experts), "weights": weights, "logits": logits}
        noise = _noise(case, inputs)
        with context():
            outputs, grads = outputs_and_gradients(layer, inputs, masks, noise)
    finally:
        layer.train(training)
    grads = {name: x for name, x in grads.items() if not name.startswith("replacements.")}
    return outputs | {GRADIENT_OF + name: x for name, x in grads.items()}


def _noise(case: Case, inputs: list[Tensor]) -> list[list[Tensor]]:
    """For every expert and modality, the same values for every contestant."""
    plain = [torch.empty(x.shape, dtype=case.dtype) for x in inputs]
    return [
        [common.place(case, x, inputs[0].dtype) for x in row]
        for row in draw_replacements(plain, shape_of(case).fusion_models)
    ]
