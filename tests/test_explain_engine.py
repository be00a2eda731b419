"""The engine below the estimates: coalitions, value functions of tokens, batches, checkpoints, ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from explain_games import Planted, drawn, first_of, interaction_layer, random_terms, unanimity
from torch import Tensor, nn

from flmoe_kernels.explain import (
    PairValues,
    Run,
    Sampling,
    memory,
    probe_pairs,
    shapley_interactions,
)
from flmoe_kernels.explain.coalitions import resume
from flmoe_kernels.explain.coalitions.engine import Evaluator
from flmoe_kernels.explain.coalitions.packed import distinct, pack, sizes, toggled_prefixes, unpack
from flmoe_kernels.testing import LayerCase

CASE = LayerCase(lengths=(5, 4))
RANKS = 2


@pytest.mark.parametrize("players", [0, 1, 7, 8, 9, 63, 65])
def test_packed_coalitions(players: int) -> None:
    inside = drawn(200, players)
    packed = pack(inside)
    assert packed.shape == (200, math.ceil(players / 8))
    np.testing.assert_array_equal(unpack(packed, players), inside)
    np.testing.assert_array_equal(sizes(packed), inside.sum(axis=1))
    repeated = packed[np.random.default_rng(1).integers(0, 200, 500)]
    rows, place = distinct(repeated)
    np.testing.assert_array_equal(rows[place], repeated)
    assert len(rows) == len({row.tobytes() for row in repeated})
    assert (np.diff(sizes(rows)) >= 0).all()
    np.testing.assert_array_equal(distinct(repeated[::-1])[0], rows)


def test_toggled_prefixes() -> None:
    order = np.array([3, 0, 2, 1])
    position = np.argsort(order)
    rows = [(0, 4), (2, 4), (2, 3), (2, 1), (4, 2), (4, 4), (0, 0)]
    length, toggled = (np.array(column) for column in zip(*rows, strict=True))
    found = unpack(toggled_prefixes(position, length, toggled), 4)
    sets = [set(np.flatnonzero(row).tolist()) for row in found]
    assert sets == [set(), {3, 0}, {0}, {3, 0, 1}, {3, 0, 1}, {0, 1, 2, 3}, {0}]


def test_each_distinct_coalition_once_in_batches() -> None:
    game = unanimity(random_terms(11, 30, 4, seed=1), 11)
    inside = drawn(300, 11)[np.random.default_rng(2).integers(0, 300, 900)]
    expected = game.formula(inside)
    evaluator = Evaluator(game, 50)
    np.testing.assert_array_equal(evaluator(pack(inside)), expected)
    distinct_rows = len(np.unique(inside, axis=0))
    assert evaluator.evaluations == game.asked == distinct_rows < 300
    assert game.batches == [50] * (distinct_rows // 50) + [distinct_rows % 50]
    assert evaluator(pack(inside[:0])).shape == (0,)


def test_a_game_that_answers_wrongly() -> None:
    for answer, message in (
        (lambda inside: inside.astype(float), r"game: expected values \(1,\) .* got \(1, 3\)"),
        (
            lambda inside: np.where(inside.all(axis=1), np.nan, 1.0),
            r"game: expected finite values, got nan for a coalition of 3 of 3 tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator(Planted(3, answer), 1)(pack(np.ones((2, 3), dtype=np.bool_)))
    # The published layer's own answer where no token is left.
    layer, x = interaction_layer(CASE, backend="reference"), CASE.inputs(torch.float64)
    with pytest.raises(ValueError, match=r"nan for a coalition of 0 of 9 tokens"):
        shapley_interactions(layer, x)
    assert len(shapley_interactions(layer, x, fill="zero")) == 2


def test_batches_follow_the_memory_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert memory.available_bytes(cpu) > 2**20
    file = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", file)
    assert memory.available_bytes(cpu) == 2**31
    file.write_text("MemTotal: 9 kB\nMemAvailable:     1048576 kB\n")
    assert memory.available_bytes(cpu) == 2**30
    sizes_found = [memory.batch_size(each, cpu) for each in (1, 2**16, 2**20, 2**40)]
    assert sizes_found == [256, 32, 2, 1]
    # Some bytes more or less do not change it.
    file.write_text("MemAvailable:     1048999 kB\n")
    assert memory.batch_size(2**16, cpu) == 32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**28)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**28)
    assert memory.batch_size(2**16, torch.device("cuda")) == 32


class Interrupted(Exception):
    pass


def interrupted_after(batches: int, model: nn.Module) -> Any:
    """A hook that stops the run in the middle."""
    left = [batches]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return model.register_forward_hook(count)


class Sum(nn.Module):
    """A module with a hook to interrupt, whose values depend on the batch they are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 3))

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        kept = torch.cat(inputs, dim=1) * torch.cat(masks, dim=1).unsqueeze(2)
        hidden = torch.tanh(kept.sum(dim=2) @ self.weight)
        return hidden * (1 + 1e-6 * len(hidden))


