"""Tests of training, saving and resuming a swapped model under Lightning and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flmoe_kernels
from flmoe_kernels import FusionTransformer, InteractionMoE, ReferenceInteractionMoE
from tests.support.inputs import draw

CLASSES, EPOCHS = 3, 2


def swapped(seed: int) -> nn.Module:
    """A model whose layer `swap` has replaced, with dropout. A resumed training starts with other parameters."""
    torch.manual_seed(seed)
    fusion = FusionTransformer(2, hidden_dim=8, output_dim=CLASSES, num_layers=1, num_heads=2)
    model = nn.ModuleDict({"layer": ReferenceInteractionMoE(2, fusion, hidden_dim=8)})
    model = flmoe_kernels.swap(model).model
    assert isinstance(model["layer"], InteractionMoE)
    return model


def loader() -> DataLoader:
    data = draw(12, 5, 8, seed=1), draw(12, 4, 8, seed=2), torch.arange(12) % CLASSES
    return DataLoader(TensorDataset(*data), batch_size=4)


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    first, second, target = batch
    _, _, logits, losses, _ = model["layer"]([first, second])
    return F.cross_entropy(logits, target) + 0.1 * sum(losses)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_with_lightning(folder: Path, epochs: int, resume: bool) -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = swapped(seed=resume)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            torch.manual_seed(self.global_step)  # Lightning does not restore torch's generator
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **quiet
    )
    training, path = Training(), folder / "last.ckpt"
    trainer.fit(training, loader(), ckpt_path=path if resume else None)
    trainer.save_checkpoint(path)
    return training.model


def train_with_accelerate(folder: Path, epochs: int, resume: bool) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), swapped(seed=resume)
    model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader())
    first = 0
    if resume:
        accelerator.load_state(str(folder))  # torch's generator, too
        first = 1
    for _ in range(first, epochs):
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
    accelerator.save_state(str(folder))
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("train", [train_with_lightning, train_with_accelerate])
def test_a_resumed_training_equals_an_uninterrupted_one(train: Any, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", EPOCHS, resume=False).state_dict()
    first = train(tmp_path / "parts", 1, resume=False).state_dict()
    resumed = train(tmp_path / "parts", EPOCHS, resume=True).state_dict()
    assert whole.keys() == first.keys() == resumed.keys()
    for name, value in resumed.items():
        assert torch.equal(value, whole[name]), name
    assert any(not torch.equal(value, whole[name]) for name, value in first.items())
