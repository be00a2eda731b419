"""FLOP that torch's FlopCounterMode counts, against the plain references on tensors without padding."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from flmoe_kernels import expert_attention, pair_map, pair_moe, top_pairs
from flmoe_kernels.ops.encoder.api import expert_linear
from tests.support.attention_cases import Case
from tests.support.inputs import draw
from tests.support.layers import FL, I2, SPARSE_FL, LayerCase, data, fast_layer, named_outputs
from tests.support.pair_cases import MANY, PairCase
from tests.support.routed_cases import RoutedCase

OPS = torch.ops.flmoe


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def step(call: Callable[..., Any], inputs: Sequence[Tensor], wants: Sequence[bool]) -> int:
    """FLOP of a call and of the gradients of the wanted inputs."""
    leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wants, strict=True)]

    def run() -> None:
        out = call(*leaves)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        if any(wants):
            sum(x.sum() for x in outputs if x.requires_grad).backward()

    return counted(run)


# ---- registration ----


def without_formula() -> list[str]:
    names = {name.split("::")[1].split(".")[0] for name in registered()}
    assert len(names) > 20
    return sorted(name for name in names if getattr(OPS, name) not in flop_registry)


def registered() -> list[str]:
    return [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("flmoe::")]


def test_every_operator_has_a_formula() -> None:
    assert without_formula() == []
    with torch.library._scoped_library("flmoe", "FRAGMENT") as library:
        library.define("of_a_test(Tensor x) -> Tensor")
        assert without_formula() == ["of_a_test"]


def test_the_counter_may_be_imported_later() -> None:
    """The package does not import the counter, because that would import Triton."""
    code = """
