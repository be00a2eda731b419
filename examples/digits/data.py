"""Pairs of real digits as two modalities, with labels of known interaction.

A sample is a pair of handwritten digits, image A and image B. A separate frozen encoder for each
modality turns an image into 4 x 4 patch tokens. The label determines the kind of interaction:

    unique_a   the digit in A; B is drawn independently and has no information
    unique_b   the digit in B; A has no information
    redundant  the digit that both images show, in two different images: either image is enough
    synergy    the parity of the sum of both digits: a single image is no better than chance

Images are split once, before training: the encoders, their normalisation and the layer see training
images only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 10
GRID = 4
NUM_TOKENS = GRID * GRID
TEST_FRACTION = 1 / 3
ENCODER_BATCH = 128
EXPERTS = ("unique_a", "unique_b", "synergy", "redundancy")


@dataclass(frozen=True)
class Task:
    """A labelling of the pairs, and the expert that it needs by construction."""

    name: str
    expert: str
    num_classes: int
    meaning: str

    @property
    def chance(self) -> float:
        return 1.0 / self.num_classes


TASKS = (
    Task("unique_a", "unique_a", NUM_CLASSES, "the digit in A"),
    Task("unique_b", "unique_b", NUM_CLASSES, "the digit in B"),
    Task("redundant", "redundancy", NUM_CLASSES, "the digit in both"),
    Task("synergy", "synergy", 2, "parity of A + B"),
)


@dataclass(frozen=True)
class Digits:
    """Labelled images (N, 1, 8, 8) in [0, 1] and the split of their indices into train and test."""

    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Encoded:
    """Frozen features of all images: a tensor (N, tokens, width) per modality."""

    tokens: tuple[Tensor, Tensor]
    accuracy: tuple[float, float]


@dataclass(frozen=True)
class Pairs:
    """Samples of a task: image indices per modality, labels (S)."""

    index: tuple[Tensor, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def batch(self, encoded: Encoded, rows: Tensor | slice) -> list[Tensor]:
        """Token sequences [(B, tokens, width)] * 2."""
        both = zip(encoded.tokens, self.index, strict=True)
        return [tokens[index[rows]] for tokens, index in both]


def load(seed: int) -> Digits:
    """The 1,797 handwritten digits that scikit-learn ships, split by image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.as_tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = round(len(labels) * TEST_FRACTION)
    return Digits(images, labels, train=order[held_out:], test=order[:held_out])


class PatchEncoder(nn.Module):
    """Three convolutions from an 8 x 8 digit to 16 tokens, one per 2 x 2 patch and its surroundings.

    The classification head reads the mean of the tokens, so that every token carries evidence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, width, 3, padding=1),
        )
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (N, 16, width), row by row."""
        return self.body(images).flatten(2).transpose(1, 2)


def train_encoder(
    digits: Digits, width: int, generator: torch.Generator, steps: int
) -> PatchEncoder:
    """Train an encoder to classify the training images, then freeze it."""
    encoder = PatchEncoder(width)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    for _ in range(steps):
        pick = torch.randint(len(digits.train), (ENCODER_BATCH,), generator=generator)
        rows = digits.train[pick]
        logits = encoder.head(encoder(digits.images[rows]).mean(dim=1))
        optimizer.zero_grad()
        F.cross_entropy(logits, digits.labels[rows]).backward()
        optimizer.step()
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def _encode(encoder: PatchEncoder, digits: Digits) -> tuple[Tensor, float]:
    """Tokens of all images, standardised over the training images, and the encoder's test accuracy.

    They are standardised, because the perturbed views replace a modality by N(0, 1) noise.
    """
    tokens = encoder(digits.images)
    guess = encoder.head(tokens.mean(dim=1)).argmax(dim=1)
    accuracy = (guess == digits.labels)[digits.test].float().mean().item()
    known = tokens[digits.train]
    scale = known.std(dim=(0, 1)).clamp_min(1e-6)
    return (tokens - known.mean(dim=(0, 1))) / scale, accuracy


def encode(digits: Digits, width: int, seed: int, steps: int) -> Encoded:
    """Features of both modalities, from two encoders trained separately from different initial weights."""
    tokens, accuracy = [], []
    for m in range(2):
        torch.manual_seed(seed * 2 + m)
        generator = torch.Generator().manual_seed(seed * 2 + m)
        features, score = _encode(train_encoder(digits, width, generator, steps), digits)
        tokens.append(features)
        accuracy.append(score)
    return Encoded((tokens[0], tokens[1]), (accuracy[0], accuracy[1]))


def make_pairs(
    task: Task, digits: Digits, rows: Tensor, samples: int, generator: torch.Generator
) -> Pairs:
    """Draw samples of a task from the images in rows (train or test indices, never both)."""
    by_class = [rows[digits.labels[rows] == c] for c in range(NUM_CLASSES)]
    counts = torch.tensor([len(group) for group in by_class])
    if int(counts.min()) < 2:
        raise ValueError(f"rows: expected at least 2 images of every digit, got {counts.tolist()}")
    starts = counts.cumsum(0) - counts
    grouped = torch.cat(by_class)

    def uniform() -> Tensor:
        return torch.rand(samples, generator=generator)

    digit_a = torch.randint(NUM_CLASSES, (samples,), generator=generator)
    digit_b = torch.randint(NUM_CLASSES, (samples,), generator=generator)
    if task.name == "redundant":
        digit_b = digit_a
    place_a = (uniform() * counts[digit_a]).long()
    place_b = (uniform() * counts[digit_b]).long()
    if task.name == "redundant":
        # Another image of the same digit: an offset of 1 to n - 1 modulo the n images of the class.
        step = 1 + (uniform() * (counts[digit_a] - 1)).long()
        place_b = (place_a + step) % counts[digit_a]
    labels = {
        "unique_a": digit_a,
        "unique_b": digit_b,
        "redundant": digit_a,
        "synergy": (digit_a + digit_b) % 2,
    }[task.name]
    index = (grouped[starts[digit_a] + place_a], grouped[starts[digit_b] + place_b])
    return Pairs(index, labels)
