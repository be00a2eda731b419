"""Tests of the command `profile`: its output files are valid and consistent."""

from __future__ import annotations

import gc
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from flmoe_kernels.cli.profile import profile
from flmoe_kernels.profile import ceilings, profiles
from flmoe_kernels.profile import request as profile_request
from flmoe_kernels.profile import run as profile_run
from flmoe_kernels.profile.cases import cases
from flmoe_kernels.profile.check import WrongAnswer
from flmoe_kernels.profile.shapes import LayerShape, PairShape, RoutedShape
from flmoe_kernels.profile.work import cost
from tests.support.layers import LayerCase

app = typer.Typer()
app.command()(profile)

PAIRS = PairShape("small_pairs", 2, 9, 7, rank=4, width=8)
SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("small_layer", 2, (5, 4), (3, None), 16, 2, 1, 3),
        PAIRS,
        RoutedShape("small_rows", 40, 8, 16, 4, 2),
    )
}
QUICK = ("--seconds", "0.02", "--no-memory")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use shapes and ceilings that take milliseconds, on one thread."""
    monkeypatch.setattr(profile_request, "named_shapes", lambda device: SHAPES)
    monkeypatch.setitem(ceilings._SIDE, "cpu", 96)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(profiles, "TRACED_CALLS", 1)
    # A garbage collection before every block would take longer than the block.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    torch.set_num_threads(1)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_every_output_can_be_read_back_and_agrees(tmp_path: Path) -> None:
    names = {"trace": "t.json", "json": "out.json", "roofline": "page.html"}
    written = {name: tmp_path / file for name, file in names.items()}
    options = itertools.chain(*((f"--{name}", str(path)) for name, path in written.items()))
    backends = ("--backend", "cpu", "--backend", "reference")
    result = run("--op", "pair_moe", "--variant", "pool", *backends, *QUICK, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())

    held = json.loads(written["json"].read_text())
    assert held["schema"] == "flmoe_kernels.profile/4"
    assert held["environment"]["torch"] == torch.__version__
    assert set(held["ceilings"]["flops"]) == {"float32"}
    ours, peer = held["profiles"]
    case = cases(["pair_moe"], [PAIRS], ["forward+backward"])[1]
    assert case.variant == "pool"
    for found in (ours, peer):
        assert found["what"] == case.name
        assert (found["flop"], found["bytes"]) == (cost(case).flop, cost(case).bytes)
        spread = found["spread"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert spread["confidence"] >= 0.95
        assert found["flops_per_second"] * spread["median"] == pytest.approx(found["flop"])
        assert found["share_of_limit"] == pytest.approx(found["least"] / spread["median"])
        least = max(found["flop"] / found["matmul"], found["bytes"] / found["copy"])
        assert found["least"] == pytest.approx(least)
        assert found["matmul"] == held["ceilings"]["flops"]["float32"]
        breakdown = found["breakdown"]
        total = sum(stage["seconds"] for stage in breakdown["stages"])
        assert total == pytest.approx(breakdown["whole"])
        assert found["peak_bytes"] is None
    assert (ours["contestant"], ours["kind"], ours["ratio"]) == ("cpu", "ours", None)
    assert (peer["contestant"], peer["kind"]) == ("reference", "peer")
    assert peer["ratio"]["low"] <= peer["ratio"]["median"] <= peer["ratio"]["high"]
    ours_, theirs = ({x["name"] for x in found["breakdown"]["stages"]} for found in (ours, peer))
    assert {"flmoe::pair_moe", "flmoe::pair_moe_backward"} <= ours_
    assert not any(name.startswith("flmoe::") for name in theirs)

    trace = json.loads(written["trace"].read_text())
    assert any(event.get("name") == "flmoe::pair_moe_backward" for event in trace["traceEvents"])

    page = written["roofline"].read_text()
    assert not re.search(r'(?:src|href)="(?!#)', page), "the page needs a network"
    for words in (
        *(case.name, "flmoe::pair_moe_backward", "other (torch)"),
        *("of attainable", "attainable, measured now on this machine: matrix product "),
    ):
        assert words in result.stdout
        assert words in page
    share = f"{ours['share_of_limit']:.1%} ({ours['limit']})"
    assert share in result.stdout


@pytest.mark.parametrize(
    "operator", ["expert_attention", "routed_mlp", "routing", "interaction_moe"]
)
def test_every_operator_has_a_profile(operator: str, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    run("--op", operator, *QUICK, "--no-check", "--json", str(target))
    [found] = json.loads(target.read_text())["profiles"]
    assert found["contestant"] == "cpu"
    assert found["what"].startswith(f"{operator}/small_")
    assert any(stage["name"].startswith("flmoe::") for stage in found["breakdown"]["stages"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either --op or --checkpoint, got neither"),
        (
            ("--op", "pairs"),
            "op: expected one of pair_moe, expert_attention, routed_mlp, routing, interaction_moe, "
            "got 'pairs'",
        ),
        # Only the shapes of this operator are listed.
        (
            ("--op", "pair_moe", "--shape", "mmimdb"),
            "shape: expected one of small_pairs, got 'mmimdb'",
        ),
        (
            ("--op", "pair_moe", "--backend", "tpu"),
            "backend: expected one of cpu, triton, cuda, reference, all, got 'tpu'",
        ),
        (("--op", "pair_moe", "--dtype", "int8"), "dtype: expected one of float32, bfloat16,"),
        (("--op", "pair_moe", "--pass", "sideways"), "pass: expected one of forward, backward,"),
        (("--op", "pair_moe", "--variant", "sum"), "variant: expected one of none, pool, got"),
        (("--op", "pair_moe", "--device", "tpu:0"), "device: expected cpu, cuda or cuda:N"),
        (("--checkpoint", "x.pt", "--tokens", "8,x"), "--tokens: expected numbers separated by"),
        (("--op", "pair_moe", "--tokens", "8"), "--tokens: does not apply to this kind of request"),
        (("--op", "pair_moe", "--seconds", "0"), "seconds: expected a positive number"),
        (
            ("--op", "pair_moe", "--json", "nowhere/x.json"),
            "json: nowhere/x.json: cannot be written: no such folder",
        ),
        (("--checkpoint", "absent.pt"), "absent.pt: "),
    ],
)
def test_bad_requests_give_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_unavailable_backends_give_a_reason() -> None:
    result = run("--op", "pair_moe", "--backend", "triton", code=2)
    assert re.search(
        r"backend 'triton' cannot run pair_moe/small_pairs.* on cpu: .+", result.stderr
    )
    result = run("--op", "pair_moe", "--device", "cuda", code=2)
    assert "device: 'cuda': there is no CUDA device" in result.stderr


def test_a_wrong_answer_is_exit_code_1_before_any_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Any, *contestants: Any) -> None:
        raise WrongAnswer(f"{contestants[0].name} on {case.name}: y is off")

    monkeypatch.setattr(profile_run, "agree", wrong)
    monkeypatch.setattr(profile_run, "profile_case", lambda *_, **__: pytest.fail("timed"))
    result = run("--op", "pair_moe", *QUICK, code=1)
    assert "cpu on pair_moe/small_pairs/forward+backward/float32/none: y is off" in result.stderr


def test_the_page_names_only_existing_options() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "profiling.md").read_text()
    shown = typer.main.get_command(app)
    options = {
        name for parameter in shown.params for name in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page))
    assert named
    assert named <= options, f"not options: {sorted(named - options)}"


# ---- a user's own layer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mine.pt"
    torch.save({"ensemble_model": LayerCase(dim=16).reference().state_dict()}, path)
    return path


def test_own_layer_next_to_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    sizes = ("--batch", "3", "--tokens", "5,4", "--valid", "3,4", "--heads", "2")
    arguments = ("--checkpoint", str(checkpoint), *sizes, "--pass", "training", *QUICK)
    run(*arguments, "--no-check", "--json", str(target))
    ours, reference = json.loads(target.read_text())["profiles"]
    assert (ours["contestant"], reference["contestant"]) == ("cpu", "reference")
    assert ours["what"] == "interaction_moe/mine, batch 3/forward+backward/float32"
    assert reference["ratio"]["median"] > 0
    assert "flmoe::interaction_losses" in {x["name"] for x in ours["breakdown"]["stages"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tokens: expected 2 positive numbers, one per modality, got none"),
        (("--tokens", "5,4", "--batch", "0"), "batch: expected at least 1, got 0"),
        (("--tokens", "5,4", "--valid", "6,4"), "valid: expected 2 numbers from 1 to 5,4, got 6,4"),
        (("--tokens", "5,4", "--heads", "3"), "mine.pt: "),
        (("--tokens", "5,4", "--shape", "mmimdb"), "--shape: does not apply to this kind"),
    ],
)
def test_invalid_requests_for_own_layers(
    checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("--checkpoint", str(checkpoint), *arguments, code=2)
    assert message in result.stderr


def test_learned_positions_fix_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "older.pt"
    case = LayerCase(lengths=(4, 4), compat="i2moe", dim=16)
    torch.save(case.reference().state_dict(), path)
    arguments = ("--checkpoint", str(path), "--batch", "2", "--heads", "2", *QUICK)
    shown = run(*arguments, "--backend", "cpu").stdout
    for phase in ("forward+backward", "forward"):
        assert f"interaction_moe/older, batch 2/{phase}/float32" in shown
    message = "learned positions fix them to 4,4"
    assert message in run(*arguments, "--tokens", "5,4", code=2).stderr


def test_a_sparse_layer(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    case = LayerCase(dim=16, gate="NoisyGate", sparse=True)
    torch.save(case.reference().state_dict(), path)
    arguments = ("--checkpoint", str(path), "--tokens", "5,4", "--batch", "2", "--heads", "2")
    quick = ("--pass", "inference", "--backend", "cpu", *QUICK)
    assert "cpu" in run(*arguments, "--gate", "NoisyGate", *quick).stdout
