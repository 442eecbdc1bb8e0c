"""Tiny networks for 8x8 digits, trained once and stored beside this file.

    python tests/audit/zoo_networks.py    trains them again and writes `networks.safetensors` (two minutes)

- `robust`, `plain`: one convolutional network, trained on adversarial examples and on clean images;
- `norm`: the plain one with batch normalisation;
- `winners`: the plain one with k-winners-take-all for activations (Xiao et al., 2020);
- `transformer`: a small vision transformer, trained on adversarial examples.

Weights are stored as float16, which halves the file and changes no accuracy.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 0.1
TRAINING_IMAGES = 1400
WEIGHTS = Path(__file__).with_name("networks.safetensors")
ROBUST = ("robust", "transformer")
"""Networks that are trained on adversarial examples."""


@cache
def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    # 8-bit pixels, as in an image file.
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)).round() / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(18))
    return images[order], torch.tensor(digits.target)[order]


def training_images() -> tuple[Tensor, Tensor]:
    """Return (1400, 1, 8, 8) images and their labels."""
    images, labels = _digits()
    return images[:TRAINING_IMAGES].clone(), labels[:TRAINING_IMAGES].clone()


def held_out_images(count: int) -> tuple[Tensor, Tensor]:
    """Return the first of the 397 images that no network was trained on, (count, 1, 8, 8), and labels."""
    images, labels = _digits()
    rows = slice(TRAINING_IMAGES, TRAINING_IMAGES + count)
    return images[rows].clone(), labels[rows].clone()


class Winners(nn.Module):
    """k-winners-take-all: the largest fifth of all features is kept, the others become zero."""

    share = 0.2

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(1)
        least = flat.topk(int(self.share * flat.shape[1]), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, torch.zeros_like(flat)).reshape(features.shape)


class Network(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        activation: Kind of the three activations.
        norm: Whether batch normalisation follows the first convolution.
    """

    def __init__(self, activation: type[nn.Module] = nn.ReLU, *, norm: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12) if norm else nn.Identity(),
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1),
            activation(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 48),
            activation(),
        )
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(images))
        return scores


class Transformer(nn.Module):
    """A vision transformer with 2x2 patches, 24 features and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 2, stride=2)
        self.position = nn.Parameter(0.1 * torch.randn(1, 16, 24))
        self.blocks = nn.Sequential(*(self._block() for _ in range(2)))
        self.head = nn.Linear(24, 10)

    @staticmethod
    def _block() -> nn.Module:
        return nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        scores: Tensor = self.head(self.blocks(tokens).mean(dim=1))
        return scores


def _untrained() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {
            "robust": Network(),
            "plain": Network(),
            "norm": Network(norm=True),
            "winners": Network(Winners),
            "transformer": Transformer(),
        }


def _adversarial(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    change = (2 * torch.rand_like(images) - 1) * EPS
    for _ in range(5):
        change.requires_grad_()
        loss = F.cross_entropy(network(images + change), labels)
        (gradient,) = torch.autograd.grad(loss, change)
        change = (change.detach() + 0.04 * gradient.sign()).clamp(-EPS, EPS)
        change = (images + change).clamp(0, 1) - images
    return images + change


def train(name: str, epochs: int = 30) -> nn.Module:
    """Train a network by its name; the same name gives the same weights."""
    network = _untrained()[name].train()
    images, labels = training_images()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2 if name != "transformer" else 5e-3, total_steps=epochs * len(images) // 100
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).reshape(-1, 100):
                shown = images[rows]
                if name in ROBUST:
                    shown = _adversarial(network, shown, labels[rows])
                optimizer.zero_grad()
                F.cross_entropy(network(shown), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.eval().requires_grad_(False)


@cache
def _stored() -> dict[str, nn.Module]:
    stored = load_file(WEIGHTS)
    networks = _untrained()
    for name, network in networks.items():
        own = {
            key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")
        }
        network.load_state_dict(own)
        network.eval().requires_grad_(False)
    return networks


def load(name: str) -> nn.Module:
    """Return a network of its own each time, in eval mode and frozen, with the stored weights."""
    return copy.deepcopy(_stored()[name])


def main() -> None:
    """Train all and store them."""
    weights: dict[str, Tensor] = {}
    for name in _untrained():
        for key, value in train(name).state_dict().items():
            weights[f"{name}.{key}"] = value.half() if value.is_floating_point() else value
    save_file(weights, WEIGHTS)


if __name__ == "__main__":
    main()
