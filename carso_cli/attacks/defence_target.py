"""The random defence under attack, with Expectation over Transformation (Athalye et al., 2018).

Axes: B images, N reconstructions per image, K EoT samples, C classes, F condition and Z latent features.

The deterministic part, from image to condition, runs once per call; only decoding and classification run
K times. The K * B units of N reconstructions each are taken in passes of at most `samples_per_pass`, so
memory is bounded whatever K is, and one backward pass goes through the deterministic part.

    target = DefenceTarget(defence, "exact", samples_per_pass=4096, generator=generator(0, "latents"))
    answer = target.loss_and_gradient(images, labels, cross_entropy, eot_samples=20)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from carso_cli.attacks.losses import Loss
from carso_cli.attacks.passes import Passes
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.attacks.target import VJP, ExpectedLoss, LossGradient, gradient_at, vjp_of
from carso_cli.errors import UsageError

View = str | Callable[[Tensor], Tensor]
"""Name of a defence's output view, or a function from (B, N, C) sample logits to (B, C) logits."""


@dataclass(frozen=True, eq=False)
class DefenceTarget:
    """A defence as a target, seen through one of its views.

    Args:
        defence: The defence; frozen, in evaluation mode.
        view: What is attacked: `exact`, `log-probability`, `released`, or a function from (B, N, C) sample
            logits to (B, C) logits, as surrogates have.
        samples_per_pass: Most reconstructions decoded and classified in one pass; at least N. Where memory
            does not hold them, passes shrink.
        generator: Source of the latents, used by nothing else: an attack repeats bit for bit from a
            generator of the same seed, and no two steps share latents.
        n_samples: N, reconstructions per image; the defence's own when None.
        latents: (N, Z) latents used for every image and call, which makes the target deterministic;
            new ones for each when None.
        followed: The same defence in a faster precision, whose gradients attacks follow, with the losses
            that come with them; `expected_loss` and a call are always the defence's own.

    Raises:
        UsageError: If the N reconstructions of an image do not fit into a pass.
    """

    defence: RandomDefence
    view: View
    samples_per_pass: int
    generator: torch.Generator
    n_samples: int | None = None
    latents: Tensor | None = None
    followed: RandomDefence | None = None
    _passes: Passes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples_per_pass < self.samples:
            raise UsageError(
                f"samples_per_pass {self.samples_per_pass} is below the {self.samples} samples of one image",
                hint=f"set evaluation.samples_per_pass to at least {self.samples}",
            )
        # Set through `object`, as the dataclass is frozen; `replace` makes a new one for the new N.
        object.__setattr__(
            self, "_passes", Passes(self.samples_per_pass // self.samples, self.defence, self.samples)
        )

    @property
    def stochastic(self) -> bool:
        """Whether every call draws new latents."""
        return self.latents is None

    @property
    def samples(self) -> int:
        """N, reconstructions per image."""
        if self.latents is not None:
            return len(self.latents)
        return self.n_samples or self.defence.n_samples

    def seen_as(self, view: View, n_samples: int | None = None) -> DefenceTarget:
        """Return the same defence through another view, with the same generator."""
        return replace(self, view=view, n_samples=n_samples or self.n_samples)

    def frozen(self) -> DefenceTarget:
        """Return a deterministic target: one draw of N latents, the same for all images and calls."""
        return replace(self, latents=self._draw(1)[0])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits of one sample: N reconstructions per image, aggregated."""
        return self._all_logits(self.defence.condition(images), self._draw(len(images)))

    def vjp(self, images: Tensor) -> tuple[Tensor, VJP]:
        """Return the logits of one sample and the map of gradients back to the images.

        Where the sample needs several passes, the map computes it again from the same latents.
        """
        if self.followed is not None:
            return self._of_followed(self.followed).vjp(images)
        condition, through_condition = vjp_of(self.defence.condition, images)
        # Drawn once, outside the passes: a pass that is cut or run again must see the same latents.
        latents = self._draw(len(images))

        def tail(part: slice) -> tuple[Tensor, VJP]:
            return vjp_of(lambda chunk: self._logits(chunk, latents[part]), condition[part])

        if len(images) <= self._passes.largest:
            # Memory may still run out, and the one pass become several.
            whole = self._passes.attempt(len(images), lambda: [tail(slice(None))])
        else:
            whole = None
        logits = whole[0][0] if whole else self._all_logits(condition, latents)

        def back(cotangent: Tensor) -> Tensor:
            # Keeping the graphs of several passes would undo the bound on memory: only that of a single one.
            if whole:
                through_tail = partial(whole[0][1], cotangent)
                slope = self._passes.attempt(len(images), through_tail)
                if slope is not None:
                    return through_condition(slope)
                # The graph goes before smaller ones are made.
                del through_tail
                whole.clear()
            # The passes end at the condition; one product more takes all their gradients to the images.
            slopes = self._passes.over(len(images), lambda part: tail(part)[1](cotangent[part]))
            return through_condition(torch.cat(slopes))

        return logits, back

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> ExpectedLoss:
        """Return the mean loss over K = `eot_samples` samples of the latents."""
        # Without a graph, whose memory grows with B: `_average` takes no gradient here either.
        with torch.no_grad():
            condition = self.defence.condition(images)
        return self._average(condition, labels, loss, eot_samples, with_gradient=False)

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> LossGradient:
        """Return the mean loss over K = `eot_samples` samples of the latents and its gradient."""
        if self.followed is not None:
            return self._of_followed(self.followed).loss_and_gradient(images, labels, loss, eot_samples)
        condition, through_condition = vjp_of(self.defence.condition, images)
        answer = self._average(condition, labels, loss, eot_samples, with_gradient=True)
        # This product is linear, so the mean over K may be taken before it: one product serves all samples.
        return replace(answer, gradient=through_condition(answer.gradient))

    def _of_followed(self, followed: RandomDefence) -> DefenceTarget:
        target = replace(self, defence=followed, followed=None)
        # What is learnt of memory is of the same models.
        object.__setattr__(target, "_passes", self._passes)
        return target

    def _average(
        self, condition: Tensor, labels: Tensor, loss: Loss, eot_samples: int, *, with_gradient: bool
    ) -> LossGradient:
        """Average over the samples; `gradient` is taken at the (B, F) conditions, zeros if not wanted."""
        batch = len(condition)
        # All K draws at once, so that samples do not depend on how memory cuts the passes.
        latents = self._draw(eot_samples * batch)

        def one_pass(part: slice) -> tuple[Tensor, ...]:
            """Return losses, correctness, saturation and gradients of some units, each (units, ...)."""
            # Unit u of the K * B is sample u // B of image u % B.
            images = torch.arange(part.start, part.stop, device=condition.device) % batch
            # Indexing copies, so each sample of an image has a gradient of its own, averaged below.
            chunk = condition[images].requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = self._logits(chunk, latents[part])
                values = loss(logits, labels[images])
            # Units are independent, so the gradient of the sum holds each one's own.
            slope = gradient_at(chunk, values.sum()) if with_gradient else torch.zeros_like(chunk)
            answer = ExpectedLoss.of(values.detach(), logits.detach(), labels[images])
            return answer.loss, answer.correct, answer.saturated, slope

        columns = zip(*self._passes.over(eot_samples * batch, one_pass), strict=True)
        units = [torch.cat(column) for column in columns]
        return LossGradient(
            # Sample-major, as `images` above says: (K * B, ...) to (K, B, ...), and the mean over K.
            *(each.reshape(eot_samples, batch, *each.shape[1:]).mean(dim=0) for each in units)
        )

    def _draw(self, batch: int) -> Tensor:
        if self.latents is not None:
            # A view without copies; nothing writes to latents.
            return self.latents.expand(batch, -1, -1)
        return self.defence.draw_latents(batch, self.samples, self.generator)

    def _logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        sample_logits = self.defence.sample_logits(condition, latents)
        if callable(self.view):
            return self.view(sample_logits)
        return self.defence.aggregate(sample_logits, self.view)

    @torch.no_grad()
    def _all_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        return torch.cat(
            self._passes.over(len(condition), lambda part: self._logits(condition[part], latents[part]))
        )
