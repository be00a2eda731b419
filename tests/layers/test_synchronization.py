"""Tests of training steps without a GPU: no synchronization, and torch.cuda.make_graphed_callables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flmoe_kernels import InteractionMoE, PairInteractionMoE
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation
from flmoe_kernels.core.triton.target import TARGETS
from flmoe_kernels.layers.interaction_moe import packing
from tests.support.layers import LayerCase
from tests.support.pair_layers import PairModel

META = torch.device("meta")
# Of no other test: layouts are kept between calls, and `no_reads` changes them.
BATCH = 11
FL = LayerCase((7, 5), dim=16, layers=2, dropout=0.5, masks="partial")
CASES = (
    FL,
    dataclasses.replace(FL, masks="mixed", lengths=(4, 2, 3)),
    LayerCase((4, 4), "i2moe", dim=16, layers=2, dropout=0.5),
    *(
        dataclasses.replace(FL, gate=gate, sparse=True)
        for gate in ("GShardGate", "SwitchGate", "NoisyGate")
    ),
)
COPIES = ("aten::_to_copy", "aten::copy_", "aten::lift_fresh_copy")
# Methods of a tensor that wait for a GPU.
READS = (
    *("item", "tolist", "cpu", "numpy", "nonzero", "unique"),
    *("__bool__", "__int__", "__float__", "__index__"),
)


class OnDeviceOnly(TorchDispatchMode):
    """Raise an error if an operator copies between devices. Operators that read data already fail on META."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # A scalar is passed by value to the kernel.
        there = {x.device.type for x in found if x.dim() or func._schema.name in COPIES}
        if len(there) > 1:
            raise AssertionError(f"{func} copies between {sorted(there)}")
        return out


def host_data(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("values of the host would be copied to the device")


@pytest.fixture
def no_host_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse lists that become tensors: on a device without data their copy is not visible."""
    for name in ("tensor", "as_tensor", "from_numpy", "asarray"):
        monkeypatch.setattr(torch, name, host_data)


@contextlib.contextmanager
def graphs_without_a_gpu() -> Iterator[None]:
    """make_graphed_callables calls the module as for a capture; replays compute nothing."""
    graph = SimpleNamespace(replay=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("graph", "stream"):
            patch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
        for name in ("CUDAGraph", "Stream", "synchronize"):
            patch.setattr(torch.cuda, name, lambda: graph)
        patch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
        yield


def sample_of(sizes: list[tuple[int, int]], device: torch.device) -> tuple[list[Tensor], ...]:
    """Inputs (B, L_m, D_m) and masks."""
    inputs = [torch.empty(BATCH, length, dim, device=device) for length, dim in sizes]
    return inputs, [torch.ones(x.shape[:2], dtype=torch.bool, device=device) for x in inputs]


def interaction_model(case: LayerCase, device: torch.device) -> tuple[nn.Module, tuple]:
    sample = sample_of([(length, case.dim) for length in case.lengths], device)
    layer = InteractionMoE.adopt(case.reference().to(device))
    return layer, sample[:1] if case.masks == "none" else sample


def pair_model(device: torch.device) -> tuple[nn.Module, tuple]:
    layer = PairInteractionMoE([6, 8, 4], num_classes=3, rank=4, value_dim=8, modality_dropout=0.2)
    return PairModel(layer).to(device), sample_of([(5, 6), (3, 8), (4, 4)], device)


MODELS = {"pairs": pair_model} | {
    str(case): functools.partial(interaction_model, case) for case in CASES
}


@pytest.mark.usefixtures("no_host_data")
@pytest.mark.parametrize("name", MODELS)
def test_make_graphed_callables_takes_the_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture waits for nothing, every output is a tensor, and every parameter has a gradient."""
    monkeypatch.setattr(backends, "choose", lambda *_args: backends.TRITON)
    model, sample = MODELS[name](META)
    with OnDeviceOnly(), graphs_without_a_gpu():
        graphed = torch.cuda.make_graphed_callables(model, sample)
        outputs = [x for x in tree_leaves(graphed(*sample)) if x.requires_grad]
        torch.stack([x.sum() for x in outputs]).sum().backward()
        assert all(p.grad is not None and p.grad.device == META for p in model.parameters())
        if isinstance(model, InteractionMoE):
            model.inference(*sample)
        # In the other mode the module's own forward runs, and the layer accepts the new attribute.
        tree_leaves(graphed.eval()(*sample))


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to read values of tensors, also of those on the CPU that stand for a GPU's."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the host would wait for the device")

    for name in READS:
        monkeypatch.setattr(Tensor, name, refuse)
    for module in (validation, packing):
        monkeypatch.setattr(module, "readable", lambda _value: False)


@pytest.mark.parametrize("name", MODELS)
def test_the_code_that_launches_kernels_reads_no_data(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Tensors without data do not reach this code. Launches are recorded, and kernels are not compiled."""
    recording = pytest.importorskip("flmoe_kernels.core.triton.recording")
    model, sample = MODELS[name](torch.device("cpu"))
    request.getfixturevalue("no_reads")
    with backends.use_backend(backends.TRITON), recording.recorded(TARGETS[90]) as kernels:
        outputs = [x for x in tree_leaves(model(*sample)) if x.requires_grad]
        torch.stack([x.sum() for x in outputs]).sum().backward()
    assert len(kernels) > 5
    with pytest.raises(AssertionError, match="would wait"):
        bool(outputs[0].sum() > 0)


@pytest.mark.usefixtures("no_host_data")
def test_the_checks_detect_copies_and_reads() -> None:
    """Negative control of the tests above."""
    x = torch.ones(3, device=META)
    with OnDeviceOnly():
        for read in (lambda: x.sum().item(), lambda: bool((x > 0).all()), x.tolist, x.nonzero):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
        with pytest.raises(AssertionError, match="copies between"):
            torch.ones(3).to(META)
        with pytest.raises(AssertionError, match="values of the host"):
            torch.tensor([1, 2], device=META)
        assert (torch.where(x > 0, x, 0.0) + 1).device == META
