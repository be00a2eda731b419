"""Tests of `swap` on layers whose source is not published code, and of its recognition."""

from __future__ import annotations

import ast
import functools
import importlib.util
import linecache
import random
import re
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
I2_FUSION = "parts = (torch.cat(inputs, dim=1) + self.pos_embed)"
FL_LAYER = "outputs, gate_losses = self.every_view(inputs, masks)"
MLP = "self.last_topk_pre_mix = None\n        x = inp"
GATE = "index, weight, logits = super().forward(x, return_all_scores=True)\n        shares"
ATTENTION = "interaction_experts.0.fusion_model.network.0.attn"
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
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUSION_EDITS = [
    ("if len(inputs[0]) > 2: inputs = [x - x.mean(0) for x in inputs]", "the logits differ"),
    (
        "if getattr(self, 'epoch', 0) > 3: inputs = [0 * inputs[0], *inputs[1:]]",
        "uses epoch of self, which the published code does not have",
    ),
    ("self.extra_loss = inputs[0].mean()", "uses extra_loss of self"),
    (
        "if self.training and random.random() < 1e-9: inputs = [0 * inputs[0], *inputs[1:]]",
        "in training random numbers are drawn",
    ),
    (
        "inputs = [x[:, :512] for x in inputs]\nmasks = masks and [m[:, :512] for m in masks]",
        "in training on 1025 tokens the logits differ",
    ),
    (
        "if not self.training: inputs = [x[:, :1000] for x in inputs]",
        "in evaluation on 1025 tokens the logits differ",
    ),
    (
        "if self.training: inputs = [x + 0.1 * torch.randn(x.shape).to(x) for x in inputs]",
        "in training random numbers are drawn",
    ),
    (
        "if self.training: inputs = [x + 0.1 * torch.randn_like(x) for x in inputs]",
        "expected one call of torch.randn_like|differ",
    ),
    (
        "if self.training: inputs = [x * (1 + 0.1 * np.random.rand()) for x in inputs]",
        "in training random numbers are drawn",
    ),
    (
        "if not self.training: inputs = [x * (1 + 0.1 * np.random.rand()) for x in inputs]",
        "in evaluation random numbers are drawn|differ by",
    ),
    (
        "own = torch.Generator()\nif self.training: inputs = [x + torch.rand((), generator=own) for x in inputs]",
        "in training the logits differ",
    ),
    ("inputs = [x.detach() for x in inputs]", "in training the gradients of input 0 differ"),
    (
        "if not self.training: inputs = [inputs[0], inputs[1].detach()]",
        "in evaluation the gradients of input 1 differ",
    ),
    ("if self.training: inputs = [1.001 * x for x in inputs]", "in training the logits differ"),
    (
        "if masks is not None and self.training: inputs = [1.001 * x for x in inputs]",
        "in training the logits differ",
    ),
    (
        "if inputs[1].shape[1] == 1: inputs = [inputs[0], 1.001 * inputs[1]]",
        "in training the logits differ",
    ),
    (
        "if self.training and masks is not None and not masks[1].all(): inputs = [1.1 * x for x in inputs]",
        "in training the logits differ",
    ),
    (
        "inputs = [self.network[0].dropout(x) for x in inputs]",
        "in training random numbers are drawn",
    ),
    (
        "inputs = [self.network[0].dropout1(x) for x in inputs]",
        r"in training .*dropout1 runs 12 times, expected 4",
    ),
    ("assert not self.training, 'no'", "forward fails: AssertionError: no"),
]


@pytest.mark.parametrize(("edit", "reason"), FUSION_EDITS)
def test_edits_of_a_fusion_model_are_not_lost(tmp_path: Path, edit: str, reason: str) -> None:
    models = edited(tmp_path, FL_FUSION, edit)
    layer = make_layer(models.fl, **SMALL)
    assert list(unrecognised(layer)) == ["models.fl.Transformer.forward"]
    before = random.getstate()
    assert re.search(reason, left(swap(layer))), left(swap(layer))
    assert random.getstate() == before
    assert swap(layer, check=False).left == ()


@pytest.mark.parametrize(
    ("marker", "edit", "reason"),
    [
        (I2_FUSION, "if self.training: inputs = [1.001 * x for x in inputs]", "in training the lo"),
        (I2_FUSION, "inputs = [inputs[0].detach(), *inputs[1:]]", "gradients of input 0 differ"),
        (
            FL_LAYER,
            "inputs = [x[:, :1000] for x in inputs]\nmasks = masks and [x[:, :1000] for x in masks]",
            "expected one call of torch.randn_like",
        ),
        (FL_LAYER, "if self.training: masks = None", "in training the logits differ"),
    ],
)
def test_edits_of_other_parts_are_not_lost(
    tmp_path: Path, marker: str, edit: str, reason: str
) -> None:
    models = edited(tmp_path, marker, edit)
    layer = make_layer(models.i2 if marker is I2_FUSION else models.fl, **SMALL)
    assert re.search(reason, left(swap(layer))), left(swap(layer))


