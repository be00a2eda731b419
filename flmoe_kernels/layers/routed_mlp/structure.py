"""Description of a published sparse MLP, and check that RoutedMLP supports it.

RoutedMLP only uses the parameters and never calls the parts of the published module, so everything that they could
do differently is checked here. The class names of the module and of its gates identify the mathematics, because
their structure does not show what their kernels compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from flmoe_kernels.layers.parts import (
    FORWARDS,
    UnsupportedLayer,
    check_hooks,
    check_methods,
    check_parameters,
    child_of,
    class_name,
    is_integer,
    plain_module,
)

from .gate_base import Gate

SPARSE_MLP = "FMoETransformerMLP"
NOISY_GATES = ("NoisyGate", "AddtionalNoisyGate")
# The settings of each published gate besides its sizes. A gate without one of them is not supported, because the
# default of this package's gate may differ.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "NaiveGate": (),
    "GShardGate": ("capacity", "random_routing"),
    "SwitchGate": ("capacity", "switch_eps"),
    **dict.fromkeys(NOISY_GATES, ("noise_epsilon",)),
}
_FIXED_CHOICES = {"GShardGate": 2, "SwitchGate": 1}


@dataclasses.dataclass(frozen=True)
class RoutedSpec:
    """Sizes, gate and activation of a sparse MLP; gate is the published class name, act as in routed_mlp."""

    num_expert: int
    d_model: int
    d_hidden: int
    top_k: int
    gate: str
    act: str

    def routers(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The gates of a layer with this description, by their names in all_gates."""
        every = getattr(layer, "all_gates", None)
        if every is None:
            return {"0": layer.get_submodule("gate")}
        return dict(every.items())

    def make_gate(self, published: nn.Module, make: Callable[..., Gate]) -> Gate:
        """A new gate with the settings of a published gate; the caller must share the parameters."""
        gate = make(self.d_model, self.num_expert, 1, self.top_k)
        for name in _SETTINGS[self.gate]:
            setattr(gate, name, getattr(published, name))
        linear = getattr(published, "gate", None)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            gate.gate.register_parameter("bias", None)
        return gate


