"""Tests of the self-check before the first use of GPU kernels, on a stand-in GPU."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flmoe_kernels import use_backend
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.backend import CAPABILITIES, BackendWarning, choose
from flmoe_kernels.core.dtypes import HALVES_AND_FLOAT32
from flmoe_kernels.ops.encoder import cpu as encoder
from flmoe_kernels.ops.expert_attention import cpu as expert_attention
from flmoe_kernels.ops.interaction_losses import cpu as interaction_losses
from flmoe_kernels.ops.pair_moe import cpu as pair_moe
from flmoe_kernels.ops.routed_mlp import cpu as routed_mlp
from flmoe_kernels.ops.routing import cpu as routing
from flmoe_kernels.profile import first_use
from tests.support.programs import output_of
from tests.support.stand_in_gpu import new_process, on_cuda, stand_in

CPU = torch.device("cpu")
KERNELS = [
    ("expert_attention", expert_attention, "forward"),
    ("expert_attention", expert_attention, "backward"),
    ("interaction_moe", encoder, "linear"),
    ("interaction_moe", encoder, "norm_backward"),
    ("interaction_moe", interaction_losses, "losses"),
    ("pair_moe", pair_moe, "forward"),
    ("pair_moe", pair_moe, "backward"),
    ("pair_moe", interaction_losses, "losses_backward"),
    ("routed_mlp", routed_mlp, "forward"),
    ("routed_mlp", routed_mlp, "backward"),
    ("routing", routing, "gate"),
]


class Check:
    """A check that counts its calls, with answers by backend: a reason, "" or an error."""

    def __init__(self, **answers: str | Exception) -> None:
        self.answers, self.calls = answers, 0

    def __call__(self, op: str, backend: str, dtype: torch.dtype, device: torch.device) -> str:
        self.calls += 1
        answer = self.answers.get(backend, "")
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Start a stand-in GPU, whose kernels nothing is known about, with this check."""

    def begin(check: Any) -> Any:
        stand_in(monkeypatch, check, tmp_path)
        return check

    return begin


def chosen(op: str, tensor: Any = None, backend: str | None = None) -> tuple[str, list[str]]:
    """The backend and the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = choose(op, on_cuda() if tensor is None else tensor, backend)
    return name, [str(w.message) for w in caught if w.category is BackendWarning]


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT32, ids=str)
@pytest.mark.parametrize("op", CAPABILITIES)
def test_correct_kernels_pass(op: str, dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert first_use.failure(op, "cpu", dtype, CPU) == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("op", "module", "name", "error"),
    [*((*kernel, False) for kernel in KERNELS), (*KERNELS[0], True)],
)
def test_wrong_kernels_are_not_used(
    op: str,
    module: Any,
    name: str,
    error: bool,
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU's kernels in place of a GPU's."""
    right = getattr(module, name)

    @functools.wraps(right)
    def planted(*args: Any, **kwargs: Any) -> Any:
        if error:
            raise RuntimeError("an illegal memory access was encountered")
        results = right(*args, **kwargs)
        listed = [results] if isinstance(results, Tensor) else results or args[0]
        next(x for x in listed if x.is_floating_point() and x.numel()).mul_(1.1)
        return results

    monkeypatch.setattr(module, name, planted)
    monkeypatch.setattr(backends, "_ON_CUDA", ("triton",))
    start(lambda op, _backend, dtype, _device: first_use.failure(op, "cpu", dtype, CPU))
    with torch.no_grad(), torch.autocast("cpu"):  # no effect on the check
        name, messages = chosen(op)
        assert (name, len(messages)) == ("reference", 1)
        assert chosen(op) == ("reference", [])
    why = "RuntimeError: an illegal memory access" if error else "cpu on .* above the budget"
    assert re.search(rf"^{op} triton float32: these kernels failed .*{why}.* report", messages[0])


