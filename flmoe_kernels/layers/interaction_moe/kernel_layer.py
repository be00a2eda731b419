"""Checks before the kernels of a layer run: backend, inputs, and the parts of the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import autocast_dtype
from flmoe_kernels.core.native import constant_in_traces
from flmoe_kernels.layers.modalities import Masks, Modalities, prepare_modalities
from flmoe_kernels.layers.parts import UnsupportedLayer, class_name, record_methods
from flmoe_kernels.layers.routed_mlp.gates import GATES
from flmoe_kernels.layers.routed_mlp.module import ExpertLinear, Experts, RoutedMLP, Routers
from flmoe_kernels.layers.snapshot import PartsSnapshot, has_global_hook

from .dense import Encoders, Networks
from .fusion import MLP, Attention, EncoderLayer, Head, Inputs

_OPERATOR = "interaction_moe"
_REMEDY = "; use backend='reference'"


def validate_inputs(
    widths: Sequence[int],
    num_patches: int | None,
    inputs: Sequence[Tensor | None],
    masks: Masks,
    parameter: Tensor,
    *,
    complete: bool = False,
) -> None:
    """Check inputs, M x (B, L_m, D) like the parameters, and masks, M x (B, L_m), bool or 0/1, or None.

    num_patches: L_m of all modalities, None for any.
    complete: require tokens for every modality, and no masks with learned positions.
    """
    check.require_inputs(widths, inputs, masks, parameter, optional=not complete)
    for m, x in enumerate(inputs):
        if num_patches is not None and x is not None and x.shape[1] not in (0, num_patches):
            raise ValueError(
                f"inputs[{m}]: expected {num_patches} tokens, the number of positions, "
                f"got {x.shape[1]}"
            )
    if complete and num_patches is not None and any(mask is not None for mask in masks or ()):
        raise ValueError("masks: expected None for learned positions (I2MoE)")


@record_methods
class KernelLayer(nn.Module):
    """Base of layers whose kernels read the parameters of the parts and do not call the parts.

    Every call of the kernels checks that the parts still compute what the kernels compute.
    """

    # The classes of the parts after construction.
    PART_CLASSES: ClassVar[frozenset[type]] = frozenset(
        {
            *(EncoderLayer, Attention, MLP, Head, RoutedMLP, Experts, ExpertLinear, Routers),
            *GATES.values(),
            *(nn.ModuleList, nn.Sequential, nn.Linear, nn.LayerNorm, nn.Dropout, nn.GELU, nn.ReLU),
        }
    )

    num_modalities: int
    modality_dropout: float
    _spec: Any
    _snapshot: PartsSnapshot | None
    _encoders: Encoders | None  # of the modules in the snapshot
    _captures: bool
    # Methods of the subclasses.
    _fusion: Callable[[], Any]  # a fusion model of the layer
    _networks: Callable[[], Networks]  # the encoder layers of each expert
    # A module that holds the parts, and the name prefixes of those parts that are called.
    _checked_parts: Callable[[], tuple[nn.Module, tuple[str, ...]]]
    # The specification of the parts; UnsupportedLayer if the kernels cannot compute them.
    _describe: Callable[[nn.Module], Any]

    def _start(self, spec: Any, backend: str | None) -> None:
        self._spec = spec
        self._snapshot = self._encoders = None
        self._captures = False
        self.backend = backend

    @property
    def backend(self) -> str | None:
        """The requested backend, None for the choice by device; setting it sets that of the parts, too."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend is not None:
            check.require_choice("backend", backend, backends.BACKENDS)
        self._backend = backend
        for part in self.modules():
            if part is not self and isinstance(part, (KernelLayer, RoutedMLP)):
                part.backend = backend

    def _resized(self) -> bool:
        """Whether a size that the layer itself stores has changed since the last check."""
        spec = self._spec
        return self.num_modalities != spec.num_modalities or self._patches() != spec.num_patches

    def _patches(self) -> int | None:
        """Tokens per modality of the learned positions, which may be new ones."""
        positions = self._fusion().pos_embed
        return None if positions is None else positions.shape[1] // self.num_modalities

    def _widths(self) -> list[int]:
        """Token width of each modality; of the present norm, because the reference backend checks no parts."""
        weight = self._norm_weight()
        width: int = self._spec.hidden_dim
        # torch.jit.trace would record the shape.
        if weight is not None and torch._C._get_tracing_state() is None:
            width = weight.shape[0]
        return [width] * self.num_modalities

    @property
    def spec(self) -> Any:
        """Sizes and rates, as of the last check of the parts."""
        return self._spec

    @property
    def _parameter(self) -> Tensor:
        """Any parameter: all have the same dtype and device."""
        weight = self._norm_weight()
        return next(self.parameters()) if weight is None else weight

    def _norm_weight(self) -> Tensor | None:
        """The weight of the first norm, None if a part was replaced."""
        try:
            weight = self._fusion().network[0].norm1.weight
        except (AttributeError, IndexError, TypeError):
            return None
        return weight if isinstance(weight, Tensor) else None

    def _enter(self, inputs: Inputs, masks: Masks) -> tuple[Modalities, str]:
        """Return the sequences of the call, in the dtype of the computation, and the backend."""
        parameter = like = self._parameter
        cast = autocast_dtype(parameter.device)
        if cast is not None and parameter.dtype != torch.float64:
            # The kernels compute in autocast's dtype, as torch's own layers do.
            like = parameter.detach().new_empty((0,), dtype=cast)
        backend = backends.choose(_OPERATOR, like, self.backend)
        if backend != backends.REFERENCE:
            if reason := self._unsupported_reason():
                raise UnsupportedLayer(reason + _REMEDY)
            if self._spec.sparse is not None:
                # Its routed MLPs run on the same backend.
                backend = backends.choose("routed_mlp", like, self.backend)
            if self._captures:
                if backends.requested(self.backend):
                    raise UnsupportedLayer(
                        "attn.capture_attn: is set, but the kernels store no attention maps"
                        + _REMEDY
                    )
                backend = backends.REFERENCE
        if backend == backends.REFERENCE:
            # Its products use autocast's dtype, too, but its norms need the parameters' dtype, which an encoder
            # under autocast does not return.
            like = parameter
        if cast is not None and isinstance(inputs, (list, tuple)):
            inputs = check.cast_tensors(inputs, like.dtype)
        inputs, masks = check.widened(inputs, like), check.padded_masks(masks, inputs)
        patches, dropout = self._patches(), self.modality_dropout if self.training else 0.0
        validate_inputs(self._widths(), patches, inputs, masks, like)
        return prepare_modalities(inputs, masks, patches or 0, dropout), backend

    def _run(self, compute: Callable[..., Any], call: Modalities, *rest: Any) -> Any:
        """Run the kernels; an error that a changed part has caused names the part."""
        if torch.compiler.is_compiling():
            return compute(call, *rest)
        try:
            return compute(call, *rest)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            # A parameter of another shape, which a snapshot does not show.
            if reason := self._check():
                raise UnsupportedLayer(reason + _REMEDY) from None
            raise

    # torch.compile runs this once, while tracing, and does not trace it.
    @constant_in_traces
    def _unsupported_reason(self) -> str:
        """The reason why the kernels cannot compute this layer with its present parts, or "".

        If nothing has changed since the last call, this takes microseconds.
        """
        snapshot = self._snapshot
        same = snapshot is not None and snapshot.unchanged() and not self._resized()
        return "" if same else self._check()

    def _check(self) -> str:
        """Describe the parts again; return the reason why the kernels cannot compute them, or ""."""
        parts, called = self._checked_parts()
        named = {
            name: part
            for name, part in parts.named_modules()
            if part is not parts and not name.startswith(called)
        }
        state = vars(self)
        snapshot = PartsSnapshot(list(named.values()), [state["_modules"]], [state["_parameters"]])
        # torch.jit.trace would record the shapes that are read.
        internal: Any = torch._C
        tracing = internal._get_tracing_state()
        internal._set_tracing_state(None)
        try:
            if has_global_hook():
                raise UnsupportedLayer(
                    "torch.nn.modules.module: a hook on all modules is registered, but the kernels do not "
                    "call the parts of the layer"
                )
            for name, part in named.items():
                if type(part) not in self.PART_CLASSES:
                    raise UnsupportedLayer(
                        f"{name}: {class_name(part)}, which the kernels would not call"
                    )
            spec = self._describe(parts)
        except UnsupportedLayer as error:
            self._snapshot = None
            return str(error)
        finally:
            internal._set_tracing_state(tracing)
        self._captures = any(
            part.capture_attn for part in named.values() if isinstance(part, Attention)
        )
        self._spec, self._snapshot, self._encoders = spec, snapshot, None
        return ""

    def _dense_encoders(self) -> Encoders | None:
        if self._spec.sparse is not None:
            return None
        # A replica of DataParallel is a copy whose parts are its own, but not its attributes.
        if torch.compiler.is_compiling() or getattr(self, "_is_replica", False):
            return Encoders(self._networks())
        self._encoders = self._encoders or Encoders(self._networks())
        return self._encoders

    def __getstate__(self) -> dict[str, Any]:
        # A copy has new modules, which these do not describe.
        return {**self.__dict__, "_snapshot": None, "_encoders": None}