@pytest.mark.parametrize("method", ["sampling", "exact"])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(resume, "SAVING_SHARE", math.inf)
    model = Sum().eval()
    x = [torch.randn(2, 12, 1), torch.randn(2, 12, 1)]
    masks = [torch.arange(12) < torch.tensor([[7], [5]])] * 2

    def call(**options: Any) -> list[dict[str, PairValues]]:
        request = {"target": 1, "method": method, "sampling": Sampling(budget=15_000, seed=5)}
        run = Run(max_batch=options.pop("max_batch", None), checkpoint=options.pop("at", None))
        return probe_pairs(model, x, masks, **{**request, **options}, run=run)

    whole = call()
    hook = interrupted_after(40, model)
    for attempt in range(10):  # noqa: B007
        try:
            found = call(at=tmp_path)
        except Interrupted:
            hook.remove()
            hook = interrupted_after(40, model)
        else:
            break
    hook.remove()
    assert 1 <= attempt < 9, "40 batches are not enough for one run, but they are for each part"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["sample_00000.npz", "sample_00001.npz"], "no temporary file stays"
    for one, other in zip(found, whole, strict=True):
        for index in ("SII", "RG"):
            assert one[index].to_dict() == other[index].to_dict(), "the same bits"
    # A finished run is read, not run again.
    asked = interrupted_after(5, model)
    again = call(at=tmp_path)
    asked.remove()
    assert again[1]["RG"].to_dict() == whole[1]["RG"].to_dict()
    # The control: another batch size changes this model's last digits.
    assert (call(max_batch=7)[0]["SII"].values != whole[0]["SII"].values).any()
    # What belongs to another request is refused.
    for other in (
        {"target": 0},
        {"pairs": "across"},
        {"indices": ("SII",)},
        {"output": "log_prob"},
        {"sampling": Sampling(budget=15_000, seed=6)} if method == "sampling" else {"target": 2},
    ):
        with pytest.raises(ValueError, match=r"sample_00000\.npz: belongs to another run"):
            call(at=tmp_path, **other)
    with torch.no_grad():
        model.weight[0, 0] += 1.0
    with pytest.raises(ValueError, match=r"belongs to another run"):
        call(at=tmp_path)
    path = tmp_path / "sample_00000.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"sample_00000\.npz: not a file of .*damaged one"):
        call(at=tmp_path)


