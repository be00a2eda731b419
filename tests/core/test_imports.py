"""Tests of the import in a new process: dependencies and side effects."""

from __future__ import annotations

from pathlib import Path

from tests.support.programs import output_of

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("triton", "rich", "typer", "sklearn", "matplotlib", "safetensors", "scipy")
# The tests that bench/gpu.sh runs.
GPU_TESTS = ("tests/gpu", "tests/core/test_cuda_device.py", "tests/ops/test_routing_cuda.py")
# Finders skip these names, as if the modules were not installed.
HIDE = """
import sys
def hide(finder):
    class Hiding:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name in {names!r} or name.partition(".")[0] in {names!r}:
                return None
            return finder.find_spec(name, path, target)
    return Hiding
sys.meta_path[:] = map(hide, sys.meta_path)
"""
USE = """
import torch, flmoe_kernels
from flmoe_kernels import FusionTransformer, InteractionMoE
layer = InteractionMoE(2, FusionTransformer(2, 8, 3, 1, 2), hidden_dim=8)
x = [torch.randn(2, 3, 8), torch.randn(2, 4, 8)]
layer(x)[2].sum().backward()
"""


def run(code: str, *names: str) -> str:
    """Standard output of a program in which modules with these names cannot be imported."""
    return output_of(HIDE.format(names=names) + code)


def test_works_without_any_optional_package() -> None:
    code = f"""
{USE}
import flmoe_kernels.profile.profiles  # its clocks are in the package of the pytest plugin
loaded = [name for name in {OPTIONAL!r} if name in sys.modules]
print(loaded, flmoe_kernels.available_backends())
"""
    assert run(code, *OPTIONAL, "pytest").split("\n")[0] == "[] ('reference', 'cpu')"


def test_hidden_packages_are_hidden() -> None:
    code = """
try:
    import typer
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code, "typer") == "No module named 'typer'"
    assert run(code) == ""


def test_works_without_the_native_module() -> None:
    code = f"""
{USE}
print(flmoe_kernels.available_backends())
with flmoe_kernels.use_backend("cpu"):
    try:
        layer(x)
    except flmoe_kernels.BackendUnavailable as error:
        print(error)
"""
    backends, reason = run(code, "flmoe_kernels._native").split("\n")
    assert backends == "('reference',)"
    assert reason.startswith("interaction_moe: backend 'cpu' was requested, but the native module")
    assert "is not built or cannot be loaded (No module named 'flmoe_kernels._native'" in reason


def test_import_starts_no_threads_touches_no_gpu_and_loads_no_tool() -> None:
    code = """
import os, threading, torch
def threads():
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else threading.active_count()
before, seeds = threads(), torch.get_rng_state()
settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
def refuse(*args):
    raise AssertionError("the import touched CUDA")
torch.cuda.init = torch.cuda._lazy_init = torch.cuda.is_available = refuse
import flmoe_kernels
print(threads() - before, torch.cuda.is_initialized(), torch.equal(torch.get_rng_state(), seeds))
print(settings == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()))
parts = ("cli", "core.error_budget", "explain", "profile")
print(*[part for part in parts if f"flmoe_kernels.{part}" in sys.modules])
"""
    assert run(code).split() == ["0", "False", "True", "True"]


def test_gpu_tests_need_only_pytest_torch_and_triton() -> None:
    """Development tools may be missing on the machine that runs the GPU tests."""
    code = f"""
import os, pytest, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
os.chdir({str(ROOT)!r})
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *{GPU_TESTS!r}]))
"""
    collected = run(code, "hypothesis", "xdist", "pytest_benchmark", "yaml", *OPTIONAL[1:])
    assert all(name in collected for name in GPU_TESTS)
