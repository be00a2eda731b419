"""What a published sparse MLP is made of, and whether RoutedMLP may stand in for it.

RoutedMLP computes its own mathematics from the parameters and never calls the parts of the published module, so
everything that those could do differently is looked at here. The class names of the module and of its gates tell
which mathematics is meant, since that of the kernels behind them cannot be read off their structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gate_base import Gate

__all__ = [
    "SPARSE_MLP",
    "RoutedSpec",
    "UnsupportedMLP",
    "activation_name",
    "check_state",
    "describe",
]

SPARSE_MLP = "FMoETransformerMLP"
# The published gates, with the parameters that they have of width D and E experts.
_LINEAR = {"gate.weight": "ED", "gate.bias": "E"}
_NOISY = {"w_gate": "DE", "w_noise": "DE"}
PUBLISHED_GATES: dict[str, dict[str, str]] = {
    "NaiveGate": _LINEAR,
    "GShardGate": _LINEAR,
    "SwitchGate": _LINEAR,
    "NoisyGate": _NOISY,
    "AddtionalNoisyGate": _NOISY,
}
# The settings that a published gate has beyond its sizes. One that lacks any is not of that kind: ours would
# compute with a default of its own.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "NaiveGate": (),
    "GShardGate": ("capacity", "random_routing"),
    "SwitchGate": ("capacity", "switch_eps"),
    "NoisyGate": ("noise_epsilon",),
    "AddtionalNoisyGate": ("noise_epsilon",),
}
_FIXED_CHOICES = {"GShardGate": 2, "SwitchGate": 1}


class UnsupportedMLP(ValueError):
    """RoutedMLP cannot stand in for this module: names the part and what is unexpected."""


@dataclasses.dataclass(frozen=True)
class RoutedSpec:
    """Sizes and kinds of a sparse MLP; gate is the published class name, act as in routed_mlp."""

    num_expert: int
    d_model: int
    d_hidden: int
    top_k: int
    gate: str
    act: str

    def routers(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The gates of a layer of this description, by the names that all_gates gives them."""
        every = getattr(layer, "all_gates", None)
        if every is None:
            return {"0": layer.get_submodule("gate")}
        return dict(every.items())

    def make_gate(self, published: nn.Module, make: Callable[..., Gate]) -> Gate:
        """A new gate with the published one's settings; its parameters are for the caller to share."""
        gate = make(self.d_model, self.num_expert, 1, self.top_k)
        for name in _SETTINGS[self.gate]:
            setattr(gate, name, getattr(published, name))
        linear = getattr(published, "gate", None)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            gate.gate.register_parameter("bias", None)
        return gate


def activation_name(module: object) -> str:
    """The name in routed_mlp's `act` of a torch activation module.

    Raises:
        TypeError: another module.
    """
    kinds: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
    for kind, name in kinds.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            tanh = isinstance(module, nn.GELU) and module.approximate == "tanh"
            return "gelu_tanh" if tanh else name
    found = type(module).__name__
    raise TypeError(f"activation: expected nn.GELU, nn.ReLU or nn.SiLU, a module, got {found}")


def describe(layer: nn.Module) -> RoutedSpec:
    """The description of a published sparse MLP.

    Raises:
        UnsupportedMLP: naming the part that RoutedMLP does not compute.
    """
    published: Any = layer
    _check_settings(published)
    experts = getattr(published, "experts", None)
    if isinstance(experts, nn.ModuleList):
        raise UnsupportedMLP(
            "experts: each has parameters of its own (FastMoE 1.1's layout), which one fused module cannot "
            "share; build a RoutedMLP and load this module's state_dict"
        )
    inner = _parameter(layer, "experts.htoh4.weight", 3)
    num_expert, d_hidden, d_model = inner.shape
    try:
        act = activation_name(getattr(experts, "activation", None))
    except TypeError as error:
        raise UnsupportedMLP(f"experts.{error}") from error
    gate = type(getattr(published, "gate", None)).__name__
    top_k = getattr(published, "top_k", None)
    if gate not in PUBLISHED_GATES:
        raise UnsupportedMLP(f"gate: expected one of {', '.join(PUBLISHED_GATES)}, got {gate}")
    if not isinstance(top_k, int) or not 1 <= top_k <= num_expert:
        raise UnsupportedMLP(f"top_k: expected 1 to {num_expert}, got {top_k!r}")
    spec = RoutedSpec(num_expert, d_model, d_hidden, top_k, gate, act)
    for name, value in (("num_expert", num_expert), ("d_model", d_model)):
        if getattr(published, name, value) != value:
            raise UnsupportedMLP(
                f"{name}: {getattr(published, name)}, but the experts have {value}"
            )
    _check_gates(published, spec)
    _check_parameters(layer, spec)
    return spec


