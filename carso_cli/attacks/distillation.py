"""A surrogate distilled from a model's own answers, for models that give no gradient anywhere.

Title: "Practical Black-Box Attacks against Machine Learning" (Papernot et al., 2017),
https://arxiv.org/abs/1602.02697: a small network learns what the model answers on images, noisy and mixed
ones, and then, round by round, on images that its own gradient has perturbed.

    surrogate = distil(model, images, eps=8 / 255, seed=0)
    surrogate(images)                 # (B, C) scores, differentiably

It is no faithful copy: what an attack finds by it is always scored on the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.attacks.gradient_sources import finite_scores
from carso_cli.attacks.model_parts import Model
from carso_cli.runtime.seed import all_seeded, generator, seeded

_ROUNDS, _STEPS, _BATCH, _WIDTH = 5, 120, 128, 32
_MOST_IMAGES = 512
_SIDE = 32
"""Larger images are averaged down to this many pixels a side."""
_BATCH_OF_QUESTIONS = 128


class _SmallNetwork(nn.Module):
    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, _WIDTH, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, padding=1, stride=2), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(min(side // 2, 8) or 1), nn.Flatten()),
            *(nn.LazyLinear(128), nn.SiLU(), nn.Linear(128, classes)),
        )

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) > self.side:
            images = F.adaptive_avg_pool2d(images, self.side)
        scores: Tensor = self.layers(images)
        return scores


def distil(model: Model, images: Tensor, *, eps: float, seed: int = 0) -> nn.Module:
    """Train a small network to answer as a model does near some images; a few seconds on a CPU.

    Args:
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores.
        images: (M, channels, H, W); at most 512 of them are used.
        eps: Largest change of a pixel, in pixel units.
        seed: Seed of weights, noise and batches.

    Returns:
        The network, frozen; its scores have a standard deviation of about 1 per image.
    """
    images = images[:_MOST_IMAGES]
    source = generator(seed, "distillation")
    side = min(_SIDE, *images.shape[2:])
    asked, answers = _ask(model, _around(images, eps, source), seed)
    with seeded(seed, "distillation"):
        network = _SmallNetwork(images.shape[1], answers.shape[1], side)
        network(images[:1].cpu())
    network.to(images.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(_ROUNDS):
        with torch.enable_grad():
            for _ in range(_STEPS):
                rows = torch.randint(len(asked), (_BATCH,), generator=source).to(images.device)
                optimizer.zero_grad()
                F.mse_loss(network(asked[rows]), answers[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        more, told = _ask(model, _perturbed(network, images, eps, source), seed)
        asked, answers = torch.cat([asked, more]), torch.cat([answers, told])
    return network.eval().requires_grad_(False)


@torch.no_grad()
def _ask(model: Model, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the images that a model has finite scores for, and those scores, brought to one scale."""
    answers = []
    for at in range(0, len(images), _BATCH_OF_QUESTIONS):
        with all_seeded(seed, "distillation"):
            scores = model(images[at : at + _BATCH_OF_QUESTIONS])
        answers.append(finite_scores(scores).detach().to(images.dtype))
    scores = torch.cat(answers)
    scores = scores - scores.mean(dim=1, keepdim=True)
    scores = scores / scores.std(dim=1, keepdim=True).clamp_min(1e-12)
    known = scores.isfinite().all(dim=1)
    return images[known], scores[known]


def _around(images: Tensor, eps: float, source: torch.Generator) -> Tensor:
    """Return images with noise of several kinds, and mixtures of two images."""
    noise = 2 * torch.rand(4, *images.shape, generator=source).to(images) - 1
    share = torch.rand(len(images), 1, 1, 1, generator=source).to(images)
    other = images[torch.randperm(len(images), generator=source).to(images.device)]
    changed = [
        images,
        images + eps * noise[0],
        images + eps * noise[1].sign(),
        images + 2 * eps * noise[2],
        torch.lerp(images, other, share),
        torch.lerp(images, other, share / 2) + eps * noise[3],
    ]
    return torch.cat(changed).clamp(0, 1)


def _perturbed(network: nn.Module, images: Tensor, eps: float, source: torch.Generator) -> Tensor:
    """Return images moved against the network's decision by steps of several sizes."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        scores = network(leaf)
        weights = torch.randn(scores.shape, generator=source).to(scores)
        weights.scatter_(1, scores.argmax(dim=1, keepdim=True), -2.0)
        (gradient,) = torch.autograd.grad((weights * scores).sum(), leaf)
    length = torch.rand(len(images), 1, 1, 1, generator=source).to(images)
    noise = 2 * torch.rand(images.shape, generator=source).to(images) - 1
    moved = [images + eps * gradient.sign(), images + eps * length * (gradient.sign() + noise) / 2]
    return torch.cat(moved).clamp(0, 1)
