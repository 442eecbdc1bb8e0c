"""Models whose worst case under attack is known, and a toy random defence that counts its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.attack import Attack
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.runtime.seed import generator

Model = Callable[[Tensor], Tensor]


@dataclass
class LinearProblem:
    """Logits W x + b on images (B, 1, 6, 6) in the middle of the pixel range, all classified correctly.

    Attacking class y in favour of class j gains at most the dual norm of w_j - w_y times eps.
    """

    weights: Tensor
    bias: Tensor
    images: Tensor
    labels: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T + self.bias

    def found_by(self, attack: Attack) -> Tensor:
        """The examples that an attack makes of this problem, (B, 1, 6, 6)."""
        return attack(ClassifierTarget(self), self.images, self.labels)

    def margins(self, images: Tensor) -> Tensor:
        """Signed lead of each rival over the label, (B, C), -inf for the label itself."""
        logits = self(images)
        lead = logits - logits.gather(1, self.labels[:, None])
        return lead.masked_fill(F.one_hot(self.labels, logits.shape[1]).bool(), -torch.inf)

    def margin(self, images: Tensor) -> Tensor:
        return self.margins(images).amax(dim=1)

    def towards(self) -> Tensor:
        """w_j - w_y for each image and class j, (B, C, D)."""
        return self.weights[None] - self.weights[self.labels][:, None]

    def worst_margin(self, norm: str, eps: float | Tensor) -> Tensor:
        """Largest margin in the ball where the pixel range does not bind, (B,)."""
        radii = torch.as_tensor(eps).expand(len(self.images))[:, None]
        dual = self.towards().norm(p=1 if norm == "linf" else 2, dim=2)
        worst: Tensor = (self.margins(self.images) + radii * dual).amax(dim=1)
        return worst

    def worst_margin_in_box(self, eps: float) -> Tensor:
        """Largest margin in the linf ball cut to [0, 1], (B,)."""
        pixels = self.images.flatten(1)[:, None]
        down, up = (-pixels).clamp(min=-eps), (1 - pixels).clamp(max=eps)
        gain = torch.maximum(self.towards() * down, self.towards() * up).sum(dim=2)
        return (self.margins(self.images) + gain).amax(dim=1)

    def distance(self, norm: str) -> Tensor:
        """Exact distance of each image from the decision boundary, (B,)."""
        dual = self.towards().norm(p=1 if norm == "linf" else 2, dim=2)
        nearest: Tensor = (-self.margins(self.images) / dual).nan_to_num(nan=torch.inf).amin(dim=1)
        return nearest


def make_problem(classes: int, *, images: int = 12, spread: float = 0.2) -> LinearProblem:
    """Rivals of class 0 share a direction, so cross-entropy grows along one line and its maximum is exact."""
    source = generator(0, "problem", classes)
    direction = torch.randn(36, generator=source)
    weights = torch.stack([direction, *[-direction] * (classes - 1)])
    points = 0.5 + spread * (2 * torch.rand((400, 1, 6, 6), generator=source) - 1)
    lead = 2 * points.flatten(1) @ direction
    bias = torch.zeros(classes)
    bias[0] = -lead.median() / 2 + 0.3
    bias[1:] = bias[0] * -1 - 0.1 * torch.arange(classes - 1)
    problem = LinearProblem(weights, bias, points, torch.zeros(400, dtype=torch.long))
    chosen = (problem.margin(points) < -0.4).nonzero()[:images, 0]
    return LinearProblem(weights, bias, points[chosen], problem.labels[chosen])


@pytest.fixture(params=[2, 3], ids=["binary", "three-classes"])
def problem(request: pytest.FixtureRequest) -> LinearProblem:
    return make_problem(request.param)


@pytest.fixture
def three_classes() -> LinearProblem:
    return make_problem(3)


@pytest.fixture
def linear() -> Callable[[int], LinearProblem]:
    """Make the problem of a given number of classes."""
    return make_problem


@pytest.fixture
def wave() -> Callable[[float], Model]:
    """Make a model of two classes whose loss has many maxima, the more the higher the frequency."""

    def make(frequency: float) -> Model:
        def rugged(images: Tensor) -> Tensor:
            height = torch.sin(frequency * images.flatten(1)).sum(dim=1)
            return torch.stack([-height, height], dim=1)

        return rugged

    return make


@dataclass
class ToyDefence:
    """Condition: a tanh layer. Reconstruction: linear in condition and latents. Classifier: two layers."""

    n_samples: int = 3
    features: int = 6
    latents: int = 2
    classes: int = 3
    noise: float = 0.3
    pixels: tuple[int, int, int] = (1, 4, 4)
    passes: list[int] = field(default_factory=list)
    conditions: int = 0

    def __post_init__(self) -> None:
        source = generator(0, "toy")
        size = self.pixels[0] * self.pixels[1] * self.pixels[2]
        self.encode = torch.randn(size, self.features, generator=source) / 2
        self.show = torch.randn(self.features, size, generator=source) / 2
        self.vary = self.noise * torch.randn(self.latents, size, generator=source)
        self.hidden = torch.randn(size, 8, generator=source) / 2
        self.head = torch.randn(8, self.classes, generator=source).requires_grad_()

    def classifier(self, images: Tensor) -> Tensor:
        return torch.tanh((images.flatten(1) - 0.5) @ self.hidden) @ self.head

    second_classifier = classifier

    def condition(self, images: Tensor) -> Tensor:
        self.conditions += 1
        return torch.tanh((images.flatten(1) - 0.5) @ self.encode)

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.randn(batch, n_samples or self.n_samples, self.latents, generator=generator)

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        shown = (condition @ self.show)[:, None] + latents @ self.vary
        return torch.sigmoid(shown).reshape(*latents.shape[:2], *self.pixels)

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        self.passes.append(latents.shape[0] * latents.shape[1])
        return self.classifier(self.decode(condition, latents).flatten(0, 1)).reshape(*latents.shape[:2], -1)

    def aggregate(self, sample_logits: Tensor, view: str = "log-probability") -> Tensor:
        exact = sample_logits.logsumexp(dim=1)
        if view == "exact":
            return exact
        if view == "log-probability":
            return exact.exp().log_softmax(dim=1)
        probability = (100 * exact).exp().softmax(dim=1)
        return torch.log(probability / (1 - probability))


@pytest.fixture
def toy() -> ToyDefence:
    return ToyDefence()


@pytest.fixture
def attacked(toy: ToyDefence) -> Callable[..., DefenceTarget]:
    """Make a target of the toy defence: `attacked(samples_per_pass=…, view=…, seed=…)`."""

    def make(*, samples_per_pass: int = 4096, view: Any = "exact", seed: int = 0) -> DefenceTarget:
        return DefenceTarget(toy, view, samples_per_pass, generator(seed, "latents"))

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.rand((5, 1, 4, 4), generator=generator(1, "images"))


@pytest.fixture
def labels(toy: ToyDefence, images: Tensor) -> Tensor:
    """The toy defence's own predictions with its latents at zero."""
    sample_logits = toy.sample_logits(toy.condition(images), torch.zeros(len(images), 1, toy.latents))
    toy.passes.clear()
    toy.conditions = 0
    return sample_logits[:, 0].argmax(dim=1).detach()


@pytest.fixture(scope="session")
def digits() -> tuple[Model, Tensor, Tensor]:
    """A small network trained on scikit-learn's 8x8 digits: model, 100 test images, their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(data.target, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)
        )
        optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(120):
            loss = F.cross_entropy(network(pixels[:1400]), classes[:1400])
            for parameter, slope in zip(
                network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True
            ):
                parameter.grad = slope
            optimiser.step()
    return network.requires_grad_(False), pixels[1600:1700], classes[1600:1700]
