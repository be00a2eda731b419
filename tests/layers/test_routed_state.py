"""Tests of RoutedMLP's checkpoints: both FastMoE layouts, errors, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.support import lineage_sparse as lineage
from tests.support.inputs import draw
from tests.support.routed_layers import D, E, F, every_gate, make

STACKED = ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias")


def apart(state: dict[str, Tensor], routers: bool) -> dict[str, Tensor]:
    """Convert the layout with stacked parameters to the layout with separate parameters per expert."""
    found = {k: v for k, v in state.items() if not k.startswith("experts.")}
    for piece in STACKED:
        for e in range(E):
            found[f"experts.{e}.{piece}"] = state[f"experts.{piece}"][e : e + 1]
    return found if routers else {k: v for k, v in found.items() if not k.startswith("all_gates")}


@every_gate
@pytest.mark.parametrize("routers", [True, False])
def test_loads_both_layouts(gate: str, routers: bool) -> None:
    state = make(gate, seed=1).state_dict()
    for checkpoint in (state, apart(state, routers)):
        kept = dict(checkpoint)
        mlp = make(gate)
        model = nn.Sequential(nn.Identity(), mlp)
        model.load_state_dict({f"1.{key}": value for key, value in checkpoint.items()})
        assert checkpoint == kept
        assert all(torch.equal(value, state[key]) for key, value in mlp.state_dict().items())
        assert not torch.equal(mlp.experts.htoh4.weight, make(gate).experts.htoh4.weight)


def test_a_state_dict_goes_back_to_the_published_module() -> None:
    for gate in ("GShardGate", "AddtionalNoisyGate"):
        mlp, published = make(gate, n_router=2), lineage.make_mlp(gate, n_router=2)
        published.load_state_dict(mlp.state_dict())
        torch.testing.assert_close(published.state_dict(), mlp.state_dict(), rtol=0, atol=0)
        fastmoe = lineage.make_mlp("NaiveGate", apart=True)
        make("NaiveGate").load_state_dict(fastmoe.state_dict())


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(state)
    for key, value in changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


WRONG: list[tuple[str, bool, dict[str, Tensor | None], str]] = [
    ("missing", False, {"experts.htoh4.bias": None}, r'Missing.*"experts.htoh4.bias"'),
    ("unknown", False, {"experts.extra": torch.zeros(1)}, r'Unexpected.*"experts.extra"'),
    ("shape", False, {"experts.h4toh.bias": torch.zeros(E, 3)}, "mismatch for experts.h4toh.bias"),
    ("twin", False, {"all_gates.0.gate.bias": torch.ones(E)}, '"gate.gate.bias" and "all_gates.0.'),
    ("missing apart", True, {"experts.2.htoh4.bias": None}, r'Missing.*"experts.2.htoh4.bias"'),
    (
        "shape apart",
        True,
        {"experts.3.h4toh.weight": torch.zeros(D, F)},
        r"mismatch for experts.3.h4toh.weight: expected \(1, 16, 24\), got \(16, 24\)",
    ),
    ("both", True, {"experts.h4toh.bias": torch.zeros(E, D)}, r'Unexpected.*"experts.0.htoh4'),
]


@pytest.mark.parametrize(
    ("separate", "changes", "message"), [pytest.param(*row[1:], id=row[0]) for row in WRONG]
)
def test_wrong_checkpoints_are_named(
    separate: bool, changes: dict[str, Tensor | None], message: str
) -> None:
    state = make(seed=1).state_dict()
    state = changed(apart(state, routers=True) if separate else state, **changes)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        make().load_state_dict(state)


def test_a_partial_checkpoint_loads_if_allowed() -> None:
    """With separate experts, existing entries are loaded; missing ones keep their values and are reported."""
    state = apart(make(seed=1).state_dict(), routers=True)
    left = {"experts.2.htoh4.bias", *(f"experts.{e}.h4toh.weight" for e in range(E))}
    wanted = {key: value.double() for key, value in state.items() if key not in left}
    mlp, kept = make(), make().state_dict()
    found = mlp.load_state_dict(wanted | {"experts.5.htoh4.bias": torch.zeros(1, F)}, strict=False)
    assert sorted(found.missing_keys) == sorted(left)
    assert found.unexpected_keys == ["experts.5.htoh4.bias"]
    assert torch.equal(mlp.experts.h4toh.weight, kept["experts.h4toh.weight"])
    bias, before = mlp.experts.htoh4.bias, kept["experts.htoh4.bias"]
    assert torch.equal(bias[2], before[2])
    for e in (0, 1, 3, 4):
        assert torch.equal(bias[e : e + 1], state[f"experts.{e}.htoh4.bias"])
        assert not torch.equal(bias[e], before[e])
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.1\.h4toh\.bias"):
        make().load_state_dict(wanted | {"experts.1.h4toh.bias": torch.zeros(D)}, strict=False)


def test_copies_and_pickles_after_a_training_step() -> None:
    mlp, x = make(), draw(8, D)
    mlp.capture_topk_pre_mix = True
    out = mlp(x)
    assert mlp.gate.loss.grad_fn is not None
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    copies = [copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))]
    copies.append(torch.load(file, weights_only=False))
    for other in copies:
        assert other.gate is other.all_gates["0"]
        assert (other.last_topk_scores, other.last_topk_pre_mix, other.gate_loss()) == (None,) * 3
        torch.testing.assert_close(other(x), out)
        with torch.no_grad():
            other.experts.htoh4.weight.zero_()
        other.load_state_dict(apart(mlp.state_dict(), routers=False))
        torch.testing.assert_close(other(x), out)
    assert mlp.gate_loss() is not None, "the original keeps its loss"
    torch.testing.assert_close(mlp(x), out)