def test_a_resumed_run_keeps_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is more memory than before; where there is less, it goes on with smaller ones."""
    monkeypatch.setattr(resume, "SAVING_SHARE", math.inf)
    model, x = Sum().eval(), [torch.randn(1, 12, 1), torch.randn(1, 12, 1)]
    sampling = Sampling(budget=8000)

    def call(folder: Path | None) -> PairValues:
        [found] = shapley_interactions(
            model, x, target=0, sampling=sampling, run=Run(checkpoint=folder)
        )
        return found

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


@pytest.mark.parametrize("method", ["sampling", "exact"])
def test_no_more_than_the_batch_under_way_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Whenever the process ends: what was evaluated before is in the file, also in the middle of a step."""
    monkeypatch.setattr(resume, "SAVING_SHARE", math.inf)  # here a batch is quicker than a file
    model, x = Sum().eval(), [torch.randn(1, 12, 1), torch.randn(1, 12, 1)]
    masks = [torch.arange(12) < 7] * 2
    masks = [mask.unsqueeze(0) for mask in masks]
    asked: list[int] = []
    model.register_forward_hook(lambda _m, _i, out: asked.append(len(out)))

    def call(folder: Path | None) -> PairValues:
        sampling = Sampling(budget=20_000)
        run = Run(checkpoint=folder, max_batch=128)
        options: Any = {"target": 0, "method": method, "sampling": sampling, "run": run}
        return shapley_interactions(model, x, masks, **options)[0]

    whole, total = call(None), sum(asked)
    ends = sum(size for size in asked if size <= 2)
    for batches in (1, 7, 33, 60):
        asked.clear()
        folder = tmp_path / f"{batches}"
        hook = interrupted_after(batches, model)
        with pytest.raises(Interrupted):
            call(folder)
        hook.remove()
        before = sum(asked) - asked[-1] * (len(asked) > batches)
        asked.clear()
        assert call(folder).to_dict() == whole.to_dict()
        assert before + sum(asked) <= total + ends + 128


def test_a_checkpoint_of_another_callable(tmp_path: Path) -> None:
    """A closure has no parameters to compare: its values of no and of all tokens tell it."""
    x = [torch.randn(1, 20, 2)]

    def model_of(scale: float) -> Any:
        return lambda inputs, masks: scale * (inputs[0] * masks[0].unsqueeze(2)).sum(1)

    run = Run(checkpoint=tmp_path)
    sampling = Sampling(budget=3000)
    probe_pairs(model_of(1.0), x, target=0, sampling=sampling, run=run)
    probe_pairs(model_of(1.0), x, target=0, sampling=sampling, run=run)
    with pytest.raises(ValueError, match=r"belongs to another model or sample: v\(none\)"):
        probe_pairs(model_of(1.5), x, target=0, sampling=sampling, run=run)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        found = distributed_results(True, f"{folder}/checkpoint")
        Path(f"{folder}/found_{rank}.json").write_text(json.dumps(found))
        try:
            shapley_interactions(
                interaction_layer(CASE, torch.float32),
                CASE.inputs(),
                target=rank,
                run=Run(distributed=True),
            )
        except ValueError as error:
            Path(f"{folder}/refused_{rank}").write_text(str(error))
    finally:
        dist.destroy_process_group()


def distributed_results(distributed: bool, checkpoint: str, max_batch: int = 32) -> list[Any]:
    """In float32, where another batch or order of sums would show; twice, the second from checkpoints."""
    layer = interaction_layer(CASE, torch.float32)
    run = Run(distributed=distributed, checkpoint=checkpoint, max_batch=max_batch)
    sampling = Sampling(budget=9000, tolerance=1e-3)
    found = [
        probe_pairs(layer, CASE.inputs(), method="sampling", sampling=sampling, run=run)
        for _ in range(2)
    ]
    return [[{k: v.to_dict() for k, v in each.items()} for each in one] for one in found]


def test_ranks_give_the_same_bits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = distributed_results(False, str(tmp_path / "alone"))
    assert alone[0] == alone[1]
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"found_{rank}.json").read_text())
        assert found == json.loads(json.dumps(alone)), rank
        assert "expected the same on every rank" in (tmp_path / f"refused_{rank}").read_text()
    # The control: in other batches the last bits may differ, and with this layer they do.
    other = distributed_results(False, str(tmp_path / "other"), max_batch=5)
    assert [one["SII"]["values"] for one in other[0]] != [one["SII"]["values"] for one in alone[0]]


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    layer, x = interaction_layer(CASE), first_of(CASE.inputs(torch.float64))
    shapley_interactions(layer, x, method="sampling", run=Run(progress=True))
    shown = capsys.readouterr().err
    assert "sample 1 of 1" in shown
    assert "100%" in shown
    shapley_interactions(layer, x)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match=r"progress: needs a package: pip install tqdm"):
        shapley_interactions(layer, x, run=Run(progress=True))
