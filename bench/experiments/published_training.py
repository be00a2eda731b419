"""Accuracy and time of training the published layer, before and after swap.

    python -m bench.experiments.published_training PATH_OF_FL-I2MoE_Decor --out FILE

imports the published classes from the checkout, which runs its code. They train on generated data with the
published settings for MIMIC: three modalities, Adam, and the task loss plus the weighted mean of the interaction
losses. Every seed draws data and initial weights; both versions start from these weights and see the same batches.
Their epochs alternate. Accuracy is measured on held-out samples after the last epoch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flmoe_kernels
from bench import rows as files
from flmoe_kernels.profile.environment import environment
from tests.support.checkout import Checkout

Row = dict[str, Any]

PUBLISHED, SWAPPED = "published", "swapped"
KINDS = ("uniqueness", "synergy", "redundancy")
MODALITIES, TOKENS, FEATURES, CLASSES = 3, 4, 16, 2
BATCH, RATE, INTERACTION_WEIGHT = 32, 1e-4, 0.01
HELD_OUT = 2000
AMPLITUDE = 16.0


@dataclasses.dataclass(frozen=True)
class Samples:
    """inputs (N, tokens, features) and masks (N, tokens) by modality; labels and kinds (N)."""

    inputs: list[Tensor]
    masks: list[Tensor]
    labels: Tensor
    kinds: Tensor

    def batches(self, order: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
        for rows in order.split(BATCH):
            inputs, masks = ([x[rows] for x in part] for part in (self.inputs, self.masks))
            yield inputs, masks, self.labels[rows]


def draw(count: int, directions: Tensor, generator: torch.Generator) -> Samples:
    """Samples with a binary label, in noise; directions (modalities, kinds, features).

    uniqueness: one modality shows the label. redundancy: every modality shows it. synergy: the signs in the first
    two modalities are equal or opposite. A modality shows a sign in one of its valid tokens.
    """

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    kinds, labels = integers(len(KINDS)), integers(CLASSES)
    label_sign = 2.0 * labels - 1.0
    signs = label_sign[:, None].repeat(1, MODALITIES)
    signs[kinds == 0] *= F.one_hot(integers(MODALITIES), MODALITIES)[kinds == 0]
    first = 2.0 * integers(2) - 1.0
    signs[kinds == 1] = torch.stack([first, first * label_sign, 0 * first], dim=1)[kinds == 1]
    inputs, masks = [], []
    for m in range(MODALITIES):
        x = torch.randn((count, TOKENS, FEATURES), generator=generator)
        lengths = 1 + integers(TOKENS)
        place = (torch.rand(count, generator=generator) * lengths).long()
        x[torch.arange(count), place] += AMPLITUDE * signs[:, m, None] * directions[m, kinds]
        inputs.append(x)
        masks.append((torch.arange(TOKENS) < lengths[:, None]).float())
    return Samples(inputs, masks, labels, kinds)


class Model(nn.Module):
    """A linear encoder per modality, then the published layer."""

    def __init__(self, checkout: Checkout) -> None:
        super().__init__()
        width = 128
        fusion = checkout.Transformer(
            num_modalities=MODALITIES,
            num_patches=TOKENS,
            hidden_dim=width,
            output_dim=CLASSES,
            num_layers=2,
            num_layers_pred=2,
            num_experts=4,
            num_routers=1,
            top_k=2,
            num_heads=4,
            dropout=0.5,
            gate="None",
        )
        self.encoders = nn.ModuleList(nn.Linear(FEATURES, width) for _ in range(MODALITIES))
        self.layer = checkout.InteractionMoE(
            MODALITIES, fusion, fusion_sparse=False, hidden_dim=width, num_layer_rw=3
        )

    def tokens(self, inputs: list[Tensor]) -> list[Tensor]:
        return [encode(x) for encode, x in zip(self.encoders, inputs, strict=True)]

    def loss(self, inputs: list[Tensor], masks: list[Tensor], labels: Tensor) -> Tensor:
        _, _, logits, losses, _ = self.layer(self.tokens(inputs), masks)
        return F.cross_entropy(logits, labels) + INTERACTION_WEIGHT * sum(losses) / len(losses)

    @torch.no_grad()
    def correct(self, samples: Samples) -> Tensor:
        """Whether each prediction is right, in eval mode."""
        self.eval()
        parts = samples.batches(torch.arange(len(samples.labels)))
        logits = [self.layer.inference(self.tokens(x), masks)[2] for x, masks, _ in parts]
        return torch.cat(logits).argmax(dim=1) == samples.labels


def one_seed(checkout: Checkout, seed: int, epochs: int, samples: int) -> list[Row]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn((MODALITIES, len(KINDS), FEATURES), generator=generator)
    directions = F.normalize(directions, dim=-1)
    train, held_out = (draw(count, directions, generator) for count in (samples, HELD_OUT))
    models = {PUBLISHED: Model(checkout)}
    models[SWAPPED] = copy.deepcopy(models[PUBLISHED])
    report = flmoe_kernels.swap(models[SWAPPED])
    if not report.swapped:
        raise RuntimeError(f"the published layer was not swapped:\n{report}")
    optimizers = {
        name: torch.optim.Adam(model.parameters(), lr=RATE) for name, model in models.items()
    }
    seconds = dict.fromkeys(models, 0.0)
    for _ in range(epochs):
        order = torch.randperm(samples, generator=generator)
        for name, model in models.items():
            model.train()
            start = time.perf_counter()
            for batch in train.batches(order):
                optimizers[name].zero_grad()
                model.loss(*batch).backward()
                optimizers[name].step()
            seconds[name] += time.perf_counter() - start
    rows = []
    for name, model in models.items():
        correct = model.correct(held_out).double()
        accuracy = {
            kind: float(correct[held_out.kinds == k].mean()) for k, kind in enumerate(KINDS)
        }
        rows.append(
            {
                **{"seed": seed, "version": name, "accuracy": float(correct.mean())},
                **{"accuracy_by_kind": accuracy, "training_seconds": round(seconds[name], 2)},
            }
        )
        shares = " ".join(f"{kind} {value:.1%}" for kind, value in accuracy.items())
        print(
            f"seed {seed} {name:9} accuracy {rows[-1]['accuracy']:.1%} ({shares}), "
            f"{seconds[name]:.1f} s",
            flush=True,
        )
    return rows


def summary(rows: list[Row]) -> None:
    """Print means over seeds, and the difference of the versions with its standard error."""

    def values(version: str, key: str) -> list[Any]:
        return [row[key] for row in rows if row["version"] == version]

    before, after = values(PUBLISHED, "accuracy"), values(SWAPPED, "accuracy")
    gaps = [100 * (b - a) for a, b in zip(before, after, strict=True)]
    error = f"{statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else "unknown"
    seconds = [sum(values(version, "training_seconds")) for version in (PUBLISHED, SWAPPED)]
    print(
        f"accuracy {statistics.mean(before):.1%} before, {statistics.mean(after):.1%} after, "
        f"difference {statistics.mean(gaps):+.2f} points (s.e. {error}); "
        f"training {seconds[0]:.0f} s before, {seconds[1]:.0f} s after"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder of FL-I2MoE_Decor")
    for name, value in (("seeds", 5), ("epochs", 30), ("samples", 512)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    published = Checkout(arguments.checkout)
    if published.compat != "fl_i2moe":
        parser.error(f"checkout: expected FL-I2MoE_Decor, got {published.compat}")
    settings = {"epochs": arguments.epochs, "samples": arguments.samples}
    rows = [row for seed in range(arguments.seeds) for row in one_seed(published, seed, **settings)]
    summary(rows)
    if arguments.out:
        settings["seeds"] = arguments.seeds
        files.save(
            arguments.out, {"environment": environment(), "settings": settings, "rows": rows}
        )


if __name__ == "__main__":
    main()
