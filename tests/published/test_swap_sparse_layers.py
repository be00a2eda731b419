"""The published layer with sparse fusion models: what is read from it, swapped, refused, kept in checkpoints."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.layers.interaction_moe.architecture import build, build_like
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.published.convert import load_checkpoint, load_layer
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.recognise import check_state
from flmoe_kernels.published.swap import swap, swap_checkpoint
from tests.support import lineage_sparse as lineage_sparse
from tests.support.inputs import draw
from tests.support.lineage import fl, i2, make_layer

GATES = ("NaiveGate", "GShardGate", "SwitchGate", "AddtionalNoisyGate")
every_gate = pytest.mark.parametrize("gate", GATES)
both = pytest.mark.parametrize("variant", [fl, i2])
MLP = "interaction_experts.1.fusion_model.network.0.mlp."


def sparse_layer(variant: Any = fl, gate: str = "GShardGate", **options: Any) -> Any:
    settings = {"layers": 3, "mlp_sparse": True, "sparse": True, "num_experts": 5, **options}
    return make_layer(variant, gate=gate, **settings)


def tokens(variant: Any = fl) -> list[Tensor]:
    return [
        draw(3, length, 16, seed=i) for i, length in enumerate((5, 5) if variant is i2 else (7, 4))
    ]


def mlp_of(layer: Any, e: int = 1, network: int = 0) -> Any:
    return layer.interaction_experts[e].fusion_model.network[network].mlp


def lifted(layer: nn.Module) -> Any:
    """A layer whose capacities are out of reach: the published code drops other rows than this one."""
    for part in layer.modules():
        if hasattr(part, "capacity"):
            part.capacity = (9.0, 9.0)
    return layer.eval()


@every_gate
@both
def test_describes_and_builds_what_is_described_alike(variant: Any, gate: str) -> None:
    layer = sparse_layer(variant, gate, num_routers=2)
    spec = describe(layer)
    assert spec.sparse is not None
    assert (spec.sparse.num_experts, spec.sparse.d_hidden, spec.sparse.num_routers) == (5, 32, 2)
    assert spec.sparse.gate == gate.removeprefix("Addtional")
    assert spec.sparse.top_k == (1 if gate == "SwitchGate" else 2)
    assert spec.sparse.capacity == ((1.2, 2.4) if gate in GATES[1:3] else None)
    assert [rates.mlp for rates in spec.dropout] == [0.0, 0.5, 0.0]
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert list(spec.parameter_shapes().items()) == list(shapes.items()) or variant is i2
    assert spec.parameter_shapes() == shapes
    reference = build_like(spec)
    reference.load_state_dict(layer.state_dict(), strict=True)
    assert describe(reference) == spec


def test_describes_the_gates_settings() -> None:
    layer = sparse_layer()
    for part in layer.modules():
        if hasattr(part, "random_routing"):
            part.capacity, part.random_routing = [0.5, 0.75], True
    spec = describe(layer)
    assert spec.sparse is not None
    assert (spec.sparse.capacity, spec.sparse.random_routing) == ((0.5, 0.75), True)
    gate: Any = mlp_of(build_like(spec)).gate
    assert (gate.capacity, gate.random_routing) == ((0.5, 0.75), True)


class OtherMLP(lineage_sparse.FMoETransformerMLP):
    pass


def no_bias(layer: Any) -> None:
    mlp_of(layer).gate.gate.bias = None


def tanh(layer: Any) -> None:
    mlp_of(layer).experts.activation = nn.GELU(approximate="tanh")


def dense_first(layer: Any) -> None:
    first, second = (layer.interaction_experts[1].fusion_model.network[i] for i in (0, 1))
    first.mlp, second.mlp = second.mlp, first.mlp


def roomier(layer: Any) -> None:
    for router in mlp_of(layer).all_gates.values():
        router.capacity = (1.0, 2.0)


def narrower(layer: Any) -> None:
    block = layer.interaction_experts[1].fusion_model.network[0]
    block.mlp = lineage_sparse.make_mlp(num_expert=5, dim=16, hidden=24)


BREAKS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("a hook of the gate", lambda x: setattr(mlp_of(x), "gate_hook", print), "mlp.gate_hook: set"),
    ("a mask", lambda x: setattr(mlp_of(x), "mask", torch.ones(2)), "network.0.mlp.mask: set"),
    ("processes", lambda x: setattr(mlp_of(x), "world_size", 2), "mlp.world_size: expected 1"),
    ("another kind", lambda x: setattr(mlp_of(x), "__class__", OtherMLP), "another kind, OtherMLP"),
    ("activation", lambda x: setattr(mlp_of(x).experts, "activation", nn.ReLU()), "GELU.*got relu"),
    ("tanh", tanh, "exact erf, got gelu_tanh"),
    ("no bias", no_bias, r"all_gates\.0\.gate: has no bias"),
    ("hidden width", narrower, r"mlp\.d_hidden: expected 32, got 24"),
    ("pattern", dense_first, r"sparse MLPs in layers \[1, 2\], expected none or \[0, 2\]"),
    (
        "capacity of an expert",
        roomier,
        r"experts\.1\S*network\.2\.mlp: capacity is \(1.2, 2.4\), \(1.0, 2.0\) in the first layer",
    ),
    (
        "a router apart",
        lambda x: setattr(mlp_of(x).all_gates["1"], "capacity", (1.0, 2.0)),
        r"all_gates\.1: has other settings",
    ),
    (
        "another gate",
        lambda x: mlp_of(x).all_gates.update({"0": lineage_sparse.GShardGate(16, 5, 1)}),
        r"all_gates\.0: not the gate itself",
    ),
    ("extra", lambda x: mlp_of(x).register_buffer("b", torch.ones(1)), "mlp.b: an unexpected"),
    ("own forward", lambda x: setattr(mlp_of(x).gate, "forward", print), "forward: replaced"),
]


@pytest.mark.parametrize(("broken", "message"), [pytest.param(b, m, id=i) for i, b, m in BREAKS])
def test_refuses(broken: Callable[[nn.Module], Any], message: str) -> None:
    layer = sparse_layer(num_routers=2)
    broken(layer)
    with pytest.raises(UnsupportedLayer, match=message):
        describe(layer)


def test_state_refuses_a_gate_in_another_mode_or_with_a_hook() -> None:
    layer = sparse_layer()
    check_state(layer)
    mlp_of(layer).gate.eval()
    with pytest.raises(
        UnsupportedLayer, match=r"mlp\.gate: in eval mode while the layer is in train"
    ):
        check_state(layer)
    mlp_of(layer).gate.train().register_forward_hook(print)
    with pytest.raises(UnsupportedLayer, match=r"mlp\.gate: carries a hook"):
        check_state(layer)


@pytest.mark.parametrize(("variant", "gate"), [*((fl, gate) for gate in GATES), (i2, "GShardGate")])
def test_swap_computes_what_the_original_did(variant: Any, gate: str) -> None:
    layer = sparse_layer(variant, gate, num_routers=2)
    original = copy.deepcopy(layer)
    before = dict(layer.named_parameters())
    report = swap(layer)
    assert [entry.reason for entry in report.left] == []
    fast = report.model
    assert isinstance(fast, InteractionMoE)
    assert all(value is before[name] for name, value in fast.named_parameters())
    assert list(fast.state_dict()) == list(original.state_dict())
    inputs = tokens(variant)
    calls: list[tuple] = [(inputs,)]
    if variant is fl:
        masks = [torch.ones(x.shape[:2]) for x in inputs]
        masks[0][1, 3:] = 0
        calls.append((inputs, masks))
    original, fast = lifted(original), lifted(fast)
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(fast.inference(*call), original.inference(*call))
        found = fast(*calls[-1])
        assert len(found) == len(original(*calls[-1]))
    assert all(bool(loss.isfinite()) for views in found[4] for loss in views)


class UniformWeights(lineage_sparse.GShardGate):
    """Chooses as the published gate and weighs otherwise."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = super().forward(x)
        return index, torch.full_like(weight, 0.5)


