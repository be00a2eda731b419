"""The README's table of backends and dtypes, and small calls of all operators."""

from __future__ import annotations

from pathlib import Path

import torch

import flmoe_kernels as fk
from flmoe_kernels.ops.routing.api import gate

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table() -> dict[str, dict[str, tuple[str, ...]]]:
    """The README's table: operator -> backend -> dtype names."""
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
    raise AssertionError(f"no call is defined for {operator}")


def check_cell(operator: str, backend: str, dtype: str) -> None:
    """Check that the call returns finite values of this dtype."""
    out = call(operator, backend, getattr(torch, dtype), "cuda" if backend == "cuda" else "cpu")
    assert out.dtype == getattr(torch, dtype)
    assert torch.isfinite(out).all()
