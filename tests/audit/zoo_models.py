"""Ways in which a model hides its gradient, changes its mind, or only looks as if it did.

Every class wraps the network that it is given; `zoo.py` says which are sound and how robust they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Around(nn.Module):
    """A model around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(self.prepare(images))
        return self.finish(scores)

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def finish(self, scores: Tensor) -> Tensor:
        return scores


def straight(images: Tensor, changed: Tensor) -> Tensor:
    """Return `changed` with the gradient of the identity."""
    return changed.detach() + images - images.detach()


class Scaled(Around):
    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__(net)
        self.factor = factor

    def finish(self, scores: Tensor) -> Tensor:
        return scores * self.factor


class Probabilities(Around):
    def finish(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=1)


class LogProbabilities(Around):
    def finish(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=1)


class DeadClass(Around):
    """An eleventh class that is never meant, as of a head cut down to fewer classes."""

    def finish(self, scores: Tensor) -> Tensor:
        return F.pad(scores, (0, 1), value=-1e4)


class MaskedClasses(Around):
    """Two classes more, which are ruled out."""

    def finish(self, scores: Tensor) -> Tensor:
        return F.pad(scores, (0, 2), value=-torch.inf)


class Distilled(Around):
    """Probabilities at the temperature 1/40, as after distillation at 40 (Papernot et al., 2016)."""

    def finish(self, scores: Tensor) -> Tensor:
        return (40 * scores).softmax(dim=1)


class ClampedLog(Around):
    def finish(self, scores: Tensor) -> Tensor:
        return (30 * scores).softmax(dim=1).clamp(1e-6, 1 - 1e-6).log()


class RoundedScores(Around):
    def finish(self, scores: Tensor) -> Tensor:
        return (2 * scores).round() / 2


class Flipped(Around):
    """Follows the gradient the wrong way round."""

    def finish(self, scores: Tensor) -> Tensor:
        return 2 * scores.detach() - scores


class SometimesFlipped(Flipped):
    """The same at every second call or so; what is answered is never random."""

    def finish(self, scores: Tensor) -> Tensor:
        return super().finish(scores) if float(torch.rand(())) < 0.6 else scores


class SometimesNaN(Around):
    def finish(self, scores: Tensor) -> Tensor:
        broken = torch.sqrt(0 * scores.sum()) * 0
        return scores + broken if float(torch.rand(())) < 0.3 else scores


class Decoy(Around):
    """Answers as the network, and has the gradient of an untrained one."""

    def __init__(self, net: nn.Module, decoy: nn.Module) -> None:
        super().__init__(net)
        self.decoy = decoy

    def forward(self, images: Tensor) -> Tensor:
        decoy = self.decoy(images)
        scores: Tensor = self.net(images).detach() + decoy - decoy.detach()
        return scores


class TrueAtTheStart(Decoy):
    """The network's gradient while the answer is clear, the decoy's where it no longer is."""

    def forward(self, images: Tensor) -> Tensor:
        scores = self.net(images)
        first, second = scores.detach().topk(2, dim=1).values.unbind(dim=1)
        return torch.where((first - second > 2)[:, None], scores, super().forward(images))


class ByGradientMode(Decoy):
    """Answers from another network while gradients are recorded."""

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.decoy(images) if images.requires_grad else self.net(images)
        return scores


class InFloat64(Around):
    def prepare(self, images: Tensor) -> Tensor:
        return images.double()


class InBFloat16(Around):
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(images)


class Quantised(Around):
    def prepare(self, images: Tensor) -> Tensor:
        return (7 * images).round() / 7


