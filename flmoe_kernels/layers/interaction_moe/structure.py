"""Description of an interaction layer, and check that the fast layer supports it.

The fast layer computes the mathematics of `reference.py` from the parameters; it never calls the parts of a layer.
Everything that those parts could do differently is therefore checked here, strictly by structure: the names of the
layer's own classes do not matter, but they must consist of unchanged modules of torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

from flmoe_kernels.layers.parts import (
    UnsupportedLayer,
    check_hooks,
    check_inherited,
    check_methods,
    check_parameters,
    child_of,
    dropout_rate,
    expect_linear,
    is_integer,
    joined,
    plain_module,
    rate_of_dropout,
    record_methods,
    sequence_of,
)
from flmoe_kernels.layers.routed_mlp.gate_base import Gate
from flmoe_kernels.layers.routed_mlp.gates import GATES
from flmoe_kernels.layers.routed_mlp.module import ExpertLinear, Experts, RoutedMLP

from .architecture import (
    DropoutRates,
    FusionSpec,
    LayerSpec,
    SparseSpec,
    describe_sparse,
    fusion_shapes,
    is_sparse,
)
from .experts import ExpertAverage, InteractionExpert, Reweighting
from .fusion import (
    MLP,
    MLP_EXPANSION,
    Attention,
    Compat,
    EncoderLayer,
    Head,
    ReferenceFusionTransformer,
    is_sparse_layer,
)
from .reference import ReferenceInteractionMoE

for _kind in (
    *(Reweighting, ExpertAverage, InteractionExpert, EncoderLayer, Attention, MLP, Head),
    *(ReferenceFusionTransformer, RoutedMLP, Experts, ExpertLinear, Gate, *GATES.values()),
):
    record_methods(_kind)

SpecT = TypeVar("SpecT", FusionSpec, SparseSpec)
# The published regression class; its structure is that of InteractionMoE.
REGRESSION = "InteractionMoERegression"


def describe(layer: nn.Module, known: LayerSpec | None = None) -> LayerSpec:
    """The specification of a published interaction layer or of the reference.

    known: the earlier specification of a fast layer whose parts may have changed. The reweighting MLP is then not
    described again, because the fast layer calls it. Raises UnsupportedLayer, which names the unsupported part.
    """
    if known is None:
        check_methods(layer, "")
    num_modalities = getattr(layer, "num_modalities", None)
    if not is_integer(num_modalities):
        raise UnsupportedLayer(f"num_modalities: expected an int, got {num_modalities!r}")
    num_modalities = int(num_modalities)
    if num_modalities < 2:
        raise UnsupportedLayer(
            f"num_modalities: expected at least 2, got {num_modalities}: with one modality the "
            "uniqueness loss has no positive view"
        )
    experts = child_of(layer, "", "interaction_experts", nn.ModuleList)
    # Options are read from this package's layers only: a published layer may use the names for other things.
    own: Any = layer if known is not None or isinstance(layer, ReferenceInteractionMoE) else None
    uniqueness = True if own is None else own.uniqueness
    if len(experts) != (count := num_modalities + 2 if uniqueness else 2):
        kinds = "one per modality, synergy, redundancy" if uniqueness else "synergy, redundancy"
        raise UnsupportedLayer(
            f"interaction_experts: expected {count} experts ({kinds}), got {len(experts)}"
        )
    fusion_sparse = bool(getattr(layer, "fusion_sparse", False))
    fusions: dict[str, FusionSpec] = {}
    for e, expert in enumerate(experts):
        path = f"interaction_experts.{e}"
        if bool(getattr(expert, "fusion_sparse", fusion_sparse)) != fusion_sparse:
            raise UnsupportedLayer(
                f"{path}.fusion_sparse: differs from the layer's {fusion_sparse}"
            )
        fusion_model = child_of(expert, path, "fusion_model", nn.Module)
        if isinstance(fusion_model, ReferenceFusionTransformer) and fusion_model.modality_dropout:
            raise UnsupportedLayer(
                f"{path}.fusion_model.modality_dropout: expected 0, got "
                f"{fusion_model.modality_dropout}; set it on the interaction layer"
            )
        fusions[path] = fusion_spec(fusion_model, f"{path}.fusion_model", num_modalities)
    first = _same_in_all(fusions, "expert 0")
    reweight = child_of(layer, "", "reweight", nn.Module)
    if known is None:
        widths = num_modalities * first.hidden_dim, len(experts)
        hidden, layers, rate = _reweight(reweight, *widths)
    else:
        hidden, layers = known.reweight_hidden, known.reweight_layers
        rate = known.reweight_dropout
    spec = LayerSpec(
        fusion_sparse=fusion_sparse,
        reweight_hidden=hidden,
        reweight_layers=layers,
        temperature=_temperature(reweight),
        reweight_dropout=rate,
        uniqueness=uniqueness,
        regression=type(layer).__name__ == REGRESSION if own is None else own.regression,
        **{field.name: getattr(first, field.name) for field in dataclasses.fields(first)},
    )
    _check_parts(layer, spec.parameter_shapes(), "" if known is None else "reweight.mlp")
    return spec


def describe_fusion(
    model: nn.Module, known: FusionSpec | None = None, called: tuple[str, ...] = ()
) -> FusionSpec:
    """The specification of a published fusion model or of the reference; known and UnsupportedLayer as `describe`.

    called: prefixes of the parts that the fast model calls, which are not described again.
    """
    if known is None:
        check_methods(model, "")
    spec = fusion_spec(model, known=known)
    _check_parts(model, dict(fusion_shapes(spec, "")), *called)
    return spec


def _check_parts(model: nn.Module, shapes: dict[str, tuple[int, ...]], *called: str) -> None:
    """Check hooks, methods and parameters of the parts, apart from those that are called (prefixes of names)."""
    prefixes = tuple(prefix for prefix in called if prefix)
    for name, part in model.named_modules():
        if part is not model and not name.startswith(prefixes):
            check_hooks(part, name)
            check_methods(part, name)
            check_inherited(part, name)
    # Replicas of DataParallel have tensors as attributes in place of parameters.
    if not getattr(model, "_is_replica", False):
        # Heads may have no bias; router 0 is the gate, and some layers register it only as such.
        optional = [n for n in shapes if n.endswith(".fc.bias") or ".all_gates.0." in n]
        check_parameters(model, shapes, optional, prefixes)


def fusion_spec(
    model: nn.Module,
    path: str = "",
    num_modalities: int | None = None,
    known: FusionSpec | None = None,
) -> FusionSpec:
    """Describe a fusion model; num_modalities None: any. With `known`, the head and routed MLPs are called."""
    if not isinstance(getattr(model, "network", None), nn.Module):
        raise UnsupportedLayer(
            f"{path or 'the model'}: an unknown fusion model, {type(model).__name__} (no .network of layers "
            "and a head)"
        )
    parts, where = sequence_of(model, path, "network"), joined(path, "network")
    if len(parts) < 2:
        raise UnsupportedLayer(f"{where}: expected layers and a head, got {len(parts)} parts")
    *layers, head = parts
    norm = child_of(layers[0], f"{where}.0", "norm1", nn.LayerNorm)
    dim, eps = int(norm.normalized_shape[-1]), float(norm.eps)
    described = [
        _encoder_layer(layer, f"{where}.{i}", dim, eps, known) for i, layer in enumerate(layers)
    ]
    heads = {num_heads for num_heads, _, _ in described}
    if len(heads) > 1:
        raise UnsupportedLayer(f"{where}: layers differ in num_heads, {sorted(heads)}")
    if known is None:
        modalities, classes = _head(head, f"{where}.{len(layers)}", dim, num_modalities)
    else:
        stored: Any = model.num_modalities
        if not is_integer(stored) or stored < 1:
            raise UnsupportedLayer(f"num_modalities: expected a positive int, got {stored!r}")
        modalities, classes = int(stored), known.num_classes
    num_patches = _num_patches(model, path, modalities, dim)
    compat: Compat = "fl_i2moe" if num_patches is None else "i2moe"
    for part in (model, *layers):
        if getattr(part, "compat", compat) != compat:
            raise UnsupportedLayer(
                f"{path or 'the model'}: compat is {part.compat!r}, expected {compat!r}"
            )
    return FusionSpec(
        num_modalities=modalities,
        hidden_dim=dim,
        num_classes=classes,
        num_layers=len(layers),
        num_heads=heads.pop(),
        compat=compat,
        num_patches=num_patches,
        norm_eps=eps,
        dropout=tuple(rates for _, rates, _ in described),
        sparse=_sparse([sparse for _, _, sparse in described], path),
    )


def _head(head: nn.Module, path: str, dim: int, num_modalities: int | None) -> tuple[int, int]:
    fc = plain_module(child_of(head, path, "fc", nn.Linear), f"{path}.fc", nn.Linear)
    # Sizes of the weight: in_features and out_features do not change when it is replaced.
    classes, width = (0, 0) if fc.weight is None else fc.weight.shape
    if num_modalities is None:
        num_modalities = max(1, width // dim)
    expect_linear(fc, f"{path}.fc", num_modalities * dim, classes, None)
    return num_modalities, classes


def _sparse(layers: list[SparseSpec | None], path: str) -> SparseSpec | None:
    """The description of all sparse layers, which must be in the published positions."""
    specs = {i: spec for i, spec in enumerate(layers) if spec is not None}
    if not specs:
        return None
    expected = [i for i in range(len(layers)) if is_sparse_layer(i)]
    if list(specs) != expected:
        raise UnsupportedLayer(
            f"{path}: sparse MLPs in layers {list(specs)}, expected none or {expected}"
        )
    named = {f"{path}.network.{i}.mlp": spec for i, spec in specs.items()}
    return _same_in_all(named, "the first layer")


def _num_patches(model: nn.Module, path: str, num_modalities: int, dim: int) -> int | None:
    positions = getattr(model, "pos_embed", None)
    if positions is None:
        return None
    shape = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
    if (
        not isinstance(positions, Tensor)
        or not ("pos_embed" in model._parameters or getattr(model, "_is_replica", False))
        or positions.dim() != 3
        or positions.shape[0] != 1
        or positions.shape[1] < num_modalities
        or positions.shape[1] % num_modalities
        or positions.shape[2] != dim
    ):
        raise UnsupportedLayer(
            f"{path}.pos_embed: expected a parameter (1, {num_modalities} * tokens per modality, "
            f"{dim}), got {shape}"
        )
    return int(positions.shape[1]) // num_modalities


def _encoder_layer(
    layer: nn.Module, path: str, dim: int, eps: float, known: FusionSpec | None
) -> tuple[int, DropoutRates, SparseSpec | None]:
    """The number of heads, the dropout rates and the routed MLP."""
    if getattr(layer, "self_attn", True) is not True:
        raise UnsupportedLayer(f"{path}: cross-attention (self_attn is False)")
    for name in ("norm1", "norm2"):
        _layer_norm(layer, path, name, dim, eps)
    attn = child_of(layer, path, "attn", nn.Module)
    heads = _attention(attn, f"{path}.attn", dim)
    mlp = child_of(layer, path, "mlp", nn.Module)
    sparse = None
    if known is not None and isinstance(mlp, RoutedMLP):
        sparse = known.sparse
    elif is_sparse(mlp):
        sparse = describe_sparse(mlp, f"{path}.mlp", dim)
    rates = DropoutRates(
        attention=dropout_rate(attn, f"{path}.attn", "attn_drop"),
        projection=dropout_rate(attn, f"{path}.attn", "proj_drop"),
        residual1=dropout_rate(layer, path, "dropout1"),
        mlp=0.0 if is_sparse(mlp) else _dense_mlp(mlp, f"{path}.mlp", dim),
        residual2=dropout_rate(layer, path, "dropout2"),
    )
    return heads, rates, sparse


def _dense_mlp(mlp: nn.Module, path: str, dim: int) -> float:
    parts, where = sequence_of(mlp, path, "network"), f"{path}.network"
    if len(parts) != 4:
        raise UnsupportedLayer(
            f"{where}: expected Linear, GELU, Dropout, Linear, got "
            + ", ".join(type(part).__name__ for part in parts)
        )
    expect_linear(parts[0], f"{where}.0", dim, MLP_EXPANSION * dim, True)
    if plain_module(parts[1], f"{where}.1", nn.GELU).approximate != "none":
        raise UnsupportedLayer(f"{where}.1: expected GELU with the exact erf, got its tanh form")
    expect_linear(parts[3], f"{where}.3", MLP_EXPANSION * dim, dim, True)
    return rate_of_dropout(parts[2], f"{where}.2")


def _layer_norm(layer: nn.Module, path: str, name: str, dim: int, eps: float) -> None:
    where = f"{path}.{name}"
    norm = plain_module(child_of(layer, path, name, nn.Module), where, nn.LayerNorm)
    if tuple(norm.normalized_shape) != (dim,):
        raise UnsupportedLayer(f"{where}: expected width {dim}, got {tuple(norm.normalized_shape)}")
    if norm.weight is None or norm.bias is None:
        raise UnsupportedLayer(f"{where}: has no affine weight and bias")
    if not isinstance(norm.eps, Real) or norm.eps != eps:
        raise UnsupportedLayer(f"{where}: eps is {norm.eps}, {eps} in the first layer")


def _attention(attn: nn.Module, path: str, dim: int) -> int:
    heads = getattr(attn, "num_heads", None)
    if not is_integer(heads) or heads < 1 or dim % heads:
        raise UnsupportedLayer(f"{path}.num_heads: expected a divisor of {dim}, got {heads!r}")
    heads = int(heads)
    scale, expected = getattr(attn, "scale", None), (dim // heads) ** -0.5
    if not isinstance(scale, Real) or not math.isclose(scale, expected, rel_tol=1e-6):
        raise UnsupportedLayer(
            f"{path}.scale: expected head_dim^-1/2 = {expected:.6g}, got {scale}"
        )
    for name, width, bias in (("q", dim, False), ("kv", 2 * dim, False), ("proj", dim, True)):
        expect_linear(child_of(attn, path, name, nn.Module), f"{path}.{name}", dim, width, bias)
    return heads


def _same_in_all(specs: Mapping[str, SpecT], where: str) -> SpecT:
    """The first of the descriptions by path, `where` in errors, after a check that all are the same."""
    first = next(iter(specs.values()))
    for field in dataclasses.fields(first):
        expected = getattr(first, field.name)
        for path, spec in specs.items():
            if (value := getattr(spec, field.name)) != expected:
                raise UnsupportedLayer(f"{path}: {field.name} is {value}, {expected} in {where}")
    return first


def _temperature(reweight: nn.Module) -> float:
    temperature = getattr(reweight, "temperature", None)
    if not isinstance(temperature, Real) or not float(temperature) > 0:
        raise UnsupportedLayer(
            f"reweight.temperature: expected a positive int or float, got {temperature!r}"
        )
    return float(temperature)


def _reweight(reweight: nn.Module, width: int, experts: int) -> tuple[int | None, int, float]:
    """Hidden width, number of linear maps and dropout rate of the reweighting MLP."""
    if isinstance(reweight, ExpertAverage):
        return None, 0, 0.0
    mlp = child_of(reweight, "reweight", "mlp", nn.Module)
    parts, where = sequence_of(mlp, "reweight.mlp", "network"), "reweight.mlp.network"
    count = (len(parts) + 2) // 3
    if len(parts) != 3 * count - 2 or count < 1:
        raise UnsupportedLayer(
            f"{where}: expected Linear, then any number of ReLU, Dropout, Linear, got "
            + (", ".join(type(part).__name__ for part in parts) or "nothing")
        )
    hidden = (
        None if count == 1 else int(plain_module(parts[0], f"{where}.0", nn.Linear).out_features)
    )
    widths = [width, *[hidden or 0] * (count - 1), experts]
    rates = set()
    for i in range(count):
        expect_linear(parts[3 * i], f"{where}.{3 * i}", widths[i], widths[i + 1], True)
        if i < count - 1:
            plain_module(parts[3 * i + 1], f"{where}.{3 * i + 1}", nn.ReLU)
            rates.add(float(plain_module(parts[3 * i + 2], f"{where}.{3 * i + 2}", nn.Dropout).p))
    if len(rates) > 1:
        raise UnsupportedLayer(f"{where}: dropout rates differ, {sorted(rates)}")
    return hidden, count, rates.pop() if rates else 0.0
