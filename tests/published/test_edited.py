"""Tests of `swap` on layers whose source is not published code, and of its recognition."""

from __future__ import annotations

import ast
import importlib.util
import linecache
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels.published.source import unrecognised
from flmoe_kernels.published.swap import swap
from tests.support import lineage, lineage_sparse
from tests.support.lineage import fl, i2, make_layer
from tests.support.lineage_sparse import FMoETransformerMLP, make_mlp
from tests.support.swaps import left

SOURCE = Path(str(lineage.__file__)).read_text(encoding="utf-8")
SPARSE_SOURCE = Path(str(lineage_sparse.__file__)).read_text(encoding="utf-8")
# The first lines of a forward, before which edits are inserted.
FL_FUSION = (
    "lengths = [x.shape[1] for x in inputs]\n            tokens = torch.cat(inputs, dim=1)\n"
)
GATE = "index, weight, logits = super().forward(x, return_all_scores=True)\n        shares"
SMALL = {"dim": 8, "layers": 1}


def edited(path: Path, marker: str, edit: str, source: str = SOURCE) -> Any:
    """The stand-ins' module with statements inserted before a marker."""
    assert source.count(marker) == 1
    start = source.index(marker)
    indent = start - source.rindex("\n", 0, start) - 1
    lines = [*edit.splitlines(), ""]
    text = source.replace(marker, ("\n" + " " * indent).join(lines) + marker)
    return loaded(path, text.replace("import copy\n", "import copy, random\nimport numpy as np\n"))


def loaded(path: Path, text: str) -> ModuleType:
    file = path / "models.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("models", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EDITS = [
    ("inputs = [x + 0 for x in inputs]", ""),
    ("inputs = [x * (2 - self.training) for x in inputs]", "logits differ by"),
]


@pytest.mark.parametrize(("edit", "reason"), EDITS)
def test_edited_layers_are_left(tmp_path: Path, edit: str, reason: str) -> None:
    """strict=False replaces them if the results in eval mode agree."""
    models = edited(tmp_path, FL_FUSION, edit)
    method = "source unrecognised: models.fl.Transformer.forward"

    def make() -> nn.Module:
        return make_layer(models.fl, **SMALL)

    for check in (True, False):
        assert left(swap(make(), check=check)).startswith(f"{method}, which the fast layer would")
    report, before = swap(make(), strict=False), random.getstate()
    if reason:
        assert reason in left(report)
    else:
        first = str(report).splitlines()[0]
        assert (
            first
            == f"1 layer swapped, 0 left as is. (the model): compared in eval mode only, {method}."
        )
        assert report.as_dict()["swapped"][0]["unrecognised"] == (method.split()[-1],)
    first = str(swap(make(), check=False, strict=False)).splitlines()[0]
    assert f"not compared, {method}" in first
    assert random.getstate() == before


def test_edited_gates_are_left(tmp_path: Path) -> None:
    models = edited(tmp_path, GATE, "x = x + 0", SPARSE_SOURCE)
    reason = left(swap(models.make_mlp()))
    assert reason.startswith("source unrecognised: models.GShardGate.forward,")
    assert swap(models.make_mlp(), strict=False).left == ()


def test_the_same_code_in_another_file_is_recognised(tmp_path: Path) -> None:
    """Comments, docstrings, annotations and formatting do not matter, but any change of the code does."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body.insert(0, ast.Expr(ast.Constant("another docstring")))
    text = ast.unparse(tree)
    for variant in ("fl", "i2"):
        layer = make_layer(getattr(loaded(tmp_path, text), variant))
        assert unrecognised(layer) == ()
    changed = loaded(tmp_path, text.replace("* self.scale", "/ self.scale"))
    assert unrecognised(make_layer(changed.fl)) == ("models.Attention.forward",)


def test_a_file_that_changed_after_its_import_is_not_recognised(tmp_path: Path) -> None:
    models = edited(tmp_path, FL_FUSION, "inputs = [x * 2 for x in inputs]")
    text = SOURCE.replace("import copy\n", "import copy, random\nimport numpy as np\n")
    (tmp_path / "models.py").write_text(text, encoding="utf-8")
    linecache.checkcache()
    assert "models.fl.Transformer.forward" in unrecognised(make_layer(models.fl))


class AnotherPooling(fl.Transformer):
    def pooled(self, parts: list[Tensor], masks: list | None) -> list[Tensor]:
        return [p.mean(dim=1) for p in parts]


class HiddenPart(fl.Transformer):
    @property
    def gate_loss(self) -> Any:
        return lambda: 0


class Helper(fl.Transformer):
    size = 3

    def describe(self) -> str:
        return "a helper that no published method calls"


Changes = Callable[[pytest.MonkeyPatch], Any]
CHANGES: list[tuple[str, Changes, list[str]]] = [
    (
        "decorated by torch",
        lambda m: m.setattr(fl.Transformer, "forward", torch.no_grad()(fl.Transformer.forward)),
        ["tests.support.lineage.fl.Transformer.forward"],
    ),
    (
        "a function that a method calls",
        lambda m: m.setattr(lineage, "_mixed", lambda logits, weights: logits[0]),
        [f"tests.support.lineage.fl.InteractionMoE.{x}" for x in ("forward", "inference")],
    ),
    ("subclass", lambda m: AnotherPooling, [f"{__name__}.AnotherPooling.pooled"]),
    ("property", lambda m: HiddenPart, [f"{__name__}.HiddenPart.gate_loss"]),
    ("helper", lambda m: Helper, []),
    ("none", lambda m: None, []),
]


@pytest.mark.parametrize(
    ("change", "expected"), [x[1:] for x in CHANGES], ids=[x[0] for x in CHANGES]
)
def test_unrecognised_methods(
    monkeypatch: pytest.MonkeyPatch, change: Changes, expected: list[str]
) -> None:
    fusion = change(monkeypatch)
    assert unrecognised(make_layer(fusion=fusion)) == tuple(expected)


def test_without_the_stand_ins_fingerprints_nothing_of_them_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert "tests.support.lineage.fl.Transformer.forward" in unrecognised(make_layer())
    assert "tests.support.lineage.i2.Transformer.forward" in unrecognised(make_layer(i2))
    assert FMoETransformerMLP.__name__ in " ".join(unrecognised(make_mlp()))


def test_members_that_swap_does_not_keep_are_reported(tmp_path: Path) -> None:
    """Added methods, class constants and attributes of parts."""
    method = "\n        def extra(self) -> int:\n            return 3\n\n        LIMIT = 5\n"
    marker = "        def every_view("
    module = loaded(tmp_path, SOURCE.replace(marker, method + "\n" + marker))

    def make() -> Any:
        layer = lineage.make_layer(module.fl, **SMALL)
        layer.interaction_experts[0].role = "text"
        layer._step, layer.epoch, layer.backend = 1, 2, "nccl"
        return layer

    [entry] = (report := swap(make())).swapped
    assert report.model.epoch == 2
    [text] = [x.text for x in entry.differences]
    names = "InteractionMoE.LIMIT, InteractionMoE.extra, _step, backend, interaction_experts.0.role"
    assert text == f"attributes and methods that are not kept: {names}"
    assert text in str(report)
    assert swap(lineage.make_layer(**SMALL)).swapped[0].differences == ()