class QuantisedLeak(Quantised):
    """Lets a small gradient through that points the wrong way."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) - 1e-3 * torch.tanh(self.net(images))


class NoisyQuantised(Around):
    def prepare(self, images: Tensor) -> Tensor:
        return (7 * (images + 0.05 * torch.randn_like(images))).round() / 7


class BlockDCT(Around):
    """Rounds the coefficients of the cosine transform, as JPEG does with each 8x8 block."""

    step = 0.15
    basis: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        place = torch.arange(8.0)
        basis = torch.cos(torch.pi * (2 * place[None] + 1) * place[:, None] / 16) / 2
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis)

    def prepare(self, images: Tensor) -> Tensor:
        coefficients = self.basis @ images @ self.basis.T
        rounded = (coefficients / self.step).round() * self.step
        return (self.basis.T @ rounded @ self.basis).clamp(0, 1)


class Thermometer(Around):
    """Codes each pixel by the thresholds that it passes, and decodes them; comparisons have no gradient."""

    def prepare(self, images: Tensor) -> Tensor:
        return (images[..., None] > torch.arange(8) / 8).float().mean(dim=-1)


class Median(Around):
    """The middle of each pixel's 3x3 neighbourhood."""

    def prepare(self, images: Tensor) -> Tensor:
        patches = F.unfold(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3)
        return patches.median(dim=1).values.reshape(images.shape)


class Ripple(Around):
    """Adds waves to the pixels: a gradient that is right, and leads into the nearest trough."""

    height, frequency = 0.05, 60.0

    def prepare(self, images: Tensor) -> Tensor:
        return images + self.height * torch.sin(self.frequency * images)


class ChannelRipple(Ripple):
    """The same in a quarter of the pixels."""

    def prepare(self, images: Tensor) -> Tensor:
        some = torch.zeros_like(images)
        some[..., ::2, ::2] = 1
        return torch.lerp(images, super().prepare(images), some)


class PartSaw(Around):
    """Adds a wave of the mean brightness to the scores of two classes, too small to change a decision."""

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images).clone()
        scores[:, 3:5] += 0.05 * torch.sin(1000 * images.flatten(1).sum(dim=1))[:, None]
        return scores


class AntiAdversary(Around):
    """Moves each image towards its own decision first (Alfarra et al., 2022); that move has no gradient."""

    def prepare(self, images: Tensor) -> Tensor:
        moved = images.detach()
        with torch.enable_grad():
            for _ in range(2):
                moved = moved.detach().requires_grad_()
                scores = self.net(moved)
                loss = F.cross_entropy(scores, scores.argmax(dim=1), reduction="sum")
                (gradient,) = torch.autograd.grad(loss, moved)
                moved = (moved - 0.1 * gradient.sign()).clamp(0, 1)
        return images + (moved - images).detach()


class ThroughNumpy(Around):
    def prepare(self, images: Tensor) -> Tensor:
        return torch.from_numpy(images.detach().numpy().copy())


class WithoutGradient(Around):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class InInferenceMode(Around):
    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class Detector(Around):
    """Answers class 0 to every image with more ink in its first column than clean ones have."""

    limit, sure = 0.04, 5.0

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        constant = torch.zeros_like(scores)
        constant[:, 0] = self.sure
        return torch.where((edge_ink(images) > self.limit)[:, None], constant, scores)


class NaNDetector(Detector):
    """Answers NaN instead."""

    sure = torch.nan


def edge_ink(images: Tensor) -> Tensor:
    """Return the mean of the first column of pixels, (B,); a digit hardly ever reaches it."""
    return images[..., 0].mean(dim=(1, 2))


class Noise(Around):
    def __init__(self, net: nn.Module, sigma: float) -> None:
        super().__init__(net)
        self.sigma = sigma

    def prepare(self, images: Tensor) -> Tensor:
        return images + self.sigma * torch.randn_like(images)


class NumpyNoise(Noise):
    def prepare(self, images: Tensor) -> Tensor:
        drawn = np.random.normal(0, self.sigma, images.shape)
        return images + torch.from_numpy(drawn).to(images.dtype)


class OwnGenerator(Noise):
    """Draws from a generator that no global seed reaches."""

    def __init__(self, net: nn.Module, sigma: float) -> None:
        super().__init__(net, sigma)
        self.generator = torch.Generator().manual_seed(0)

    def prepare(self, images: Tensor) -> Tensor:
        return images + self.sigma * torch.randn(images.shape, generator=self.generator)


