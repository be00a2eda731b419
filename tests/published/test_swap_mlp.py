"""`swap` of sparse MLPs outside of any interaction layer: what it replaces, leaves, and compares."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import RoutedMLP
from flmoe_kernels.layers.routed_mlp.gates import NoisyGate
from flmoe_kernels.layers.routed_mlp.structure import describe
from flmoe_kernels.published import compare as swap_mlp
from flmoe_kernels.published.agreement import Disagreement
from flmoe_kernels.published.calls import Case
from flmoe_kernels.published.report import SwapReport
from flmoe_kernels.published.swap import ROOT, swap
from tests.support import lineage_sparse as lineage
from tests.support.inputs import draw
from tests.support.lineage import fl, make_layer
from tests.support.lineage_sparse import FMoETransformerMLP, gate_loss, make_mlp

GATES = ("NaiveGate", "GShardGate", "SwitchGate", "AddtionalNoisyGate")
every_gate = pytest.mark.parametrize("gate", GATES)


class Block(nn.Module):
    """A layer of the lineage's gshardgate baseline: one sparse MLP, called once per modality."""

    def __init__(self, gate: str = "GShardGate", **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.5)
        self.mlp = make_mlp(gate, **options)

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [x + self.drop(self.mlp(self.norm(x))) for x in parts]


class Fusion(nn.Module):
    """Two such layers and a dense one between, as num_layers=3 gives."""

    def __init__(self, gate: str = "GShardGate", **options: Any) -> None:
        super().__init__()
        layers = [Block(gate, **options), Block(gate, seed=1, **options)]
        self.network = nn.Sequential(*layers)
        self.head = nn.Linear(16, 3)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.head(torch.cat(self.network(parts), dim=1).mean(dim=1))


def parts(seed: int = 0) -> list[Tensor]:
    return [draw(3, 11, 16, seed=seed), draw(3, 7, 16, seed=seed + 1)]


def reason(report: SwapReport) -> str:
    assert report.swapped == report.swapped_mlps == ()
    assert len(report.left) == 1
    return report.left[0].reason


@every_gate
@pytest.mark.parametrize("mode", [True, False])
def test_replaces_them_and_shares_their_parameters(gate: str, mode: bool) -> None:
    model = Fusion(gate).train(mode)
    original = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = swap(model)
    assert report.left == report.swapped == ()
    assert [(e.name, e.gate, e.experts, e.inputs) for e in report.swapped_mlps] == [
        (f"network.{i}.mlp", gate, 5, "random") for i in (0, 1)
    ]
    for entry in report.swapped_mlps:
        assert entry.output_error is not None
        assert 0 < entry.output_error < 1e-5
        assert entry.speed_up is not None
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(part.training is mode for part in model.modules())
    for block in model.network:
        assert type(block.mlp) is RoutedMLP
        assert block.mlp.gate is block.mlp.all_gates["0"]

    model.eval()
    for part in (*model.modules(), *original.modules()):
        if hasattr(part, "capacity"):
            part.capacity = (5.0, 5.0)
    with torch.no_grad():
        torch.testing.assert_close(model(parts()), original(parts()))
    original.load_state_dict(model.state_dict())
    for piece in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"):
        whole = state.pop(f"network.0.mlp.experts.{piece}")
        state |= {f"network.0.mlp.experts.{e}.{piece}": whole[e : e + 1] for e in range(5)}
    model.load_state_dict(state)


def test_settings_of_the_gates_are_kept() -> None:
    switch, gshard = make_mlp("SwitchGate", n_router=2), make_mlp(n_router=2)
    switch.gate.switch_eps, switch.gate.capacity = 0.25, (0.7, 1.3)
    gshard.gate.random_routing = True
    gshard.all_gates["1"].capacity = (3.0, 4.0)
    noisy = make_mlp("AddtionalNoisyGate")
    noisy.gate.noise_epsilon = 0.5
    naive = make_mlp("NaiveGate", top_k=3)
    naive.gate.gate.register_parameter("bias", None)
    model = nn.ModuleList([switch, gshard, noisy, naive])
    assert swap(model).left == ()
    assert (model[0].gate.switch_eps, model[0].gate.capacity) == (0.25, (0.7, 1.3))
    assert model[1].gate.random_routing is True
    assert model[1].all_gates["1"].capacity == (3.0, 4.0)
    assert type(model[2].gate) is NoisyGate
    assert model[2].gate.noise_epsilon == 0.5
    assert model[3].gate.gate.bias is None
    assert (model[3].top_k, model[3].act) == (3, "gelu")


