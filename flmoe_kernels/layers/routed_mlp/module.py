"""RoutedMLP: FastMoE's FMoETransformerMLP on this package's kernels."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import _named_member_accessor

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.backend import BACKENDS
from flmoe_kernels.core.dtypes import autocast_dtype
from flmoe_kernels.core.native import constant_in_traces
from flmoe_kernels.layers.parts import (
    UnsupportedLayer,
    check_hooks,
    check_methods,
    child_of,
    class_name,
    share_parameters,
)
from flmoe_kernels.ops.routed_mlp.api import routed_mlp

from .collectives import require_ranks
from .gates import Gate, gate_class
from .parallel import parallel_routed_mlp
from .state import add_router_0, prepare_state_dict
from .structure import activation_name, describe


class ExpertLinear(nn.Module):
    """The linear maps of all experts: weight (E, out, in) and bias (E, out)."""

    def __init__(self, num_expert: int, in_feat: int, out_feat: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.bias = nn.Parameter(torch.empty(num_expert, out_feat))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every expert's weight as torch.nn.Linear does, by its fan-in; biases 0, as published."""
        bound = 1.0 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias; a call runs the hooks that compute them, for example those of pruning."""
        return self.weight, self.bias

    def extra_repr(self) -> str:
        experts, out_feat, in_feat = self.weight.shape
        return f"num_expert={experts}, in_features={in_feat}, out_features={out_feat}"


class Experts(nn.Module):
    """The experts' parameters under their published names: htoh4 (D to F), activation, h4toh (F to D).

    The kernels call only htoh4 and h4toh.
    """

    def __init__(self, num_expert: int, d_model: int, d_hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.htoh4 = ExpertLinear(num_expert, d_model, d_hidden)
        self.h4toh = ExpertLinear(num_expert, d_hidden, d_model)
        self.activation = activation


class Routers(nn.ModuleDict):
    """Routers by number; read-only."""

    def __init__(self, routers: dict[str, Gate]) -> None:
        super().__init__()
        self._modules.update(routers)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        raise TypeError(
            f"all_gates is read-only, got an assignment of {name}; assign `gate` of the layer instead"
        )

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name != "0":
            return value
        # torch.func.functional_call finds modules by their attributes and replaces their tensors for every key of
        # a state_dict. It cannot restore a module with two keys, so it gets a copy with the same tensors for
        # the second key. All other callers get the gate itself.
        if sys._getframe(1).f_globals is not vars(_named_member_accessor):
            return value
        router: Any = value
        tensors = (*router.parameters(), *router.buffers())
        return copy.deepcopy(value, {id(tensor): tensor for tensor in tensors})


class RoutedMLP(nn.Module):
    """Mixture of experts: a gate chooses each token's experts, whose MLP outputs are weighted and summed.

    Constructor, attributes and state_dict are those of the published FMoETransformerMLP; state_dicts with either
    layout of the experts load strictly, see `state.prepare_state_dict`. Differences: docs/fastmoe.md.

    Args:
        num_expert: experts per process; E = num_expert * world_size.
        d_model, d_hidden: D and F.
        activation: nn.GELU (either form), nn.ReLU or nn.SiLU; default nn.GELU().
        expert_dp_comm: name of a communication group, stored on the experts' parameters as `dp_comm` for
            FastMoE's data parallelism; not used here.
        expert_rank: accepted for compatibility and not used, as in the published code.
        n_router: number of routers, for checkpoints with several. Only the first is used: the others get no
            gradient, so DistributedDataParallel needs find_unused_parameters=True (otherwise it raises an error),
            and their get_loss returns None.
        gate: a name ("NaiveGate", "GShardGate", "SwitchGate", "NoisyGate"; "AddtionalNoisyGate" [sic], the
            lineage's name of NoisyGate), a Gate class, or a function of (d_model, num_expert, world_size, top_k)
            that returns a Gate.
        world_size: number of processes, each with its own experts, that make the same calls in the same order, see
            `parallel`; default 1. Above 1, the gate's capacities and losses count the tokens of all processes.
        top_k: K, experts per token.
        moe_group: the process group, with world_size ranks; None for the default group. A layer with its own
            group can be neither copied nor pickled; its state_dict can.
        backend: "reference", "cpu" or "triton", for routing and the MLP; default by device.

    Attributes:
        last_topk_indices, last_topk_scores: (N, K) of the last call, the scores with their graph; -1 and 0 for
            dropped choices and padding.
        last_tot_expert: E.
        capture_topk_pre_mix: also compute last_topk_pre_mix; default False.
        last_topk_pre_mix: (N, K, D), each chosen expert's output before weighting, 0 if dropped, with its graph;
            the output is their weighted sum. None unless captured. The results of a call (last_*) are neither
            copied nor pickled.
        mean_gradients: with world_size above 1, experts' gradients are those of the mean of all processes'
            objectives, as in DistributedDataParallel, not of the sum; default False. See `prepare_for_ddp`.

    Parameters: experts.htoh4.weight (E, F, D), experts.htoh4.bias (E, F), experts.h4toh.weight (E, D, F),
    experts.h4toh.bias (E, D); the gate's parameters as `gate.*`; those of other routers as `all_gates.1.*`, ... A
    state_dict also has the gate's as `all_gates.0.*`, as published.

    Changes of the parts: another activation or gate, and hooks, pruning and parametrizations of the gate, htoh4 or
    h4toh take effect. A hook on `experts` or `experts.activation` would never run and is an error in forward.

    Under autocast both maps and the gate compute in autocast's dtype and return it, as torch.nn.Linear does.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.
    """

    # Attributes that store the results of a call.
    TRANSIENT = ("last_topk_indices", "last_topk_scores", "last_topk_pre_mix")

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: nn.Module | None = None,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        n_router: int = 1,
        gate: str | type[Gate] | Callable[..., Gate] = "NoisyGate",
        world_size: int = 1,
        top_k: int = 2,
        *,
        moe_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.require_count("num_expert", num_expert, 1)
        check.require_count("d_model", d_model, 1)
        check.require_count("d_hidden", d_hidden, 1)
        check.require_count("n_router", n_router, 1)
        make = gate_class(gate)
        routers = {str(r): make(d_model, num_expert, world_size, top_k) for r in range(n_router)}
        experts = Experts(num_expert, d_model, d_hidden, activation or nn.GELU())
        self._assemble(routers, experts, backend)
        if world_size > 1:
            require_ranks(world_size, moe_group)
            for router in routers.values():
                router.spread, router.group = True, moe_group
        self.moe_group = moe_group
        self.expert_rank = expert_rank
        # For FastMoE's DistributedGroupedDataParallel.
        for parts, comm in ((experts, expert_dp_comm), (self.all_gates, "gate")):
            for parameter in parts.parameters():
                parameter.dp_comm = comm  # type: ignore[attr-defined]

    @classmethod
    def adopt(cls, layer: nn.Module, *, backend: str | None = None) -> RoutedMLP:
        """Make a RoutedMLP from a published layer: new modules that share the layer's Parameter objects.

        The mode, capture_topk_pre_mix and the gates' settings are copied from the layer.

        Raises:
            UnsupportedLayer (a ValueError): this class does not support a part of the layer; the error names it.
        """
        spec = describe(layer)
        published: Any = layer
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        with torch.device("meta"):
            routers = {
                name: spec.make_gate(router, gate_class(spec.gate))
                for name, router in spec.routers(layer).items()
            }
            sizes = (spec.num_expert, spec.d_model, spec.d_hidden)
            experts = Experts(*sizes, copy.deepcopy(published.experts.activation))
        self._assemble(routers, experts, backend)
        self.moe_group = None
        self.expert_rank = 0
        self.capture_topk_pre_mix = bool(getattr(layer, "capture_topk_pre_mix", False))
        share_parameters(published.experts, experts)
        self.train(layer.training)
        for name, router in spec.routers(layer).items():
            share_parameters(router, routers[name])
        return self

    def _assemble(self, routers: dict[str, Gate], experts: Experts, backend: str | None) -> None:
        # The gate comes first so that state_dicts have the published order.
        self.gate = routers["0"]
        self.experts = experts
        # Router 0 is registered only as `gate`: torch.func and state_dict tools mishandle a module with two names.
        self._modules["all_gates"] = Routers({r: g for r, g in routers.items() if r != "0"})
        self.n_router = len(routers)
        self.world_size = self.gate.world_size
        activation_name(experts.activation)
        self.backend = backend
        self.last_tot_expert = self.gate.tot_expert
        self.capture_topk_pre_mix = False
        self.mean_gradients = False
        self._forget()
        self.register_load_state_dict_pre_hook(prepare_state_dict)
        self.register_state_dict_post_hook(add_router_0)

    @property
    def all_gates(self) -> nn.ModuleDict:
        """All routers by number; "0" is the gate."""
        others: Any = self._modules["all_gates"]
        return Routers({"0": self.gate, **others})

    @property
    def backend(self) -> str | None:
        """Backend of routing and MLP, None for the choice by device; setting it sets the gates' too."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend is not None:
            check.require_choice("backend", backend, BACKENDS)
        self._backend = backend
        for router in self.all_gates.values():
            router.backend = backend  # type: ignore[assignment]

    @property
    def num_expert(self) -> int:
        return self.gate.num_expert

    @property
    def d_model(self) -> int:
        return self.gate.d_model

    @property
    def top_k(self) -> int:
        return self.gate.top_k

    @property
    def act(self) -> str:
        """The experts' activation, as in routed_mlp."""
        return activation_name(self.experts.activation)

    def _forget(self) -> None:
        self.last_topk_indices: Tensor | None = None
        self.last_topk_scores: Tensor | None = None
        self.last_topk_pre_mix: Tensor | None = None

    def forward(self, inp: Tensor, mask: Tensor | None = None) -> Tensor:
        """Route every token and apply its experts.

        Args:
            inp: (..., D), any leading shape, the parameters' dtype or, under autocast, any dtype that it casts.
            mask: (...) bool, True = valid; None = all valid. A masked token gives 0 and does not affect
                capacities and losses, whatever its values are.

        Returns:
            (..., D).

        Raises:
            TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.
            BackendUnavailable: the requested backend cannot run this.
            UnsupportedLayer: a part of the layer was changed so that the kernels cannot compute it.
        """
        if reason := self._unsupported_reason():
            raise UnsupportedLayer(reason)
        self._forget()
        weights = (*self.experts.htoh4(), *self.experts.h4toh())
        if (experts := weights[0].shape[0] * self.world_size) != self.gate.tot_expert:
            raise UnsupportedLayer(
                f"gate: expected a gate for {experts} experts, got one for {self.gate.tot_expert}"
            )
        x, valid = self._tokens(inp, mask, weights[0])
        index, weight = self.gate(x, valid)
        self.last_topk_indices, self.last_topk_scores = index, weight
        weight = weight.to(x.dtype)
        if not self.capture_topk_pre_mix:
            return self._through_experts(x, index, weight, weights).view(inp.shape)
        choices = index.shape[1]
        rows = x.repeat_interleave(choices, dim=0)
        ones = weight.new_ones((index.numel(), 1))
        outputs = self._through_experts(rows, index.reshape(-1, 1), ones, weights)
        pre_mix = outputs.view(-1, choices, self.d_model)
        self.last_topk_pre_mix = pre_mix
        return torch.bmm(weight.unsqueeze(1), pre_mix).view(inp.shape)

    def unrecorded(self, inp: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output of forward, without the gate's loss and without last_*."""
        weights = (*self.experts.htoh4(), *self.experts.h4toh())
        x, valid = self._tokens(inp, mask, weights[0])
        index, weight, _ = self.gate.route(x, valid, x.shape[0])
        return self._through_experts(x, index, weight.to(x.dtype), weights).view(inp.shape)

    def gate_loss(self, clear: bool = True) -> Tensor | None:
        """The gate's accumulated loss, a scalar or None, by default cleared. See Gate.get_loss."""
        return self.gate.get_loss(clear)

    def _tokens(
        self, inp: Tensor, mask: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return x (N, D) in the dtype of the computation, with padding set to 0, and mask (N)."""
        check.require_tensor("inp", inp)
        check.require_floating("inp", inp)
        if inp.dim() < 1 or inp.shape[-1] != self.d_model:
            raise ValueError(f"inp: expected (..., {self.d_model}), got {tuple(inp.shape)}")
        x = inp.reshape(-1, self.d_model)
        dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
        if dtype is not None:
            x = x.to(dtype)
        else:
            check.require_same("inp", x, "the parameters", like)
        if mask is None:
            return x, None
        check.require_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, True = valid, got {mask.dtype}")
        if mask.shape != inp.shape[:-1]:
            raise ValueError(f"mask: expected {tuple(inp.shape[:-1])}, got {tuple(mask.shape)}")
        if mask.device != inp.device:
            raise ValueError(f"mask: expected device {inp.device} as inp, got {mask.device}")
        valid = mask.reshape(-1)
        # A NaN in the padding would reach the losses, because 0 * NaN is NaN.
        return x.masked_fill(~valid[:, None], 0.0), valid

    def _through_experts(
        self, x: Tensor, index: Tensor, weight: Tensor, weights: tuple[Any, ...]
    ) -> Tensor:
        parameters: list[Any] = [None if p is None else p.to(x.dtype) for p in weights]
        options: dict[str, Any] = {"act": self.act, "backend": self.backend}
        if self.world_size == 1:
            return routed_mlp(x, index, weight, *parameters, **options)
        options |= {"group": self.moe_group, "mean_gradients": self.mean_gradients}
        return parallel_routed_mlp(x, index, weight, *parameters, **options)

    # torch.compile runs this once, while tracing, and does not trace it.
    @constant_in_traces
    def _unsupported_reason(self) -> str:
        """The reason why the kernels cannot compute the layer with its present parts, or ""."""
        experts = self.experts
        if not isinstance(self.gate, Gate):
            return f"gate: expected a Gate, got {class_name(self.gate)}"
        if type(experts) is not Experts:
            return f"experts: expected Experts, got {class_name(experts)}"
        try:
            activation_name(experts.activation)
            for part, path in ((experts, "experts"), (experts.activation, "experts.activation")):
                check_hooks(part, path)
                check_methods(part, path)
            for name in ("htoh4", "h4toh"):
                child_of(experts, "experts", name, ExpertLinear)
        except TypeError as error:
            return f"experts.{error}"
        except UnsupportedLayer as error:
            return str(error)
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self.TRANSIENT)}

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self.gate, name, None)}" for name in ("d_model", "top_k")]
        return ", ".join(shown)
