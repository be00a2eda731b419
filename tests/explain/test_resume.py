"""Tests of resumed runs: bitwise equality, ranks, refusal of other requests."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from flmoe_kernels.explain import (
    PairValues,
    Run,
    Sampling,
    TokenGame,
    probe_pairs,
    shapley_interactions,
)
from flmoe_kernels.explain.estimators import checkpoint
from flmoe_kernels.explain.estimators.evaluator import Evaluator
from flmoe_kernels.explain.games import memory
from flmoe_kernels.explain.games.models import model_digest
from tests.support.explain_games import interaction_layer
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_layer
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(5, 4))
RANKS = 2
METHODS = ("sampling", "exact")


class Interrupted(Exception):
    pass


def interrupted_after(batches: int, model: nn.Module) -> Any:
    """A hook that interrupts the run."""
    left = [batches]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return model.register_forward_hook(count)


class Sum(nn.Module):
    """A module with an interrupting hook; its values depend on the batch in which they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 3))

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        kept = torch.cat(inputs, dim=1) * torch.cat(masks, dim=1).unsqueeze(2)
        hidden = torch.tanh(kept.sum(dim=2) @ self.weight)
        return hidden * (1 + 1e-6 * len(hidden))


@pytest.fixture
def every_batch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every batch, although here a batch takes less time than writing a file."""
    monkeypatch.setattr(checkpoint, "SAVING_SHARE", math.inf)


def tokens(batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, 12, 1), torch.randn(batch, 12, 1)]


@pytest.mark.usefixtures("every_batch_is_saved")
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_continues_and_only_its_last_batch_is_lost(
    tmp_path: Path, method: str
) -> None:
    """At any time the files have all earlier evaluations, even in the middle of a step."""
    model, x = Sum().eval(), tokens(2)
    masks = [torch.arange(12) < torch.tensor([[6], [5]])] * 2
    asked: list[int] = []
    model.register_forward_hook(lambda _m, _i, out: asked.append(len(out)))

    def call(folder: Path | None, max_batch: int = 64, **options: Any) -> Any:
        request = {"target": 1, "method": method, "sampling": Sampling(budget=1000, seed=5)}
        run = Run(max_batch=max_batch, checkpoint=folder)
        return probe_pairs(model, x, masks, **{**request, **options}, run=run)

    def bits(found: Any) -> Any:
        return [{name: each.to_dict() for name, each in one.items()} for one in found]

    whole, total = call(None), sum(asked)
    asked.clear()
    attempts, folder = 0, tmp_path
    while True:
        hook = interrupted_after(12 if method == "sampling" else 30, model)
        try:
            found = call(folder)
            break
        except Interrupted:
            attempts += 1
            asked.pop()  # the lost batch
        finally:
            hook.remove()
    assert attempts >= 2
    assert bits(found) == bits(whole)
    # Every start takes, for each sample, a pass for its classes, and v(none) and v(all) as a check.
    assert sum(asked) <= total + (attempts + 1) * 2 * 3
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["sample_00000.npz", "sample_00001.npz"], "no temporary file is left"
    # A finished run is read from its file and not repeated.
    asked.clear()
    assert bits(call(folder)) == bits(whole)
    assert len(asked) <= 4
    # Control: another batch size changes this model's last digits.
    assert bits(call(None, max_batch=7)) != bits(whole)
    # Files of another request are refused.
    for other in (
        {"target": 0},
        {"pairs": "across"},
        {"indices": ("SII",)},
        {"output": "log_prob"},
        {"sampling": Sampling(budget=1000, seed=6)} if method == "sampling" else {"target": 2},
    ):
        refused = partial(call, folder, **other)
        assert_refused(refused, r"sample_00000\.npz: belongs to another run")
    with torch.no_grad():
        model.weight[0, 0] += 1.0
    assert_refused(lambda: call(folder), r"belongs to another run")
    path = folder / "sample_00000.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused(lambda: call(folder), r"sample_00000\.npz: not a file of .*damaged one")


@pytest.mark.usefixtures("every_batch_is_saved")
def test_a_resumed_run_keeps_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches stay the same with more memory; with less memory they become smaller."""
    model, x, sampling = Sum().eval(), tokens(), Sampling(budget=8000, design="toggling")

    def call(folder: Path | None) -> PairValues:
        run = Run(checkpoint=folder)
        return shapley_interactions(model, x, target=0, sampling=sampling, run=run)[0]

    whole = call(None)
    for name, largest in (("more", 1024), ("less", 64)):
        hook = interrupted_after(20, model)
        with pytest.raises(Interrupted):
            call(tmp_path / name)
        hook.remove()
        with monkeypatch.context() as patch:
            patch.setattr(memory, "LARGEST", largest)
            found = call(tmp_path / name)
        assert found.batch_size == min(256, largest)
        assert found.evaluations == whole.evaluations
        assert (found.to_dict() == whole.to_dict()) == (name == "more")
        np.testing.assert_allclose(found.values, whole.values, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("count", [6, 12])
def test_a_checkpoint_of_another_callable(tmp_path: Path, count: int) -> None:
    """A closure has no parameters; it is identified by its values for no tokens and for all tokens."""
    x = [torch.randn(1, count, 2)]

    def result(scale: float) -> PairValues:
        def model(inputs: Any, masks: Any) -> Tensor:
            return scale * (inputs[0] * masks[0].unsqueeze(2)).sum(1)

        run, sampling = Run(checkpoint=tmp_path), Sampling(budget=1000)
        return probe_pairs(model, x, target=0, sampling=sampling, run=run)[0]["SII"]

    first = result(1.0)
    assert first.to_dict() == result(1.0).to_dict()
    assert count != 6 or first.evaluations == 2**6
    assert_refused(lambda: result(1.5), r"belongs to another model or sample: v\(none\)")


class Scaled(nn.Module):
    """A module with a non-persistent buffer and an address in its repr."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        return self.scale * inputs[0].sum(dim=1)

    def extra_repr(self) -> str:
        return f"act={object()!r}"


def test_checkpoints_distinguish_models_with_other_settings() -> None:
    layer = interaction_layer(CASE)
    pair = pair_layer()
    before = model_digest(layer), model_digest(pair)
    assert before == (model_digest(interaction_layer(CASE)), model_digest(pair_layer()))
    layer.interaction_experts[1].fusion_model.network[0].attn.num_heads = 4
    assert model_digest(layer) != before[0]
    layer = interaction_layer(CASE)
    layer.reweight.temperature = 0.5
    assert model_digest(layer) != before[0]
    for options in ({"temperature": 2.0}, {"top_k": 2}, {"normalizer": 7.0}):
        assert model_digest(pair_layer(**options)) != before[1]
    pair.train()
    assert model_digest(pair) == before[1], "it draws no random numbers in either mode"
    assert model_digest(Scaled(1.0)) == model_digest(Scaled(1.0)), "no address"
    assert model_digest(Scaled(1.0)) != model_digest(Scaled(2.0))
    x = CASE.inputs()
    game = TokenGame(interaction_layer(CASE, torch.float32), x, target=0)
    full = game.fingerprint()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert game.fingerprint() != full
    assert game.fingerprint() == full


ROUNDS = 7  # interrupts in the middle of a step, with one rank and with two


def interrupted_in_the_middle(method: str, folder: str, distributed: bool) -> None:
    """All ranks end after the same round, because the others would wait for a rank that ended alone."""
    evaluate, left = Evaluator._round, [ROUNDS]

    def count(self: Evaluator, rows: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return evaluate(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_round", count)
        patch.setattr(checkpoint, "SAVING_SHARE", math.inf)
        with pytest.raises(Interrupted):
            finished(method, folder, distributed)


def finished(
    method: str, folder: str | None, distributed: bool = False, max_batch: int = 32
) -> list[dict[str, Any]]:
    """Results of two samples, from JSON; in float32, where other batches or orders of sums change bits."""
    run = Run(distributed=distributed, checkpoint=folder, max_batch=max_batch)
    options: Any = {"method": method, "sampling": Sampling(budget=700, tolerance=1e-3), "run": run}
    found = probe_pairs(interaction_layer(CASE, torch.float32), CASE.inputs(), target=0, **options)
    return json.loads(json.dumps([{k: x.to_dict() for k, x in each.items()} for each in found]))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        found = {}
        for method in METHODS:
            for start in ("two, to be ended by two", "two, to be ended by one"):
                interrupted_in_the_middle(method, f"{folder}/{method} of {start}", True)
            for start in ("two, to be ended by two", "one, to be ended by two"):
                name = f"{method} of {start}"
                found[name] = finished(method, f"{folder}/{name}", True)
            found[f"{method} of two"] = finished(method, None, True)
        Path(f"{folder}/found_{rank}.json").write_text(json.dumps(found))
        layer, run = interaction_layer(CASE, torch.float32), Run(distributed=True)
        with pytest.raises(ValueError, match="expected the same on every rank"):
            shapley_interactions(layer, CASE.inputs(), target=rank, run=run)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_give_the_same_bits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for method in METHODS:
        interrupted_in_the_middle(method, f"{tmp_path}/{method} of one, to be ended by two", False)
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=RANKS)
    by_rank = [json.loads((tmp_path / f"found_{k}.json").read_text()) for k in range(RANKS)]
    for method in METHODS:
        whole, name = finished(method, None), f"{method} of two, to be ended by one"
        assert finished(method, f"{tmp_path}/{name}") == whole, name
        for found in by_rank:
            own = {name: each for name, each in found.items() if name.startswith(method)}
            assert own == dict.fromkeys(own, whole)
            assert len(own) == 3
    # Control: with this layer other batches change the last bits.
    mine, other = (finished("sampling", None, max_batch=n)[0]["SII"]["values"] for n in (32, 5))
    assert mine != other