@every_gate
def test_the_published_sum_of_gate_losses_works(gate: str) -> None:
    """Of both layers and of both modalities, with a gradient; the published code warns of idle routers."""
    model = Fusion(gate, n_router=2)
    assert swap(model).left == ()
    inputs, warnings = parts(), list[str]()
    torch.manual_seed(2)
    (model(inputs).sum() + gate_loss(model, warnings)).backward()
    assert warnings == [f"network.{i}.mlp, router 1: empty" for i in (0, 1)]
    assert gate_loss(model) == 0, "all were taken"

    torch.manual_seed(2)
    model(inputs)
    loss = gate_loss(model)
    routers = [p for block in model.network for p in block.mlp.gate.parameters()]
    grads = torch.autograd.grad(loss, routers, allow_unused=True, materialize_grads=True)
    assert bool(torch.cat([grad.flatten() for grad in grads]).any()) == (gate != "NaiveGate")
    spare = [p for block in model.network for p in block.mlp.all_gates["1"].parameters()]
    assert all(p.grad is None for p in spare)


def test_gate_losses_count_every_modality() -> None:
    """The published gate keeps the last call's loss alone; ours is their sum."""
    published = Block().eval()
    model = copy.deepcopy(published)
    swap(model)
    model.train()
    for part in (model, published):
        part.drop.p = 0.0
    apart = []
    for x in parts():
        published([x])
        apart.append(gate_loss(published))
    published(parts())
    assert gate_loss(published) == apart[1]
    model(parts())
    torch.testing.assert_close(gate_loss(model), apart[0] + apart[1])


def test_what_training_hooks_of_the_lineage_read() -> None:
    model = Fusion()
    seen: list[tuple] = []

    def hook(module: Any, _inputs: Any, output: Tensor) -> None:
        kept = (module.last_topk_indices, module.last_topk_scores, module.last_topk_pre_mix)
        seen.append((output, module.last_tot_expert, *kept))

    mlp = model.network[0].mlp
    mlp.capture_topk_pre_mix = True
    handle = mlp.register_forward_hook(hook)
    swap(model)
    seen.clear()
    fast = model.network[0].mlp
    assert fast.capture_topk_pre_mix is True
    model(parts())
    assert [out.shape for out, *_ in seen] == [x.shape for x in parts()]
    for out, experts, index, weight, pre_mix in seen:
        assert experts == 5
        assert index.shape == weight.shape == pre_mix.shape[:2]
        torch.testing.assert_close((weight[..., None] * pre_mix).sum(1), out.flatten(0, 1))
    fast.gate.reset_topk_logit()
    handle.remove()
    seen.clear()
    model(parts())
    assert not seen


def test_alone_shared_and_on_given_inputs() -> None:
    mlp = make_mlp()
    report = swap(mlp)
    assert isinstance(report.model, RoutedMLP)
    assert report.swapped_mlps[0].name == ROOT

    model = Fusion()
    model.again = model.network[0].mlp
    model.spare = make_mlp(seed=5)
    report = swap(model, inputs=(parts(),))
    assert model.again is model.network[0].mlp
    assert {entry.name: entry.inputs for entry in report.swapped_mlps} == {
        "network.0.mlp, again": "given",
        "network.1.mlp": "given",
        "spare": "random",
    }
    unchecked = swap(make_mlp(), check=False)
    entry = unchecked.swapped_mlps[0]
    assert (entry.inputs, entry.output_error, entry.speed_up) == ("-", None, None)