def check_state(layer: nn.Module) -> None:
    """What RoutedMLP could not honour although the structure fits.

    Raises:
        UnsupportedMLP: a hook on an inner part, parts in another mode than the module, a forward replaced on an
            instance, or a module that was compiled in place.
    """
    if getattr(layer, "_compiled_call_impl", None) is not None:
        raise UnsupportedMLP("the module is compiled: swap first, then compile")
    for name, part in layer.named_modules():
        if "forward" in vars(part):
            raise UnsupportedMLP(f"{_join(name, 'forward')}: replaced on this instance")
        if part is layer:
            continue
        if any(hooks for key, hooks in vars(part).items() if "_hooks" in key):
            raise UnsupportedMLP(f"{name}: carries a hook, which would never fire")
        if part.training != layer.training:
            raise UnsupportedMLP(f"{name}: not in the module's mode")


def _check_settings(layer: Any) -> None:
    world = getattr(layer, "world_size", 1)
    if world != 1:
        raise UnsupportedMLP(f"world_size: expected 1, got {world!r}")
    if getattr(layer, "slice_size", 1) != 1 or getattr(layer, "slice_group", None) is not None:
        raise UnsupportedMLP("slice_group: the module splits its tokens among processes")
    for name in ("gate_hook", "mask", "mask_dict"):
        if getattr(layer, name, None) is not None:
            raise UnsupportedMLP(f"{name}: set, and RoutedMLP has none")


def _check_gates(layer: Any, spec: RoutedSpec) -> None:
    if not isinstance(getattr(layer, "all_gates", nn.ModuleDict()), nn.ModuleDict):
        raise UnsupportedMLP(
            f"all_gates: expected ModuleDict, got {type(layer.all_gates).__name__}"
        )
    routers = spec.routers(layer)
    if list(routers) != [str(r) for r in range(len(routers))] or not routers:
        raise UnsupportedMLP(f"all_gates: expected routers 0, 1, ..., got {list(routers)}")
    if routers["0"] is not layer.gate:
        raise UnsupportedMLP("all_gates.0: not the gate itself")
    for number, router in routers.items():
        path: str = f"all_gates.{number}"
        if type(router).__name__ != spec.gate:
            raise UnsupportedMLP(f"{path}: expected {spec.gate}, got {type(router).__name__}")
        sizes = {"num_expert": spec.num_expert, "tot_expert": spec.num_expert, "world_size": 1}
        sizes["top_k"] = spec.top_k
        for name, value in sizes.items():
            if getattr(router, name, None) != value:
                found = getattr(router, name, None)
                raise UnsupportedMLP(f"{path}.{name}: expected {value}, got {found!r}")
        if spec.top_k != _FIXED_CHOICES.get(spec.gate, spec.top_k):
            raise UnsupportedMLP(f"{path}.top_k: {spec.top_k}, which {spec.gate} has not")
        for name in _SETTINGS[spec.gate]:
            if not hasattr(router, name):
                raise UnsupportedMLP(f"{path}.{name}: missing, which a {spec.gate} has")
        if "gate.weight" in PUBLISHED_GATES[spec.gate]:
            linear = getattr(router, "gate", None)
            if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
                raise UnsupportedMLP(f"{path}.gate: expected Linear, got {type(linear).__name__}")


def _check_parameters(layer: nn.Module, spec: RoutedSpec) -> None:
    """Exactly the expected parameters, of one dtype and device: what an extra one does would be lost."""
    size = {"D": spec.d_model, "E": spec.num_expert, "F": spec.d_hidden}
    expected = {
        "experts.htoh4.weight": "EFD",
        "experts.htoh4.bias": "EF",
        "experts.h4toh.weight": "EDF",
        "experts.h4toh.bias": "ED",
    }
    routers: dict[str, str] = {}
    for number in spec.routers(layer):
        names = PUBLISHED_GATES[spec.gate].items()
        routers |= {f"all_gates.{number}.{name}": letters for name, letters in names}
    first = {"gate." + k.removeprefix("all_gates.0."): v for k, v in routers.items() if ".0." in k}
    expected |= first | (routers if hasattr(layer, "all_gates") else {})
    found = {
        **dict(layer.named_parameters(remove_duplicate=False)),
        **dict(layer.named_buffers(remove_duplicate=False)),
    }
    if unknown := sorted(found.keys() - expected.keys()):
        raise UnsupportedMLP(f"{unknown[0]}: an unexpected parameter or buffer")
    for name, letters in expected.items():
        if name not in found and name.endswith("gate.bias"):
            continue
        parameter = _parameter(layer, name, len(letters))
        shape = tuple(size[letter] for letter in letters)
        if tuple(parameter.shape) != shape:
            raise UnsupportedMLP(f"{name}: expected {shape}, got {tuple(parameter.shape)}")
    kinds = {(tensor.dtype, tensor.device) for tensor in found.values()}
    if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
        raise UnsupportedMLP(
            f"parameters: expected one floating dtype and device, got {sorted(map(str, kinds))}"
        )


def _parameter(layer: nn.Module, name: str, dims: int) -> Tensor:
    value: Any = layer
    for part in name.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, nn.Parameter) or value.dim() != dims:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UnsupportedMLP(f"{name}: expected a parameter of {dims} dimensions, got {found}")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
