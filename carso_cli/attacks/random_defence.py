"""What a random defence may say of itself so that it is attacked faster; an audit never requires it.

Axes: B images, N samples per image, C classes, F features of a condition, Z latent features.

Any model that maps images to scores can be audited. One that says where its randomness enters is attacked
by the same attacks in a fraction of the time: what is deterministic runs once for all samples of a gradient,
and all samples of all images share passes whose size is bounded. Nothing is inherited; a whole defence:

    class Smoothed:
        '''Gaussian noise before a classifier; the mean of N samples' probabilities decides.'''

        n_samples = 8

        def __init__(self, classifier):
            self.classifier = self.second_classifier = classifier

        def condition(self, images):
            return images

        def draw_latents(self, batch, n_samples=None, generator=None):
            return torch.randn(batch, n_samples or self.n_samples, 3, 32, 32, generator=generator)

        def decode(self, condition, latents):
            return condition[:, None] + 0.1 * latents

        def sample_logits(self, condition, latents):
            samples = self.decode(condition, latents)
            return self.classifier(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])

        def aggregate(self, sample_logits, view="log-probability"):
            return sample_logits.log_softmax(dim=2).logsumexp(dim=1)

    audit(Smoothed(classifier), images, labels, eps=8 / 255)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class RandomDefence(Protocol):
    """A defence whose answer is a function of an image's condition and of N latents drawn afresh per call.

    An answer is `aggregate(sample_logits(condition(images), draw_latents(B)))`. Every step but the drawing is
    deterministic, and treats the images of a batch apart. `condition`, `sample_logits` and `aggregate` are
    differentiable where attacks are to follow gradients. `carso_cli.Defence` is one.
    """

    n_samples: int
    """N, samples per image of one answer."""

    @property
    def classifier(self) -> Callable[[Tensor], Tensor]:
        """The classifier without the defence, (B, channels, H, W) to (B, C); attacked as a surrogate too."""

    @property
    def second_classifier(self) -> Callable[[Tensor], Tensor]:
        """The classifier of what `decode` returns; often the same."""

    def condition(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images in [0, 1] to (B, F) conditions, of any shape after B."""

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (batch, N, Z) latents, of any shape after N, on the defence's device.

        Args:
            batch: Number of images.
            n_samples: N; the defence's own when None.
            generator: Source of all random numbers, on the CPU: one seed gives the same latents everywhere.
        """

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        """Map (B, F) and (B, N, Z) to the N images, (B, N, channels, H, W), that are classified."""

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        """Decode and classify: (B, F) and (B, N, Z) to (B, N, C)."""

    def aggregate(self, sample_logits: Tensor, view: str = ...) -> Tensor:
        """Aggregate (B, N, C) into (B, C) scores, the largest of which is the decision.

        `view` names the form of the scores: `log-probability` is what the defence returns, `exact` what is
        attacked and `released` what its authors published. They decide alike; a defence may ignore it.
        """


class ExactScores:
    """A random defence as a model: images to the exact scores of one answer, its latents drawn afresh.

    Args:
        defence: The defence; its latents come from torch's global generator.
    """

    def __init__(self, defence: RandomDefence) -> None:
        self.defence = defence
        # Held here too, so that the modules of a defence that is no module itself are found.
        self.classifier, self.second_classifier = defence.classifier, defence.second_classifier

    def __call__(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images in [0, 1] to (B, C) scores."""
        latents = self.defence.draw_latents(len(images))
        sample_logits = self.defence.sample_logits(self.defence.condition(images), latents)
        return self.defence.aggregate(sample_logits, "exact")