def test_the_report_has_a_table_of_its_own() -> None:
    model = nn.ModuleDict({"a": make_mlp(), "b": make_mlp("SwitchGate"), "c": make_mlp(apart=True)})
    report = swap(model)
    text = str(report)
    assert text.startswith("2 layers swapped, 1 left as is.")
    header, *rows = (line for line in text.splitlines() if re.match(r"(swapped|a|b) ", line))
    assert header.split() == [
        "swapped",
        "gate",
        "experts",
        "top",
        "k",
        "inputs",
        "output",
        "faster",
    ]
    assert re.fullmatch(r"a +GShardGate +5 +2 +random +\d\.\de-\d\d +\d+\.\dx", rows[0])
    assert re.fullmatch(r"b +SwitchGate +5 +1 +random +\d\.\de-\d\d +\d+\.\dx", rows[1])
    assert "capacities lifted" in text
    assert set(report.as_dict()) == {"swapped", "swapped_mlps", "left"}
    assert report.as_dict()["swapped_mlps"][1]["gate"] == "SwitchGate"
    assert "FMoETransformerMLP" in str(swap(nn.Linear(2, 2)))


class Squared(lineage.GShardGate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = super().forward(x)
        return index, weight.square()


class Fails(lineage.GShardGate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise KeyError("no\nmore")


def changed(change: Callable[[Any], Any], gate: str = "GShardGate", **options: Any) -> Any:
    def make() -> nn.Module:
        mlp = make_mlp(gate, **options)
        change(mlp)
        return mlp

    return make


def as_gate(kind: type[nn.Module], name: str = "GShardGate") -> Callable[[], nn.Module]:
    return changed(lambda m: setattr(m.gate, "__class__", type(name, (kind,), {})))


def other_part(m: Any, owner: str, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(m.get_submodule(owner), name, value)


class OwnMethods(FMoETransformerMLP):
    pass


LEFT: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("apart", lambda: make_mlp(apart=True), "experts: each has parameters of its own"),
    ("gate_hook", lambda: make_mlp(gate_hook=print), "gate_hook: set"),
    ("mask", lambda: make_mlp(mask=torch.zeros(3)), "mask: set"),
    ("mask_dict", lambda: make_mlp(mask_dict={}), "mask_dict: set"),
    ("world", changed(lambda m: other_part(m, "", world_size=2)), "world_size: expected 1, got 2"),
    ("slices", changed(lambda m: other_part(m, "", slice_size=2)), "slice_group"),
    ("subclass", changed(lambda m: setattr(m, "__class__", OwnMethods)), "own methods"),
    ("gate", as_gate(lineage.GShardGate, "DCGate"), "gate: expected one of NaiveGate, .* DCGate"),
    ("gate's code", as_gate(Squared), "outputs are off by"),
    ("gate fails", as_gate(Fails), r"its own forward fails: KeyError: 'no\\nmore'"),
    ("top_k", changed(lambda m: other_part(m, "gate", top_k=1)), r"all_gates.0.top_k: expected 2"),
    (
        "top_k of both",
        changed(lambda m: [other_part(m, p, top_k=1) for p in ("", "gate")]),
        "top_k",
    ),
    (
        "activation",
        changed(lambda m: other_part(m, "experts", activation=nn.Tanh())),
        "experts.activation: expected nn.GELU, .* got Tanh",
    ),
    (
        "shape",
        changed(lambda m: other_part(m, "experts.h4toh", bias=nn.Parameter(torch.ones(5, 3)))),
        r"experts.h4toh.bias: expected shape \(5, 16\), got \(5, 3\)",
    ),
    *(
        (
            f"no {name}",
            changed(lambda m, name=name: delattr(m.gate, name), gate),
            rf"all_gates.0.{name}: missing, which a {gate} has",
        )
        for gate, name in (
            ("GShardGate", "capacity"),
            ("GShardGate", "random_routing"),
            ("SwitchGate", "capacity"),
            ("SwitchGate", "switch_eps"),
            ("AddtionalNoisyGate", "noise_epsilon"),
        )
    ),
    ("no bias", changed(lambda m: other_part(m, "experts.htoh4", bias=None)), "htoh4.bias"),
    (
        "extra parameter",
        changed(lambda m: other_part(m, "gate", temperature=nn.Parameter(torch.ones(1)))),
        r"(gate|all_gates.0).temperature: an unexpected parameter",
    ),
    (
        "other router",
        changed(lambda m: m.all_gates.update({"1": lineage.NaiveGate(16, 5, 1)})),
        "all_gates.1: expected GShardGate, got NaiveGate",
    ),
    (
        "another gate",
        changed(lambda m: setattr(m, "gate", lineage.GShardGate(16, 5, 1))),
        "all_gates.0: not the gate itself",
    ),
    (
        "a list of gates",
        changed(lambda m: setattr(m, "all_gates", nn.ModuleList([m.gate]))),
        "all_gates: expected ModuleDict",
    ),
    (
        "dtypes",
        changed(lambda m: m.gate.double()),
        "parameters differ in dtype",
    ),
    ("hook inside", changed(lambda m: m.gate.register_forward_hook(print)), "gate: carries a hook"),
    ("mode inside", changed(lambda m: m.gate.eval()), "in eval mode while the layer is in train"),
    ("own forward", changed(lambda m: setattr(m.gate, "forward", print)), "gate.forward: replaced"),
    ("compiled", changed(lambda m: m.compile(backend="eager")), "swap first, then compile"),
    (
        "diverged",
        changed(lambda m: m.experts.h4toh.weight.data[:, 0, 0].fill_(float("nan"))),
        "not finite",
    ),
]


@pytest.mark.parametrize(("make", "message"), [pytest.param(m, r, id=i) for i, m, r in LEFT])
def test_leaves_alone(make: Callable[[], nn.Module], message: str) -> None:
    mlp, neighbour = make(), make_mlp(seed=3)
    model = nn.ModuleDict({"odd": mlp, "good": neighbour})
    before = [(name, id(p), p._version) for name, p in mlp.named_parameters()]
    report = swap(model)
    assert model["odd"] is mlp
    assert isinstance(model["good"], RoutedMLP)
    assert [(entry.name, entry.class_name) for entry in report.left] == [
        ("odd", type(mlp).__name__)
    ]
    assert re.search(message, report.left[0].reason), report.left[0].reason
    assert before == [(name, id(p), p._version) for name, p in mlp.named_parameters()]


Change = Callable[[Tensor], Tensor]
CHANGES: list[tuple[str, Change]] = [
    ("outputs are off", torch.zeros_like),
    ("outputs are off", lambda out: 1.001 * out),
    ("outputs are off", lambda out: out + 0.001),
    ("outputs are off", lambda out: out.flip(0)),
    ("outputs are off", lambda out: out * float("nan")),
    (r"expected an output \(\d+, 16\), got \(\d+, 15\)", lambda out: out[:, 1:]),
    ("the fast module fails: ZeroDivisionError", lambda out: out * (1 // 0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("message", "change"), CHANGES)
def test_a_wrong_module_is_caught(
    monkeypatch: pytest.MonkeyPatch, message: str, change: Change, dtype: torch.dtype
) -> None:
    right = RoutedMLP.forward
    monkeypatch.setattr(RoutedMLP, "forward", lambda self, *a: change(right(self, *a)))
    assert re.search(message, reason(swap(make_mlp().to(dtype))))


@every_gate
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(monkeypatch: pytest.MonkeyPatch, gate: str, dtype: torch.dtype) -> None:
    assert swap(make_mlp(gate).to(dtype)).left == ()
    monkeypatch.setattr(RoutedMLP, "forward", lambda self, x: torch.zeros_like(x))
    assert "outputs are off" in reason(swap(make_mlp(gate).to(dtype)))


@pytest.mark.parametrize("mode", [True, False])
def test_the_check_disturbs_nothing(monkeypatch: pytest.MonkeyPatch, mode: bool) -> None:
    mlp = make_mlp().train(mode)
    mlp.experts.activation.register_buffer("unused", None)
    out = mlp(draw(6, 16))
    kept = (mlp.gate.loss, mlp.last_topk_scores, list(mlp.gate.topk_logits), mlp.gate.capacity)
    parts_of = {name: (id(part), part.training) for name, part in mlp.named_modules()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with monkeypatch.context() as patch:
        patch.setattr(RoutedMLP, "forward", lambda self, x: torch.zeros_like(x))
        assert "outputs are off" in reason(swap(mlp))
    assert isinstance(swap(nn.Sequential(mlp)).model[0], RoutedMLP)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert mlp.gate.loss is kept[0]
    assert mlp.last_topk_scores is kept[1]
    assert all(a is b for a, b in zip(mlp.gate.topk_logits, kept[2], strict=True))
    assert mlp.gate.capacity == kept[3] == (1.2, 2.4)
    assert parts_of == {name: (id(part), part.training) for name, part in mlp.named_modules()}
    out.sum().backward()


def test_tokens_whose_choice_hangs_on_rounding_are_left_out() -> None:
    logits = torch.tensor(
        [[3.0, 2.0, 1.0], [3.0, 2.0, 2.0], [3.0, 1.0 + 1e-7, 1.0], [2.0, 2.0, 1.0]]
    )
    clear = swap_mlp._clear_choices
    assert clear(logits.double(), 2, torch.float32).tolist() == [True, False, False, True]
    assert clear(logits.double(), 2, torch.float64).tolist() == [True, False, True, True]
    assert clear(logits.double(), 3, torch.float32).all()
    mlp = make_mlp()
    with torch.no_grad():
        mlp.gate.gate.weight.zero_()
        mlp.gate.gate.bias.zero_()
    assert "hang on rounding" in reason(swap(mlp))


def test_one_large_token_leaves_the_others_in() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.9], [3e7, 2e7, 1e7], [3.0, 2.0, 2.0]])
    clear = swap_mlp._clear_choices(logits.double(), 2, torch.float32)
    assert clear.tolist() == [True, True, False]


def test_given_inputs_of_another_kind_are_a_reason() -> None:
    mlp = make_mlp()
    for inputs in ([], [draw(2, 15)], [draw(2, 16)] * 2):
        with pytest.raises(Disagreement, match=r"expected one \(\.\.\., 16\)"):
            swap_mlp.compare(mlp, describe(mlp), Case(inputs, None))


def test_fastmoe_s_own_modules_are_not_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There they end the process: their kernels take the addresses for the GPU's."""
    monkeypatch.setattr(lineage.FMoELinear, "__module__", "fmoe.linear")
    monkeypatch.setattr(FMoETransformerMLP, "forward", lambda *_: pytest.fail("was run"))
    assert "CUDA device only" in reason(swap(make_mlp()))
    assert isinstance(swap(make_mlp(), check=False).model, RoutedMLP)

    monkeypatch.setattr(fl.TransformerEncoderLayer, "__module__", "fmoe.transformer")
    monkeypatch.setattr(fl.InteractionMoE, "forward", lambda *_: pytest.fail("was run"))
    assert "CUDA device only" in reason(swap(make_layer()))


def test_no_layer_runs_fastmoe_s_own_code_on_given_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One such layer in the model, and the model is not run: the others are compared on random inputs."""
    model = Fusion()

    class Own(lineage.FMoELinear):
        def forward(self, *_: Any) -> Tensor:
            return pytest.fail("was run")

    Own.__module__ = "fmoe.linear"
    for part in ("htoh4", "h4toh"):
        getattr(model.network[1].mlp.experts, part).__class__ = Own
    monkeypatch.setattr(Fusion, "forward", lambda *_: pytest.fail("was run"))
    report = swap(model, inputs=(parts(),))
    assert [(entry.name, entry.inputs) for entry in report.swapped_mlps] == [
        ("network.0.mlp", "random")
    ]
    assert [entry.name for entry in report.left] == ["network.1.mlp"]
    assert "CUDA device only" in report.left[0].reason