def test_the_check_is_what_catches_another_gate() -> None:
    def disguised() -> nn.Module:
        layer = sparse_layer(num_experts=2)
        for part in layer.modules():
            if isinstance(part, lineage_sparse.GShardGate):
                part.__class__ = type("GShardGate", (UniformWeights,), {})
        return layer

    layer = disguised()
    report = swap(layer)
    assert report.swapped == ()
    assert report.model is layer
    assert re.search(r"off by .* allowed", report.left[0].reason)
    assert isinstance(swap(disguised(), check=False).model, InteractionMoE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_swap_serves_other_dtypes(dtype: torch.dtype) -> None:
    report = swap(sparse_layer(i2).to(dtype))
    assert [entry.reason for entry in report.left] == []


def test_check_disturbs_nothing() -> None:
    layer = sparse_layer()
    layer(tokens())
    gates = [part for part in layer.modules() if isinstance(part, lineage_sparse.BaseGate)]
    before = [(gate.capacity, gate.loss, len(gate.topk_logits)) for gate in gates]
    swap(nn.ModuleDict({"moe": layer}))
    assert [(gate.capacity, gate.loss, len(gate.topk_logits)) for gate in gates] == before


def test_fastmoes_own_code_is_never_run_on_the_cpu() -> None:
    layer = sparse_layer()
    kind = type("_Expert", (type(mlp_of(layer).experts),), {"__module__": "fmoe.transformer"})
    mlp_of(layer).experts.__class__ = kind
    report = swap(layer)
    assert "runs on a CUDA device only" in report.left[0].reason


def save(path: Path, state: Any, **others: Any) -> Path:
    torch.save({"ensemble_model": state, **others}, path)
    return path


@pytest.mark.parametrize(("variant", "gate"), [*((fl, gate) for gate in GATES), (i2, "GShardGate")])
def test_converts_checkpoints(tmp_path: Path, variant: Any, gate: str) -> None:
    layer = sparse_layer(variant, gate, heads=4, layers=2)
    path = save(tmp_path / "a.pt", layer.state_dict())
    name = None if gate == "AddtionalNoisyGate" else gate
    conversion = swap_checkpoint(path, num_heads=4, gate=name)
    written = torch.load(conversion.out, weights_only=True)
    assert written["flmoe_config"]["sparse"]["gate"] == gate.removeprefix("Addtional")
    assert written["flmoe_config"]["sparse"]["top_k"] == (1 if gate == "SwitchGate" else 2)
    assert written["ensemble_model"].keys() == layer.state_dict().keys()
    fresh = sparse_layer(variant, gate, heads=4, layers=2, seed=9)
    fresh.load_state_dict(written["ensemble_model"], strict=True)

    # Without being told again, the file gives a layer that answers as the original.
    inputs, original = tokens(variant), lifted(layer)
    loaded = lifted(swap(load_layer(conversion.out)).model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.inference(inputs), original.inference(inputs))
    assert loaded.fusion_sparse


def test_settings_of_the_gates_travel_with_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", sparse_layer(gate="NaiveGate", layers=1).state_dict())
    assert swap_checkpoint(path).architecture.sparse.gate == "GShardGate"
    out = swap_checkpoint(path, gate="NaiveGate", top_k=3, out=tmp_path / "b.pt").out
    assert load_checkpoint(out)[1].sparse.top_k == 3
    assert load_checkpoint(out, top_k=4)[1].sparse.top_k == 4
    content = torch.load(
        save(tmp_path / "c.pt", sparse_layer(layers=1).state_dict()), weights_only=True
    )
    found = swap_checkpoint(tmp_path / "c.pt")
    config = torch.load(found.out, weights_only=True)["flmoe_config"]
    config["sparse"] |= {"capacity": [0.5, 0.75], "random_routing": True, "switch_eps": "odd"}
    again = save(tmp_path / "d.pt", content["ensemble_model"], flmoe_config=config)
    spec = load_checkpoint(again)[1].sparse
    assert (spec.capacity, spec.random_routing, spec.switch_eps) == ((0.5, 0.75), True, None)
    assert mlp_of(load_layer(again)).gate.capacity == (0.5, 0.75)
    assert load_checkpoint(again, gate="NaiveGate")[1].sparse.capacity is None
    config["sparse"] |= {"capacity": [0.0, float("nan")], "top_k": "two"}
    odd = save(tmp_path / "e.pt", content["ensemble_model"], flmoe_config=config)
    assert load_checkpoint(odd)[1].sparse.capacity == (1.2, 2.4)


@both
def test_reads_the_layout_of_experts_apart(tmp_path: Path, variant: Any) -> None:
    layer = sparse_layer(variant, apart=True, layers=2)
    assert MLP + "experts.4.htoh4.weight" in layer.state_dict()
    path = save(tmp_path / "a.pt", layer.state_dict())
    state, architecture = load_checkpoint(path)
    assert architecture.sparse.num_experts == 5
    assert state.keys() == sparse_layer(variant, layers=2).state_dict().keys()
    reference = build(architecture, 2)
    reference.load_state_dict(state, strict=True)
    inputs, original = tokens(variant), lifted(layer)
    with torch.no_grad():
        found = lifted(swap(reference).model).inference(inputs)
        torch.testing.assert_close(found, original.inference(inputs))
    written = torch.load(swap_checkpoint(path, num_heads=2).out, weights_only=True)
    assert written["ensemble_model"].keys() == state.keys()


def change(key: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[Any], None]:
    def applied(state: Any) -> None:
        old = state.pop(MLP + key)
        if value is not None:
            state[MLP + key] = value(old)

    return applied


BAD: list[tuple[str, dict[str, Any], Callable[[Any], Any], str]] = [
    (
        "copies",
        {},
        change("gate.gate.bias", lambda x: x + 1),
        "gate.bias.*differ, but are one gate",
    ),
    ("missing", {}, change("experts.h4toh.bias", None), r"missing: .*mlp\.experts\.h4toh\.bias"),
    (
        "shape",
        {},
        change("experts.h4toh.weight", lambda x: x[:, :3]),
        r"wrong shape: .*h4toh\.weight is \(5, 3, 32\), expected \(5, 16, 32\)",
    ),
    (
        "one apart missing",
        {"apart": True},
        change("experts.2.htoh4.bias", None),
        r"Missing key.*experts\.2\.htoh4\.bias",
    ),
    (
        "one apart of another shape",
        {"apart": True},
        change("experts.2.htoh4.bias", lambda x: x[:, :3]),
        r"size mismatch for .*experts\.2\.htoh4\.bias",
    ),
    (
        "no experts",
        {},
        lambda state: [state.pop(k) for k in list(state) if ".htoh4." in k],
        "htoh4",
    ),
    (
        "absurd",
        {},
        lambda state: state.update({MLP + "all_gates.99999999.gate.bias": torch.ones(5)}),
        "numbers in its keys exceed",
    ),
]


@pytest.mark.parametrize(
    ("options", "applied", "message"), [pytest.param(*rest, id=i) for i, *rest in BAD]
)
def test_wrong_checkpoints(
    tmp_path: Path, options: dict[str, Any], applied: Callable[[Any], Any], message: str
) -> None:
    state = dict(sparse_layer(**options).state_dict())
    applied(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(save(tmp_path / "a.pt", state))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({}, {"gate": "TopGate"}, "gate: expected one of NaiveGate, .*got 'TopGate'"),
        ({}, {"gate": "NoisyGate"}, "gates that are not Noisy, got NoisyGate"),
        ({"gate": "AddtionalNoisyGate"}, {"gate": "GShardGate"}, "Noisy gates, got GShardGate"),
        ({}, {"gate": "SwitchGate", "top_k": 2}, "top.?k: expected 1 for Switch, got 2"),
        ({}, {"gate": "NaiveGate", "top_k": 6}, "top_k: expected an int from 1 to 5, got 6"),
        (
            {"mlp_sparse": False},
            {"gate": "GShardGate"},
            "gate: given, but there are no sparse MLPs",
        ),
        ({"mlp_sparse": False}, {"top_k": 2}, "top_k: given, but there are no sparse MLPs"),
    ],
)
def test_settings_that_do_not_fit(
    tmp_path: Path, options: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "a.pt", sparse_layer(**options).state_dict())
    with pytest.raises(CheckpointError, match=message):
        swap_checkpoint(path, **asked)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_command_takes_the_gate_and_the_choices(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", sparse_layer(gate="NaiveGate", layers=1).state_dict())
    arguments = ["swap", str(path), "--heads", "2", "--gate", "NaiveGate", "--top-k", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "sparse with 5 experts, top 3 of a NaiveGate" in result.stdout
    assert "2 heads, temperature 1, top 3 of a NaiveGate" in result.stdout
    refused = CliRunner().invoke(app, [*arguments[:4], "--gate", "NoisyGate"])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