def test_the_next_backend_is_used(start: Callable[..., Any]) -> None:
    check = start(Check(cuda="it is wrong"))
    name, messages = chosen("routing")
    assert (name, len(messages)) == ("triton", 1)
    assert "it is wrong. Please report this line" in messages[0]
    assert "Stand-in GPU" in messages[0]
    assert chosen("routing") == ("triton", [])
    assert check.calls == 2
    chosen("routing", on_cuda(torch.bfloat16))
    assert check.calls == 4, "each dtype has its own check"


def test_requests_and_other_devices_are_not_checked(start: Callable[..., Any]) -> None:
    check = start(Check(triton="it is wrong"))
    assert chosen("pair_moe", backend="triton") == ("triton", [])
    with use_backend("triton"):
        assert chosen("pair_moe") == ("triton", [])
    assert chosen("pair_moe", torch.zeros(1)) == ("cpu", [])
    assert check.calls == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("of a hook")])
def test_kernels_that_cannot_be_checked_are_used(
    error: Exception, start: Callable[..., Any], tmp_path: Path
) -> None:
    check = start(Check(triton=error))
    name, messages = chosen("pair_moe")
    assert (name, len(messages)) == ("triton", 1)
    assert (
        f"used without the self-check, which could not run: {type(error).__name__}" in messages[0]
    )
    assert chosen("pair_moe") == ("triton", [])
    assert check.calls == 1
    assert not list(tmp_path.rglob("*.json"))


PROGRAM = """
import os, pytest
from flmoe_kernels.core.backend import choose
from tests.support.stand_in_gpu import on_cuda, stand_in

def check(op, backend, dtype, device):
    print("checked", backend)
    return "it is wrong" if backend == "cuda" else ""

stand_in(pytest.MonkeyPatch(), check, os.environ["XDG_CACHE_HOME"])
print(choose("routing", on_cuda()))
"""


def test_a_new_process_reads_the_results(tmp_path: Path) -> None:
    outputs = [output_of(PROGRAM, XDG_CACHE_HOME=str(tmp_path)).split("\n") for _ in range(2)]
    assert outputs == [["checked cuda", "checked triton", "triton"], ["triton"]]


def damaged(content: dict[str, Any]) -> list[bytes]:
    other = content | {"environment": content["environment"] | {"torch": "0"}}
    numbers = content | {"results": dict.fromkeys(content["results"], 1)}
    plain = [[], {}, 1, other, numbers, content | {"results": []}]
    return [b"", b"{", b"\xff", *(json.dumps(x).encode() for x in plain)]


def test_a_damaged_file_means_that_the_kernels_are_checked_again(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start(Check())
    chosen("pair_moe")
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_bytes())
    assert content["results"] == {"pair_moe triton float32": ""}
    for data in damaged(content):
        file.write_bytes(data)
        check = Check()
        new_process(monkeypatch, check)
        assert chosen("pair_moe") == ("triton", [])
        assert check.calls == 1
        assert json.loads(file.read_bytes()) == content, data
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("not a folder")
    new_process(monkeypatch, check)
    assert chosen("pair_moe") == ("triton", [])


def in_a_trace(_monkeypatch: pytest.MonkeyPatch) -> str:
    def traced(x: Tensor) -> Tensor:
        return 2 * x if choose("pair_moe", x) == "reference" else x

    with FakeTensorMode():
        x = torch.ones(2, device="cuda")
    torch.compiler.reset()
    graph = torch._dynamo.export(traced)(x).graph_module.code
    return "reference" if "2 *" in graph else "triton"


def on_a_fake_tensor(_monkeypatch: pytest.MonkeyPatch) -> str:
    with FakeTensorMode():
        return choose("pair_moe", torch.ones(2, device="cuda"))


@pytest.mark.parametrize("call", [in_a_trace, on_a_fake_tensor])
def test_recorded_results_count_where_no_check_can_run(
    call: Callable[..., str], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = start(Check(triton="it is wrong"))
    assert call(monkeypatch) == "triton"
    assert check.calls == 0
    assert chosen("pair_moe")[0] == "reference"
    new_process(monkeypatch, check)
    with pytest.warns(BackendWarning, match="it is wrong"):
        assert call(monkeypatch) == "reference"
    assert check.calls == 1
