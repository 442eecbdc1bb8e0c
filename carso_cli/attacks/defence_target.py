"""A random defence under attack, with Expectation over Transformation (Athalye et al., 2018).

Axes: B images, N samples per image, K draws, C classes, F condition features, Z latent features.

The deterministic part, from image to condition, runs once per call; only decoding and classification run
K times. Those K * B draws of N reconstructions each are taken in passes of at most `samples_per_pass`, so
memory is bounded whatever K is, and one backward pass goes through the deterministic part.

    target = DefenceTarget(defence, "exact", samples_per_pass=4096, generator=generator(0, "latents"))
    answer = target.loss_and_gradient(images, labels, cross_entropy, draws=20)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from carso_cli.attacks.losses import Loss
from carso_cli.attacks.passes import Passes
from carso_cli.attacks.target import VJP, ExpectedLoss, LossGradient, correctness, saturation, vjp_of
from carso_cli.errors import UsageError

View = str | Callable[[Tensor], Tensor]
"""Name of a defence's output view, or a function from (B, N, C) sample logits to (B, C) logits."""


class AttackedDefence(Protocol):
    """The part of `carso_cli.defence.defended_model.Defence` that attacks use."""

    n_samples: int

    @property
    def classifier(self) -> Callable[[Tensor], Tensor]:
        """The classifier that the purifier listens to, images to (B, C) logits."""

    @property
    def second_classifier(self) -> Callable[[Tensor], Tensor]:
        """The classifier of the reconstructions."""

    def condition(self, images: Tensor) -> Tensor:
        """Map images to (B, F) conditions; deterministic. A condition may have any shape after B."""

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (batch, N, Z) latents."""

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        """Decode (B, F) and (B, N, Z) into reconstructions (B, N, channels, H, W)."""

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        """Decode and classify: (B, F) and (B, N, Z) to (B, N, C)."""

    def aggregate(self, sample_logits: Tensor, view: str = ...) -> Tensor:
        """Aggregate (B, N, C) sample logits into (B, C)."""


@dataclass(frozen=True, eq=False)
class DefenceTarget:
    """A defence as a target, seen through one of its views.

    Args:
        defence: The defence; frozen, in evaluation mode.
        view: What is attacked: `exact`, `log-probability`, `released`, or a surrogate function from
            (B, N, C) sample logits to (B, C) logits.
        samples_per_pass: Most reconstructions decoded and classified in one pass; at least N. Where memory
            does not hold them, passes shrink.
        generator: Source of the latents, owned by this target: an attack repeats bit for bit from a
            generator of the same seed, and no two steps share latents.
        n_samples: N, reconstructions per image; the defence's own when None.
        latents: (N, Z) latents used for every image and call, which makes the target deterministic;
            None draws afresh.

    Raises:
        UsageError: If one draw of an image does not fit into a pass.
    """

    defence: AttackedDefence
    view: View
    samples_per_pass: int
    generator: torch.Generator
    n_samples: int | None = None
    latents: Tensor | None = None
    _passes: Passes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples_per_pass < self.samples:
            raise UsageError(
                f"samples_per_pass {self.samples_per_pass} is below the {self.samples} samples of one draw",
                hint=f"set evaluation.samples_per_pass to at least {self.samples}",
            )
        object.__setattr__(self, "_passes", Passes(self.samples_per_pass // self.samples))

    @property
    def stochastic(self) -> bool:
        """Whether latents are drawn afresh at every call."""
        return self.latents is None

    @property
    def samples(self) -> int:
        """N, reconstructions per image and draw."""
        if self.latents is not None:
            return len(self.latents)
        return self.n_samples or self.defence.n_samples

    def seen_as(self, view: View, n_samples: int | None = None) -> DefenceTarget:
        """Return the same defence through another view, fed by the same generator."""
        return replace(self, view=view, n_samples=n_samples or self.n_samples)

    def frozen(self) -> DefenceTarget:
        """Return a deterministic target: one draw of N latents, the same for all images and calls."""
        return replace(self, latents=self._draw(1)[0])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits of one draw of N samples per image."""
        condition = self.defence.condition(images)
        latents = self._draw(len(images))
        return torch.cat(
            self._passes.over(len(images), lambda part: self._logits(condition[part], latents[part]))
        )

    def vjp(self, images: Tensor) -> tuple[Tensor, VJP]:
        """Return the logits of one draw and the map of gradients back to the images.

        A draw that needs several passes is computed again, with the same latents, when pulled back.
        """
        condition, through_prefix = vjp_of(self.defence.condition, images)
        latents = self._draw(len(images))

        def tail(part: slice) -> tuple[Tensor, VJP]:
            return vjp_of(lambda chunk: self._logits(chunk, latents[part]), condition[part])

        if len(images) <= self._passes.largest:
            whole = self._passes.over(len(images), tail)
            if len(whole) == 1:
                ((logits, through_tail),) = whole
                return logits, lambda cotangent: through_prefix(through_tail(cotangent))
        with torch.no_grad():
            parts = self._passes.over(len(images), lambda part: self._logits(condition[part], latents[part]))
        return torch.cat(parts), lambda cotangent: through_prefix(
            torch.cat(self._passes.over(len(images), lambda part: tail(part)[1](cotangent[part])))
        )

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, draws: int) -> ExpectedLoss:
        """Return the mean loss over K = `draws` draws of the latents."""
        with torch.no_grad():
            condition = self.defence.condition(images)
        answer = self._over_draws(condition, labels, loss, draws, with_gradient=False)
        return ExpectedLoss(answer.loss, answer.correct, answer.saturated)

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, draws: int) -> LossGradient:
        """Return the mean loss over K = `draws` draws of the latents, and its gradient at the images."""
        condition, through_prefix = vjp_of(self.defence.condition, images)
        answer = self._over_draws(condition, labels, loss, draws, with_gradient=True)
        return replace(answer, gradient=through_prefix(answer.gradient))

    def _over_draws(
        self, condition: Tensor, labels: Tensor, loss: Loss, draws: int, *, with_gradient: bool
    ) -> LossGradient:
        """Average over the draws; `gradient` is taken at the (B, F) conditions, zeros if not wanted."""
        batch = len(condition)
        latents = self._draw(draws * batch)

        def one_pass(part: slice) -> tuple[Tensor, ...]:
            """Return losses, correctness, saturation and slopes of some units, each (units, ...)."""
            # Unit u of the K * B is draw u // B of image u % B.
            images = torch.arange(part.start, part.stop, device=condition.device) % batch
            chunk = condition[images].requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = self._logits(chunk, latents[part])
                values = loss(logits, labels[images])
            slope = torch.autograd.grad(values.sum(), chunk)[0] if with_gradient else torch.zeros_like(chunk)
            found = logits.detach()
            known = labels[images]
            return values.detach(), correctness(found, known), saturation(found, known), slope

        columns = self._passes.over(draws * batch, one_pass)
        means = [
            torch.cat(column).reshape(draws, batch, *column[0].shape[1:]).mean(dim=0)
            for column in zip(*columns, strict=True)
        ]
        return LossGradient(*means)

    def _draw(self, batch: int) -> Tensor:
        if self.latents is not None:
            return self.latents.expand(batch, -1, -1)
        return self.defence.draw_latents(batch, self.samples, self.generator)

    def _logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        sample_logits = self.defence.sample_logits(condition, latents)
        if callable(self.view):
            return self.view(sample_logits)
        return self.defence.aggregate(sample_logits, self.view)