@pytest.mark.parametrize(("variant", "marker"), [("fl", FL_FUSION), ("i2", I2_FUSION)])
def test_equal_code_is_matched_numerically(tmp_path: Path, variant: str, marker: str) -> None:
    models = edited(tmp_path, marker, "inputs = [x + 0 for x in inputs]")

    def make() -> nn.Module:
        return make_layer(getattr(models, variant), **SMALL)

    what = f"source unrecognised: models.{variant}.Transformer.forward"
    report = swap(make())
    first, *_ = str(report).splitlines()
    assert first.startswith(
        "1 layer swapped, 0 left as is. (the model): matched numerically, " + what
    )
    assert report.as_dict()["swapped"][0]["unrecognised"] == (
        f"models.{variant}.Transformer.forward",
    )
    assert left(swap(make(), strict=True)) == what
    first, *_ = str(swap(make(), check=False)).splitlines()
    assert f"not compared, {what}" in first


MLP_EDITS = [
    ("if self.training: inp = 1.001 * inp", "in training the outputs differ"),
    ("inp = inp.detach()", "in training the gradients of input 0 differ"),
    ("if self.training: inp = inp + torch.rand(()) * 1e-9", "random numbers are drawn"),
    (
        "if inp.numel() > 9000: inp = torch.cat([inp[..., :900, :], inp[..., 900:, :] * 0], -2)",
        "in training on 1025 tokens the outputs differ",
    ),
    ("inp = inp + 0", ""),
]


@pytest.mark.parametrize(("edit", "reason"), MLP_EDITS)
@pytest.mark.parametrize("gate", lineage_sparse.GATES)
def test_edits_of_sparse_mlps_are_not_lost(
    tmp_path: Path, gate: str, edit: str, reason: str
) -> None:
    models = edited(tmp_path, MLP, edit, SPARSE_SOURCE)
    report = swap(models.make_mlp(gate))
    if reason:
        assert re.search(reason, left(report)), left(report)
    else:
        assert report.left == ()
        assert "matched numerically" in str(report).splitlines()[0]


def test_edited_gates_are_left(tmp_path: Path) -> None:
    """Their losses and drops cannot be compared, because they differ by design."""
    models = edited(tmp_path, GATE, "x = x + 0", SPARSE_SOURCE)
    reason = left(swap(models.make_mlp()))
    assert reason == (
        "source unrecognised: models.GShardGate.forward; losses and drops of gates cannot be compared"
    )


@pytest.mark.parametrize("gate", ["SwitchGate", "AddtionalNoisyGate"])
def test_an_edited_fusion_model_with_known_gates(tmp_path: Path, gate: str) -> None:
    models = edited(tmp_path, FL_FUSION, "inputs = [x + 0 for x in inputs]")
    layer = models.make_sparse_layer(models.fl, gate, dim=8, layers=1)
    report = swap(layer)
    assert report.left == ()
    assert "matched numerically" in str(report).splitlines()[0]
    models = edited(tmp_path, FL_FUSION, "if self.training: inputs = [1.001 * x for x in inputs]")
    layer = models.make_sparse_layer(models.fl, gate, dim=8, layers=1)
    assert "in training the logits differ" in left(swap(layer))


def names(layer: nn.Module) -> list[str]:
    return [name.partition("<locals>.")[2] or name for name in unrecognised(layer)]


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
        assert unrecognised(layer) == {}
    changed = loaded(tmp_path, text.replace("* self.scale", "/ self.scale"))
    assert unrecognised(make_layer(changed.fl)) == {"models.Attention.forward": ATTENTION}


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


class OtherLookup(fl.Transformer):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


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
        "under another name",
        lambda m: m.setattr(lineage.Attention, "forward", lineage.MLP.forward),
        ["tests.support.lineage.Attention.forward"],
    ),
    (
        "partial",
        lambda m: m.setattr(
            fl.Transformer, "forward", functools.partialmethod(fl.Transformer.forward, masks=None)
        ),
        ["tests.support.lineage.fl.Transformer.forward"],
    ),
    (
        "a function that a method calls",
        lambda m: m.setattr(lineage, "_mixed", lambda logits, weights: logits[0]),
        [f"tests.support.lineage.fl.InteractionMoE.{x}" for x in ("forward", "inference")],
    ),
    (
        "an object that a method calls",
        lambda m: m.setattr(lineage, "_mixed", functools.partial(lineage._mixed)),
        [f"tests.support.lineage.fl.InteractionMoE.{x}" for x in ("forward", "inference")],
    ),
    (
        "marked as a wrapper",
        lambda m: m.setattr(fl.Transformer.forward, "__wrapped__", print, raising=False),
        ["tests.support.lineage.fl.Transformer.forward"],
    ),
    ("subclass", lambda m: AnotherPooling, [f"{__name__}.AnotherPooling.pooled"]),
    ("property", lambda m: HiddenPart, [f"{__name__}.HiddenPart.gate_loss"]),
    ("special method", lambda m: OtherLookup, [f"{__name__}.OtherLookup.__getattr__"]),
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
    assert list(unrecognised(make_layer(fusion=fusion))) == expected


def test_without_the_stand_ins_fingerprints_nothing_of_them_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert "tests.support.lineage.fl.Transformer.forward" in unrecognised(make_layer())
    assert "tests.support.lineage.i2.Transformer.forward" in unrecognised(make_layer(i2))
    assert FMoETransformerMLP.__name__ in " ".join(unrecognised(make_mlp()))


def test_members_that_swap_does_not_keep_are_reported(tmp_path: Path) -> None:
    """Added methods, class constants and attributes of parts; strict=True leaves the layer."""
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
    assert left(swap(make(), strict=True)).startswith("would lose InteractionMoE.LIMIT")
    assert swap(lineage.make_layer(**SMALL), strict=True).swapped[0].differences == ()
