"""The README's table of operators, backends and dtypes against what the code does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flmoe_kernels as fk
from flmoe_kernels.core.backend import BACKENDS, CAPABILITIES, backend_status
from flmoe_kernels.ops.routed_mlp.api import gate

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table() -> dict[str, dict[str, tuple[str, ...]]]:
    """operator -> backend -> dtype names, from the README."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| operator |"))
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        operator, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[operator] = {
            column: tuple(name.strip() for name in cell.split(",") if name.strip() != "-")
            for column, cell in zip(columns, cells, strict=True)
        }
    return rows


CELLS = [
    (operator, backend, dtype)
    for operator, row in table().items()
    for backend, dtypes in row.items()
    for dtype in dtypes
]


def call(operator: str, backend: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    if operator == "expert_attention":
        q = torch.ones(3, 1, 4, dtype=dtype)
        runs = torch.tensor([0, 1, 3], dtype=torch.int32)
        return fk.expert_attention(q, q, q, runs, backend=backend)
    if operator == "interaction_moe":
        fusion = fk.FusionTransformer(2, 8, 3, num_layers=1, num_heads=2)
        layer = fk.InteractionMoE(2, fusion, hidden_dim=8, hidden_dim_rw=4, backend=backend)
        inputs = [torch.ones(2, n, 8, dtype=dtype) for n in (3, 2)]
        return layer.to(dtype).eval().inference(inputs)[2]
    if operator == "pair_moe":
        q = torch.ones(1, 2, 3, 4, dtype=dtype)
        return fk.pair_moe(q, q, q, q, kinds=("synergy", "null"), backend=backend).y
    if operator == "routing":
        logits = torch.ones(3, 4, dtype=dtype, device=device)
        return gate(logits, 2, backend=backend).weight
    if operator == "routed_mlp":
        x, weights = torch.ones(3, 4, dtype=dtype), torch.ones(2, 4, 4, dtype=dtype)
        index, biases = torch.tensor([[0], [1], [-1]]), weights[:, 0]
        return fk.routed_mlp(x, index, x[:, :1], weights, biases, weights, biases, backend=backend)
    raise AssertionError(f"no call is known for {operator}")


def test_table_is_the_capability_table() -> None:
    expected = {
        operator: {
            backend: tuple(str(d).removeprefix("torch.") for d in row.get(backend, ()))
            for backend in BACKENDS
        }
        for operator, row in CAPABILITIES.items()
    }
    assert table() == expected


@pytest.mark.parametrize(("operator", "backend", "dtype"), CELLS)
def test_every_cell_runs(operator: str, backend: str, dtype: str) -> None:
    if backend == "triton":
        run_interpreted(operator, dtype)
        return
    runs, reason = backend_status()[backend]
    if backend == "cuda" and not runs:
        pytest.skip(f"the kernels do not run here: {reason}")
    out = call(operator, backend, getattr(torch, dtype), "cuda" if backend == "cuda" else "cpu")
    assert out.dtype == getattr(torch, dtype)
    assert torch.isfinite(out).all()


def run_interpreted(operator: str, dtype: str) -> None:
    """The same on Triton's interpreter, which is chosen for a whole process."""
    pytest.importorskip("triton")
    code = f"""
import torch, test_readme
out = test_readme.call({operator!r}, "triton", torch.{dtype})
assert out.dtype == torch.{dtype} and torch.isfinite(out).all(), out
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


DASHES = [(op, name) for op, row in CAPABILITIES.items() for name in BACKENDS if name not in row]


@pytest.mark.parametrize(("operator", "backend"), DASHES)
def test_every_dash_refuses(operator: str, backend: str) -> None:
    with pytest.raises(fk.BackendUnavailable, match=f"{operator}.*{backend}"):
        call(operator, backend, torch.float32)