class NoiseOffClean(Noise):
    """Deterministic on clean images, random on those that look attacked."""

    def prepare(self, images: Tensor) -> Tensor:
        odd = (edge_ink(images) > Detector.limit)[:, None, None, None]
        return torch.where(odd, super().prepare(images), images)


class EdgeNoise(Noise):
    """Random where two classes score nearly alike, and nowhere else."""

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images)
        first, second = scores.detach().topk(2, dim=1).values.unbind(dim=1)
        return torch.where(
            (first - second < 1)[:, None], scores + self.sigma * torch.randn_like(scores), scores
        )


class Dropout(Around):
    """Monte-Carlo dropout before the last layer."""

    def forward(self, images: Tensor) -> Tensor:
        features: Any = self.net.features
        head: Any = self.net.head
        scores: Tensor = head(F.dropout(features(images), 0.3, training=True))
        return scores


class Pruning(Around):
    """Keeps features of the first layer with a chance that grows with them (Dhillon et al., 2018)."""

    detached = False

    def forward(self, images: Tensor) -> Tensor:
        features: Any = self.net.features
        head: Any = self.net.head
        first = features[:3](images)
        total = first.flatten(1).sum(dim=1)[:, None, None, None] + 1e-9
        kept = 1 - (1 - first / total) ** (0.5 * first[0].numel())
        if self.detached:
            kept = kept.detach()
        pruned = first * (torch.rand_like(first) < kept) / kept.clamp_min(1e-3)
        scores: Tensor = head(features[3:](pruned))
        return scores


class ResizeAndPad(Around):
    """Shrinks a whole batch at random and puts it at a random place (Xie et al., 2018)."""

    def prepare(self, images: Tensor) -> Tensor:
        size = int(torch.randint(6, 9, ()))
        left, top = (int(torch.randint(0, 9 - size, ())) for _ in range(2))
        small = F.interpolate(images, size=(size, size), mode="bilinear")
        return F.pad(small, (left, 8 - size - left, top, 8 - size - top))


class RandomMember(nn.Module):
    """One of several networks, drawn at each call."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.members[int(torch.randint(len(self.members), ()))](images)
        return scores


# Several networks, and answers that depend on more than the image.


class MajorityVote(RandomMember):
    """Counts the members' decisions, with their mean scores to break ties."""

    def forward(self, images: Tensor) -> Tensor:
        scores = torch.stack([member(images) for member in self.members])
        votes = F.one_hot(scores.argmax(dim=2), scores.shape[2]).float().sum(dim=0)
        return votes + 1e-3 * scores.detach().mean(dim=0)


class HalfDetached(RandomMember):
    """The mean of two networks, one of which is cut off from the gradient."""

    def forward(self, images: Tensor) -> Tensor:
        first, second = (member(images) for member in self.members)
        scores: Tensor = first.detach() + second
        return scores


class Mean(RandomMember):
    """The mean of the members' scores."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(dim=0)


class EveryFourth(RandomMember):
    """Answers from the second network at every fourth call."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        scores: Tensor = self.members[self.calls % 4 == 0](images)
        return scores


class BatchStatistics(Around):
    """Normalises by the batch that it is given, in eval mode too."""

    def forward(self, images: Tensor) -> Tensor:
        features: Any = self.net.features
        features[1].train()
        return super().forward(images)


class Remembers(Around):
    """Repeats the first answer that it gave near a point."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.points: Tensor | None = None
        self.answers: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        seen = images.detach().flatten(1).clone()
        if self.points is None or self.answers is None:
            self.points, self.answers = seen, scores.detach().clone()
            return scores
        distance, nearest = torch.cdist(seen, self.points, p=torch.inf).min(dim=1)
        return torch.where((distance < 0.21)[:, None], self.answers[nearest] + 0 * scores, scores)
