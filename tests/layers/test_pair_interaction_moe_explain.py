"""Tests of explain() against brute force over all coalitions, shapiq, and identities."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from flmoe_kernels.explain.estimators.interactions import shapley_interactions
from flmoe_kernels.ops.pair_moe.api import TopPairs
from tests.support.explain_games import index_of
from tests.support.inputs import draw_masks
from tests.support.pair_games import (
    GAMES,
    explained_pairs,
    explained_values,
    game,
)
from tests.support.pair_layers import BACKENDS, DIMS, pair_inputs, pair_layer

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
TIGHT = {"rtol": 0.0, "atol": 1e-12}


@EACH_BACKEND
@pytest.mark.parametrize("name", GAMES)
def test_brute_force_over_all_coalitions(name: str, backend: str) -> None:
    played = game(name, backend)
    found = played.explain()
    n = played.players
    values = torch.stack([index_of(played.values, n, "SII", (i,)) for i in range(n)])
    torch.testing.assert_close(explained_values(found), values, **TIGHT)
    pairs = explained_pairs(found)
    for i, j in itertools.combinations(range(n), 2):
        expected = index_of(played.values, n, "SII", (i, j))
        torch.testing.assert_close(pairs[i, j], expected, **TIGHT)
        torch.testing.assert_close(pairs[j, i], expected, **TIGHT)
    torch.testing.assert_close(found.value[0], played.values[-1, -1], **TIGHT)
    torch.testing.assert_close(found.baseline[0], played.values[0, -1], **TIGHT)
    torch.testing.assert_close(found.expert_baseline[0], played.values[0, :-1], **TIGHT)
    assert float(values.abs().max()) > 0.01, "a game of zeros would pass"
    assert float(pairs.abs().max()) > 0.01


def test_shapiqs_exact_computer() -> None:
    shapiq = pytest.importorskip("shapiq")
    played = game("masked", "cpu")
    n = played.players
    whole = played.values[:, -1].numpy()
    bits = 2 ** torch.arange(n).numpy()
    computer = shapiq.ExactComputer(lambda coalitions: whole[coalitions @ bits], n_players=n)
    found = played.explain()
    values = computer("SV", order=1)
    for i, mine in enumerate(explained_values(found)[:, -1].tolist()):
        assert mine == pytest.approx(values[(i,)], abs=1e-6)
    pairs, indices = explained_pairs(found)[:, :, -1], computer("SII", order=2)
    for i, j in itertools.combinations(range(n), 2):
        assert float(pairs[i, j]) == pytest.approx(indices[(i, j)], abs=1e-6)


@EACH_BACKEND
def test_identities_of_a_batch(backend: str) -> None:
    """Efficiency, additivity over experts and sums of maps, at sizes too large for brute force and with masks."""
    lengths = (13, 7, 5)
    layer = pair_layer(DIMS, backend=backend, rank=8, value_dim=16)
    x, masks = pair_inputs(lengths, batch=3), draw_masks("partial", 3, lengths)
    found = layer.explain(x, masks)
    out = layer(x, masks)
    assert torch.equal(found.target, out.logits.argmax(dim=1))
    torch.testing.assert_close(found.logits, out.logits)
    torch.testing.assert_close(found.value, out.logits.max(dim=1).values)
    nothing = [torch.zeros(3, length, dtype=torch.bool) for length in lengths]
    at_target = found.target[:, None]
    torch.testing.assert_close(found.baseline, layer(x, nothing).logits.gather(1, at_target)[:, 0])
    values = found.shapley_values()
    total = torch.stack([each.sum(dim=1) for each in values]).sum(dim=0)
    torch.testing.assert_close(total, found.value - found.baseline)
    by_expert = [found.shapley_values(name) for name in found.experts]
    for m, each in enumerate(values):
        torch.testing.assert_close(torch.stack([e[m] for e in by_expert]).sum(dim=0), each)
        assert (each[~masks[m]] == 0).all()
        expected = found.anchor_map(m).sum(dim=1)
        for n in set(range(3)) - {m}:
            expected = expected + found.pair_map(m, n).sum(dim=(1, 3)) / 2
        torch.testing.assert_close(each, expected)
    sums = torch.stack([sum(part.sum(dim=1) for part in e) for e in by_expert], dim=1)
    torch.testing.assert_close(sums, found.expert_values())
    for e, name in enumerate(found.experts):
        for mine, other in zip(found.shapley_values(e), found.shapley_values(name), strict=True):
            assert torch.equal(mine, other)


@EACH_BACKEND
def test_maps_of_absent_experts_are_zero(backend: str) -> None:
    layer = pair_layer(DIMS, backend=backend)
    found = layer.explain(pair_inputs((3, 2, 2)))
    assert found.pair_map(2, 0).shape == (2, 5, 2, 3)
    torch.testing.assert_close(found.pair_map(2, 0), found.pair_map(0, 2).mT)
    for m, n in itertools.combinations(range(3), 2):
        nonzero = (found.pair_map(m, n) != 0).any(dim=3).any(dim=2).any(dim=0)
        absent = ({0, 1, 2} - {m, n}).pop()
        assert nonzero.tolist() == [e != absent for e in range(5)]
        assert (found.top_pairs(2, m, n).i[:, absent] == -1).all()
        assert (found.top_pairs(2, m, n).values[:, absent] == -torch.inf).all()


@EACH_BACKEND
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize(("m", "n"), [(0, 1), (2, 0)])
def test_top_pairs_are_the_extremes_of_the_map(m: int, n: int, largest: bool, backend: str) -> None:
    lengths = (9, 7, 5)
    layer = pair_layer(DIMS, backend=backend)
    x, masks = pair_inputs(lengths), draw_masks("partial", 2, lengths)
    found = layer.explain(x, masks)
    phi = found.pair_map(m, n)
    valid = masks[m][:, :, None] & masks[n][:, None, :]
    count = 40  # more than the valid pairs of some samples
    assert int(valid.sum(dim=(1, 2)).min()) < count
    whole = torch.cat([phi, phi.sum(dim=1, keepdim=True)], dim=1)
    worst = -torch.inf if largest else torch.inf
    flat = whole.masked_fill(~valid[:, None], worst).flatten(2)
    want = flat.sort(dim=2, descending=largest).values[..., :count]
    top = found.top_pairs(count, m, n, largest=largest)
    assert isinstance(top, TopPairs)
    present = [e for e in range(5) if found.experts[e] not in {f"unique_{3 - m - n}"}]
    [absent] = set(range(5)) - set(present)
    assert (top.values[:, absent] == worst).all()
    assert (top.i[:, absent] == -1).all()
    torch.testing.assert_close(top.values[:, present], want[:, present])
    torch.testing.assert_close(top.total_values, want[:, -1])
    for values, i, j, maps in (
        (top.total_values, top.total_i, top.total_j, whole[:, -1]),
        (top.values[:, -1], top.i[:, -1], top.j[:, -1], phi[:, -1]),
    ):
        for b in range(2):
            real = i[b] >= 0
            assert int(real.sum()) == min(int(valid[b].sum()), count)
            assert valid[b][i[b][real], j[b][real]].all(), "anchors and padding are excluded"
            torch.testing.assert_close(maps[b][i[b][real], j[b][real]], values[b][real])


@EACH_BACKEND
def test_expert_share(backend: str) -> None:
    layer, x = pair_layer(DIMS, backend=backend), pair_inputs((3, 2, 2))
    found, out = layer.explain(x, target=1), layer(x)
    parts = out.expert_logits[:, :, 1] - out.expert_logits.mean(dim=2)
    expected = parts.abs() / parts.abs().sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.expert_share(), expected)
    torch.testing.assert_close(found.expert_share().sum(dim=1), torch.ones(2, dtype=x[0].dtype))
    # Adding a constant to all classes changes neither the softmax nor the shares.
    with torch.no_grad():
        layer.head[3] += 0.5
    torch.testing.assert_close(layer.explain(x, target=1).expert_share(), expected)
    one = pair_layer(num_classes=1, kinds=("synergy", "null"), backend=backend)
    assert (one.explain(x[:2]).expert_share()[:, 0] == 1).all()
    silent = pair_layer(kinds=("null",), backend=backend).explain(x[:2])
    assert (silent.expert_share() == 0).all()
    assert torch.equal(silent.value, silent.baseline)


@EACH_BACKEND
def test_targets(backend: str) -> None:
    layer, x = pair_layer(backend=backend), pair_inputs((3, 2))
    mixed = layer.explain(x, target=torch.tensor([2, 0]))
    assert mixed.target.tolist() == [2, 0]
    for b, target in enumerate([2, 0]):
        single = layer.explain(x, target=target)
        torch.testing.assert_close(single.value[b], mixed.value[b])
        torch.testing.assert_close(single.pair_map()[b], mixed.pair_map()[b])
        for one, both in zip(single.shapley_values(), mixed.shapley_values(), strict=True):
            torch.testing.assert_close(one[b], both[b])


@EACH_BACKEND
def test_a_missing_modality(backend: str) -> None:
    layer, x = pair_layer(DIMS, backend=backend), pair_inputs((3, 2, 2))
    absent = layer.explain([x[0], None, x[2]])
    masked = layer.explain(x, [None, torch.zeros(2, 2, dtype=torch.bool), None])
    assert absent.lengths == (3, 0, 2)
    for m in (0, 2):
        torch.testing.assert_close(absent.shapley_values()[m], masked.shapley_values()[m])
    assert absent.shapley_values()[1].shape == (2, 0)
    assert (masked.shapley_values()[1] == 0).all()
    assert absent.pair_map(0, 1).shape == (2, 5, 3, 0)
    assert (absent.top_pairs(2, 0, 1).total_i == -1).all()
    torch.testing.assert_close(absent.expert_share(), masked.expert_share())


def test_an_explanation_is_detached_from_training() -> None:
    """It has no graph, and a later optimizer step does not change it."""
    layer, x = pair_layer(), [each.requires_grad_() for each in pair_inputs((3, 2))]
    found = layer.explain(x)
    tensors = [found.value, found.baseline, *found.shapley_values(), found.pair_map()]
    tensors += [found.top_pairs(2).values, found.expert_share(), found.anchor_map(0)]
    assert not any(each.requires_grad for each in tensors)
    before = found.pair_map()
    layer(x).logits.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert torch.equal(found.pair_map(), before)
    assert not torch.equal(layer.explain(x, target=found.target).pair_map(), before)


def test_it_does_not_change_with_the_callers_tensors() -> None:
    layer, x = pair_layer(DIMS), pair_inputs((3, 2, 2))
    masks = [torch.ones(2, each.shape[1], dtype=torch.bool) for each in x]
    target = torch.tensor([2, 0])
    found, again = (layer.explain(x, masks, target.clone()) for _ in range(2))
    mine = layer.explain(x, masks, target)
    for each in (*x, *masks, target):
        each.zero_()
    # Changes of returned tensors do not change it either.
    for each in (*found.shapley_values(), found.anchor_map(0)):
        each.fill_(7.0)
    found.pair_map().fill_(7.0)
    for other in (found, mine):
        assert other.to_dict() == again.to_dict()
        for m in range(3):
            assert torch.equal(other.anchor_map(m), again.anchor_map(m))
        assert torch.equal(other.pair_map(0, 2), again.pair_map(0, 2))
        assert torch.equal(other.top_pairs(3).total_values, again.top_pairs(3).total_values)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_identities_hold_in_half_precision(dtype: torch.dtype, backend: str) -> None:
    lengths = (40, 30, 20)
    layer = pair_layer(DIMS, dtype, backend=backend, rank=8, value_dim=16, normalizer=30.0)
    x, masks = pair_inputs(lengths, dtype=dtype), draw_masks("partial", 2, lengths)
    found = layer.explain(x, masks)
    values = found.shapley_values()
    total = torch.stack([each.sum(dim=1) for each in values]).sum(dim=0)
    assert float(found.value.abs().max()) > 1
    assert found.value.dtype == values[0].dtype == found.pair_map().dtype == torch.float32
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(total, found.value - found.baseline, **close)
    for m, each in enumerate(values):
        expected = found.anchor_map(m).sum(dim=1)
        for n in set(range(3)) - {m}:
            expected = expected + found.pair_map(m, n).sum(dim=(1, 3)) / 2
        torch.testing.assert_close(each, expected, **close)
    # The logits of forward are the same values, rounded.
    torch.testing.assert_close(
        layer(x, masks).logits, found.logits, rtol=0.02, atol=0.3, check_dtype=False
    )


@EACH_BACKEND
def test_autocast_changes_nothing(backend: str) -> None:
    layer = pair_layer(dtype=torch.float32, backend=backend)
    x = pair_inputs((5, 7), dtype=torch.float32)

    def explained() -> list[torch.Tensor]:
        found = layer.explain(x, target=1)
        [exact, _] = shapley_interactions(layer, x, target=1)
        return [found.pair_map(), found.top_pairs(3).values, torch.from_numpy(exact.values)]

    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = explained()
    for expected, values in zip(explained(), under_autocast, strict=True):
        assert torch.equal(values, expected)


def test_the_table_of_an_explanation() -> None:
    found = pair_layer(DIMS).explain(pair_inputs((3, 2, 1)))
    table = json.loads(json.dumps(found.to_dict()))
    assert table["experts"] == list(found.experts)
    assert table["tokens_per_modality"] == [3, 2, 1]
    assert table["value"] == found.value.tolist()
    assert [len(values[0]) for values in table["shapley_values"]] == [3, 2, 1]


def test_mistakes() -> None:
    layer, x = pair_layer(), pair_inputs((3, 2))
    for target, error, message in (
        (3, ValueError, r"target: expected an int from 0 to 2, got 3"),
        (True, TypeError, r"target: expected an int, got bool"),
        ([True, False], TypeError, r"target: expected integers, got torch\.bool"),
        (torch.tensor([0, 1, 2]), ValueError, r"target: expected shape \(2,\), got \(3,\)"),
        (torch.tensor([0, 3]), ValueError, r"target: expected values from 0 to 2, got 0 to 3"),
    ):
        with pytest.raises(error, match=message):
            layer.explain(x, target=target)
    headless = pair_layer(num_classes=None, token_outputs=True)
    with pytest.raises(ValueError, match=r"explain: expected a layer with classes"):
        headless.explain(x)
    found = layer.explain(x)
    for call, message in (
        (lambda: found.shapley_values("xor"), r"expert: expected one of unique_0.*got 'xor'"),
        (lambda: found.pair_map(0, 2), r"n: expected an int from 0 to 1, got 2"),
        (lambda: found.pair_map(1, 1), r"n: expected a modality other than m = 1"),
        (lambda: found.top_pairs(0), r"n_pairs: expected an int from 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_without_finite_logits_are_refused(value: float) -> None:
    layer, x = pair_layer(), pair_inputs((3, 2))
    x[1][1, 0, 0] = value
    with pytest.raises(ValueError, match=r"inputs: expected valid tokens .*, got nan in sample 1"):
        layer.explain(x)
    masks = [None, torch.tensor([[True, True], [False, True]])]
    assert layer.explain(x, masks).value.isfinite().all()


def test_top_pairs_of_a_huge_number_and_near_ties() -> None:
    layer, x = pair_layer(DIMS), pair_inputs((4, 3, 2))
    found = layer.explain(x)
    every = found.top_pairs(12)
    assert all(map(torch.equal, found.top_pairs(10**9), every))
    assert not every.near_ties.any(), "nothing is left out"
    # Equal tokens: every choice among their pairs is one among ties.
    x[0][:] = x[0][:, :1]
    some = layer.explain(x).top_pairs(2, 0, 1)
    assert some.total_near_ties.all()
    absent = found.experts.index("unique_2")
    assert not some.near_ties[:, absent].any(), (
        "an expert that the pair of modalities does not have"
    )