def parameter_shapes(
    num_expert: int, d_model: int, d_hidden: int, gate: str, num_routers: int
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a sparse MLP's state_dict, in the published order."""
    router: dict[str, tuple[int, ...]] = {
        "gate.weight": (num_expert, d_model),
        "gate.bias": (num_expert,),
    }
    if gate in NOISY_GATES:
        router = dict.fromkeys(("w_gate", "w_noise"), (d_model, num_expert))
    shapes = {f"gate.{name}": shape for name, shape in router.items()}
    for name, fan_in, fan_out in (("htoh4", d_model, d_hidden), ("h4toh", d_hidden, d_model)):
        shapes[f"experts.{name}.weight"] = (num_expert, fan_out, fan_in)
        shapes[f"experts.{name}.bias"] = (num_expert, fan_out)
    for r in range(num_routers):
        shapes |= {f"all_gates.{r}.{name}": shape for name, shape in router.items()}
    return shapes


def activation_name(module: object) -> str:
    """The name of a torch activation module in routed_mlp's `act`; TypeError for other modules."""
    kinds: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
    for kind, name in kinds.items():
        if isinstance(module, kind) and type(module).forward is FORWARDS[kind]:
            tanh = isinstance(module, nn.GELU) and module.approximate == "tanh"
            return "gelu_tanh" if tanh else name
    raise TypeError(f"activation: expected nn.GELU, nn.ReLU or nn.SiLU, got {class_name(module)}")


def describe(layer: nn.Module) -> RoutedSpec:
    """The description of a published sparse MLP; UnsupportedLayer names a part that RoutedMLP does not support."""
    published: Any = layer
    _check_settings(published)
    experts = getattr(published, "experts", None)
    if isinstance(experts, nn.ModuleList):
        raise UnsupportedLayer(
            "experts: every expert has separate parameters (FastMoE 1.1's layout), which a RoutedMLP cannot "
            "share; build a RoutedMLP and load this module's state_dict"
        )
    shape: tuple[int, ...] = getattr(
        getattr(getattr(experts, "htoh4", None), "weight", None), "shape", ()
    )
    if len(shape) != 3:
        raise UnsupportedLayer(
            f"experts.htoh4.weight: expected a parameter of 3 dimensions, got {tuple(shape)}"
        )
    num_expert, d_hidden, d_model = shape
    try:
        act = activation_name(getattr(experts, "activation", None))
    except TypeError as error:
        raise UnsupportedLayer(f"experts.{error}") from error
    gate = type(getattr(published, "gate", None)).__name__
    top_k = getattr(published, "top_k", None)
    if gate not in _SETTINGS:
        raise UnsupportedLayer(f"gate: expected one of {', '.join(_SETTINGS)}, got {gate}")
    if not is_integer(top_k) or not 1 <= top_k <= num_expert:
        raise UnsupportedLayer(f"top_k: expected 1 to {num_expert}, got {top_k!r}")
    top_k = int(top_k)
    spec = RoutedSpec(num_expert, d_model, d_hidden, top_k, gate, act)
    for name, value in (("num_expert", num_expert), ("d_model", d_model)):
        if (own := getattr(published, name, value)) != value:
            raise UnsupportedLayer(f"{name}: {own}, but the experts have {value}")
    _check_gates(published, spec)
    routers = len(spec.routers(layer)) if hasattr(layer, "all_gates") else 0
    shapes = parameter_shapes(num_expert, d_model, d_hidden, gate, routers)
    # A gate may have no bias; router 0 is the gate, and RoutedMLP registers it only as such.
    optional = [n for n in shapes if n.endswith("gate.bias") or n.startswith("all_gates.0.")]
    check_parameters(layer, shapes, optional)
    for name, part in layer.named_modules():
        if part is not layer:
            check_hooks(part, name)
            check_methods(part, name)
    return spec


def _check_settings(layer: Any) -> None:
    world = getattr(layer, "world_size", 1)
    if world != 1:
        raise UnsupportedLayer(f"world_size: expected 1, got {world!r}")
    if getattr(layer, "slice_size", 1) != 1 or getattr(layer, "slice_group", None) is not None:
        raise UnsupportedLayer("slice_group: the module splits its tokens among processes")
    for name in ("gate_hook", "mask", "mask_dict"):
        if getattr(layer, name, None) is not None:
            raise UnsupportedLayer(f"{name}: set, but RoutedMLP does not support it")


def _check_gates(layer: Any, spec: RoutedSpec) -> None:
    if hasattr(layer, "all_gates"):
        child_of(layer, "", "all_gates", nn.ModuleDict)
    routers = spec.routers(layer)
    if list(routers) != [str(r) for r in range(len(routers))] or not routers:
        raise UnsupportedLayer(f"all_gates: expected routers 0, 1, ..., got {list(routers)}")
    # Not the modules: torch.export puts proxies in their place.
    tensors = ([id(p) for p in gate.parameters()] for gate in (routers["0"], layer.gate))
    if len(set(map(tuple, tensors))) > 1:
        raise UnsupportedLayer("all_gates.0: not the gate itself")
    sizes = dict.fromkeys(("num_expert", "tot_expert"), spec.num_expert)
    sizes |= {"world_size": 1, "top_k": spec.top_k}
    for number, router in routers.items():
        path: str = f"all_gates.{number}"
        if type(router).__name__ != spec.gate:
            raise UnsupportedLayer(f"{path}: expected {spec.gate}, got {type(router).__name__}")
        for name, value in sizes.items():
            if (actual := getattr(router, name, None)) != value:
                raise UnsupportedLayer(f"{path}.{name}: expected {value}, got {actual!r}")
        if spec.top_k != (fixed := _FIXED_CHOICES.get(spec.gate, spec.top_k)):
            raise UnsupportedLayer(f"{path}.top_k: expected {fixed}, got {spec.top_k}")
        for name in _SETTINGS[spec.gate]:
            if not hasattr(router, name):
                raise UnsupportedLayer(f"{path}.{name}: missing, but a {spec.gate} needs it")
        if spec.gate not in NOISY_GATES:
            plain_module(getattr(router, "gate", None), f"{path}.gate", nn.Linear)
