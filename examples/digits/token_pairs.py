"""The layer over token pairs learns the same tasks, and its predictions are explained exactly.

For one sample of each task: the Shapley value of every patch and the interaction index of every pair of patches,
from one pass, where the reference layer would need an estimate from thousands of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from flmoe_kernels.layers.pair_interaction_moe.explanation import PairExplanation
from flmoe_kernels.layers.pair_interaction_moe.module import PairInteractionMoE

from .data import EXPERTS, Digits, Encoded, Pairs, Task
from .settings import Settings
from .train import LARGEST_GRADIENT, WARM_UP


@dataclass(frozen=True)
class SampleExplanation:
    """The explanation of one sample's logit of its true class, as nested lists.

    Attributes:
        digits: the class of each of the two images.
        images: the images, 8 x 8.
        label, guess: true and predicted class of the pair.
        valid: for every patch of each image, 16, whether it is there: False is padding.
        patches: Shapley value of every patch of each image, 16; 0 for padding.
        pairs: Shapley interaction index of every two patches, 16 x 16, summed over the experts.
        error: |sum of the patches' values - (logit - logit without any patch)|, 0 but for rounding.
    """

    digits: tuple[int, int]
    images: tuple[list[list[float]], list[list[float]]]
    label: int
    guess: int
    valid: tuple[list[bool], list[bool]]
    patches: tuple[list[float], list[float]]
    pairs: list[list[float]]
    error: float


@dataclass(frozen=True)
class PairResult:
    """A trained PairInteractionMoE on one task's held-out pairs.

    Attributes:
        accuracy: test accuracy.
        share: mean share of each expert in the logit of the true class, in the order of EXPERTS; see
            PairExplanation.expert_share.
        sample: the explanation of the first test sample.
    """

    task: Task
    accuracy: float
    share: tuple[float, ...]
    sample: SampleExplanation

    @property
    def most(self) -> str:
        return EXPERTS[self.share.index(max(self.share))]

    @property
    def as_expected(self) -> bool:
        return self.most == self.task.expert


def make_layer(task: Task, settings: Settings) -> PairInteractionMoE:
    return PairInteractionMoE(
        (settings.width, settings.width),
        num_classes=task.num_classes,
        rank=settings.pair_rank,
        value_dim=settings.pair_value_dim,
        normalizer=settings.pair_normalizer,
    )


def train_layer(
    task: Task, pairs: Pairs, encoded: Encoded, settings: Settings
) -> PairInteractionMoE:
    """Train a fresh layer on a task: cross entropy plus the weighted sum of the interaction losses."""
    from tqdm import tqdm

    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    layer = make_layer(task, settings)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings.pair_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.pair_learning_rate,
        total_steps=settings.pair_steps,
        pct_start=WARM_UP,
    )
    weight = settings.pair_interaction_weight
    steps = tqdm(range(settings.pair_steps), f"pairs {task.name:9}", unit="step", disable=None)
    for _ in steps:
        rows = torch.randint(len(pairs), (settings.pair_batch_size,), generator=generator)
        out = layer(*pairs.batch(encoded, rows), interaction_losses=weight > 0)
        loss = F.cross_entropy(out.logits, pairs.labels[rows])
        if weight > 0:
            loss = loss + weight * out.losses.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
    return layer.eval()


def evaluate(
    task: Task,
    layer: PairInteractionMoE,
    pairs: Pairs,
    encoded: Encoded,
    digits: Digits,
) -> PairResult:
    """Accuracy and shares over all pairs, and the explanation of the first of them."""
    explanation = layer.explain(*pairs.batch(encoded, slice(None)), pairs.labels)
    correct = explanation.logits.argmax(dim=1) == pairs.labels
    return PairResult(
        task=task,
        accuracy=correct.double().mean().item(),
        share=tuple(explanation.expert_share().mean(dim=0).tolist()),
        sample=explain_first(explanation, pairs, digits),
    )


def explain_first(explanation: PairExplanation, pairs: Pairs, digits: Digits) -> SampleExplanation:
    """What is shown of the first of the explained pairs."""
    patches = explanation.shapley_values()
    total = sum(float(values[0].double().sum()) for values in patches)
    images = [digits.images[index[0], 0] for index in pairs.index]
    a, b = (int(digits.labels[index[0]]) for index in pairs.index)
    return SampleExplanation(
        digits=(a, b),
        images=(images[0].tolist(), images[1].tolist()),
        label=int(pairs.labels[0]),
        guess=int(explanation.logits[0].argmax()),
        valid=(pairs.masks[0][0].tolist(), pairs.masks[1][0].tolist()),
        patches=(patches[0][0].tolist(), patches[1][0].tolist()),
        pairs=explanation.pair_map()[0].sum(dim=0).tolist(),
        error=abs(total - float(explanation.value[0] - explanation.baseline[0])),
    )


def run_task(
    task: Task,
    train_pairs: Pairs,
    test_pairs: Pairs,
    encoded: Encoded,
    digits: Digits,
    settings: Settings,
) -> PairResult:
    layer = train_layer(task, train_pairs, encoded, settings)
    return evaluate(task, layer, test_pairs, encoded, digits)


def as_dict(result: PairResult) -> dict[str, object]:
    """For demo.json; the images themselves are left out."""
    sample = dataclasses.asdict(result.sample)
    sample.pop("images")
    return {
        "accuracy": result.accuracy,
        "share": dict(zip(EXPERTS, result.share, strict=True)),
        "most_relied_on": result.most,
        "as_expected": result.as_expected,
        "first_sample": sample,
    }