import flmoe_kernels, sys
print("torch.utils.flop_counter" in sys.modules, "triton" in sys.modules)
import importlib, torch.utils.flop_counter as counter
for module in (counter, importlib.reload(counter)):
    print(len([op for op in module.flop_registry if str(op).startswith("flmoe.")]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded, *counts = result.stdout.splitlines()
    assert loaded == "False False"
    assert {*map(int, counts)} == {len({name.split(".")[0] for name in registered()})}


# ---- operators ----


def each_of(count: int) -> list[tuple[bool, ...]]:
    """No gradient, one gradient, all gradients."""
    single = [tuple(i == j for j in range(count)) for i in range(count)]
    return [(False,) * count, *single, (True,) * count]


ANY = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("wants", ANY)
def test_expert_linear(wants: tuple[bool, ...]) -> None:
    inputs = [draw(2, 5, 6), draw(2, 7, 6), draw(2, 7)]
    found = step(lambda *x: expert_linear(*x, "cpu"), inputs, wants)
    assert found == step(lambda x, w, b: torch.baddbmm(b[:, None], x, w.mT), inputs, wants) > 0


@pytest.mark.parametrize("wants", ANY)
def test_expert_attention(wants: tuple[bool, ...]) -> None:
    """The backward computes the scores again, as torch's fused attention does."""
    case = Case((5, 2, 0, 9), heads=2, width=6, groups=3, lead=1, tail=4)

    def call(backend: str) -> int:
        options: dict[str, Any] = {"cu_seqlens": case.cu_seqlens, "backend": backend}
        return step(lambda *x: expert_attention(*x, **options), case.qkv(torch.float32), wants)

    scores = 2 * 3 * 2 * 6 * (5**2 + 2**2 + 9**2)
    assert call("cpu") == call("reference") + scores * any(wants)


@pytest.mark.parametrize("reduce", ["none", "experts", "pool"])
@pytest.mark.parametrize("masks", ["none", "a", "b", "both", "sample"])
def test_pair_moe(reduce: str, masks: str) -> None:
    """The backward computes the logits again, and for the gradient of a the sums of synergy experts."""
    case = PairCase(7, 9, 4, 6, MANY, reduce, masks=masks, top_k=3)
    options = case.options()
    inputs = case.inputs(torch.float32)
    # The sum over rows of p c_j is no product of matrices. The reference computes it as one.
    same = dict.fromkeys(("unique_b", "redundancy"), "unique_a") if reduce == "pool" else {}
    plain = {"kinds": [same.get(kind, kind) for kind in MANY], "top_k": 3}

    def fast(*x: Tensor) -> tuple[Tensor, ...]:
        return pair_moe(*x[:4], gate_bias=x[4], reduce=reduce, backend="cpu", **options)

    def reference(*x: Tensor) -> tuple[Tensor, ...]:
        return pair_moe(*x[:4], gate_bias=x[4], reduce=reduce, backend="reference", **plain)

    for wants in each_of(5):
        expected = 0
        for b in range(case.batch):
            rows, columns = (
                torch.ones(length, dtype=torch.bool) if mask is None else mask[b]
                for mask, length in ((options["mask_a"], 7), (options["mask_b"], 9))
            )
            sides = zip(inputs[:4], (rows, columns) * 2, strict=True)
            sample = [x[b : b + 1, :, valid] for x, valid in sides]
            expected += step(reference, [*sample, inputs[4]], wants)
            again = 2 * 4 * len(MANY) * any(wants) + 2 * 6 * MANY.count("synergy") * wants[2]
            expected += again * int(rows.sum()) * int(columns.sum())
        assert step(fast, inputs, wants) == expected, wants


def test_scores_of_pairs() -> None:
    case = PairCase(7, 9, 4, 6, ("synergy", "null", "synergy"), masks="none", bias=False)
    inputs, head = case.inputs(torch.float32), draw(3, 6)
    options = {"kinds": case.kinds, "head": head}
    expected = counted(lambda: pair_map(*inputs, backend="reference", **options))
    assert expected == 2 * 7 * 9 * (3 * 2 * 4 + 2 * 2 * 6)
    assert counted(lambda: pair_map(*inputs, backend="cpu", **options)) == expected
    assert counted(lambda: top_pairs(*inputs, n_pairs=2, backend="cpu", **options)) == expected
    # What side b adds to all rows alike, and the reverse, is no product per pair.
    options["kinds"] = ("unique_a", "unique_b", "redundancy")
    assert counted(lambda: pair_map(*inputs, backend="cpu", **options)) == 2 * 7 * 9 * 3 * 2 * 4


@pytest.mark.parametrize("load", ["even", "dropped", "none"])
@pytest.mark.parametrize("wants", [*each_of(6), *each_of(8)])
def test_routed_mlp(load: str, wants: tuple[bool, ...]) -> None:
    """For the gradient of weight alone, the kernels compute the hidden gradient; the reference keeps its rows."""
    case = RoutedCase(11, load=load, gated=len(wants) == 8)
    index, inputs = case.index(), case.inputs(torch.float32)

    def call(backend: str) -> int:
        return step(partial(case.call, index=index, backend=backend), inputs, wants)

    product = 2 * 5 * 7 * int((index >= 0).sum())
    assert (product == 0) == (load == "none")
    only_weight = wants[1] and sum(wants) == 1
    assert call("cpu") == call("reference") + product * only_weight


# ---- layers ----

MASKED = dataclasses.replace(FL, masks="partial", layers=2)
LAYERS = (
    MASKED,
    I2,
    dataclasses.replace(SPARSE_FL, layers=2, masks="partial", capacity=8.0),
)


def loss_of(layer: nn.Module, *call: Any) -> Tensor:
    x, masks, noise = call
    outputs = named_outputs(layer(x, masks, replacements=noise))
    return torch.stack([out.sum() for out in outputs.values()]).sum()


def samples_of(case: LayerCase) -> list[tuple]:
    """The samples of a call alone, without padding."""
    x, masks, noise = data(case)
    found = []
    for b in range(case.batch):
        keep = [
            torch.ones(length, dtype=torch.bool)
            if masks is None or masks[m] is None
            else masks[m][b]
            for m, length in enumerate(case.lengths)
        ]
        of = [x[m][b : b + 1, valid] for m, valid in enumerate(keep)]
        mine = [[each[m][b : b + 1, valid] for m, valid in enumerate(keep)] for each in noise]
        found.append((of, None, mine))
    return found


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer(case: LayerCase) -> None:
    """The kernels save and repeat some products of the reference, and both are counted."""
    layer = fast_layer(case)
    call, views = data(case), len(case.lengths) + 1
    # Routed rows depend on the whole batch. Capacity is per call, so samples alone would drop other rows.
    parts = [call] if case.gate and call[1] is None else samples_of(case)
    training = counted(lambda: loss_of(layer, *call).backward())
    inference = counted(lambda: layer.inference(*call[:2]))
    layer.backend = "reference"
    expected = sum(counted(lambda part=part: loss_of(layer, *part).backward()) for part in parts)
    lengths = [sum(x.shape[1] for x in part[0]) for part in parts for _ in range(len(part[0][0]))]
    # The first queries, keys and values are computed for the tokens and for the noise, not in every view.
    expected -= 3 * 6 * case.dim**2 * case.experts * (views - 2) * sum(lengths)
    # The backward of attention computes the scores again.
    problems = case.layers * case.experts * views
    expected += 2 * case.dim * problems * sum(n * n for n in lengths)
    # The mixture is a batched product, in the reference a sum.
    mixture = 2 * case.batch * case.experts * case.classes
    assert training == expected + 3 * mixture
    alone = sum(counted(lambda part=part: layer.inference(*part[:2])) for part in parts)
    assert inference == alone + mixture
