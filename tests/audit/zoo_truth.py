"""Robust accuracy by an attack that knows each model's trick.

It shares no code with the attacks under test: PGD with a decaying step on what `Entry.known` lists, which are
differentiable functions that decide as the model does (the network inside, or the model with its own trick
undone), with a targeted loss for each of several classes, cross-entropy, and a smooth count of right answers.
Every example is tried on the model itself, made anew each time, so that nothing is remembered.

Where the model is random the worst example of an image is chosen on some draws and counted on others, so what
is reported is unbiased for the examples chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]


@dataclass
class TrickAttack:
    """An attack on the model that `make` makes, through known functions.

    Args:
        make: Makes the model that decides.
        known: (B, 1, 8, 8) images to (B, C) scores, differentiably.
        random: Whether the model is random.
        eps: Radius under linf.
        steps: Steps of each run.
        eot: Samples per gradient.
        draws: Samples that choose the worst example, and as many again per kept example; 10 times as many
            fresh ones count it.
    """

    make: Callable[[], Function]
    known: tuple[Function, ...]
    random: bool
    eps: float
    steps: int = 60
    eot: int = 1
    draws: int = 20
    targets: int = 9

    def correct(self, images: Tensor, labels: Tensor, draws: int) -> Tensor:
        """Return the share of draws in which the model is right, (B,)."""
        model = self.make()
        with torch.no_grad():
            answers = [model(images.clone()) for _ in range(draws)]
        # NaN is no answer.
        right = [(answer.argmax(dim=1) == labels) & ~answer.isnan().any(dim=1) for answer in answers]
        return torch.stack(right).float().mean(dim=0)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return for each image the share of fresh draws in which the model withstands, (M,)."""
        draws = self.draws if self.random else 1
        best, share = images.clone(), self.correct(images, labels, 5 * draws)
        for known in self.known:
            for loss in self._losses(known, images, labels):
                left = (share > 0).nonzero()[:, 0]
                if not len(left):
                    break
                found, rate = self._run(known, loss, images[left], labels[left], left, draws)
                if self.random:
                    # A second look, so that a lucky sample does not win.
                    rate = self.correct(found, labels[left], 4 * draws)
                better = rate < share[left]
                best[left[better]], share[left[better]] = found[better], rate[better]
        return self.correct(best, labels, 10 * draws if self.random else 1)

    def _losses(self, known: Function, images: Tensor, labels: Tensor) -> list[Callable[..., Tensor]]:
        with torch.no_grad():
            scores = known(images)
        rivals = scores.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)

        def towards(rank: int) -> Callable[..., Tensor]:
            def loss(scores: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
                target, own = rivals[rows, rank, None], labels[:, None]
                return (scores.gather(1, target) - scores.gather(1, own))[:, 0]

            return loss

        def entropy(scores: Tensor, labels: Tensor, _rows: Tensor) -> Tensor:
            return F.cross_entropy(scores, labels, reduction="none")

        def wrong(scores: Tensor, labels: Tensor, _rows: Tensor) -> Tensor:
            own = scores.gather(1, labels[:, None])[:, 0]
            return torch.sigmoid(scores.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - own)

        return [entropy, wrong, *(towards(rank) for rank in range(self.targets))]

    def _run(
        self,
        known: Function,
        loss: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        draws: int,
    ) -> tuple[Tensor, Tensor]:
        low, high = (images - self.eps).clamp(0, 1), (images + self.eps).clamp(0, 1)
        at = images + (2 * torch.rand_like(images) - 1) * self.eps / 2
        at = torch.minimum(torch.maximum(at, low), high)
        best, share = images.clone(), torch.ones(len(images))
        momentum = torch.zeros_like(images)
        every = max(self.steps // 6, 1) if self.random else 4
        for step in range(self.steps):
            leaf = at.detach().requires_grad_()
            total = sum((loss(known(leaf), labels, rows).sum() for _ in range(self.eot)), torch.zeros(()))
            (gradient,) = torch.autograd.grad(total, leaf)
            gradient = torch.nan_to_num(gradient)
            scale = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
            momentum = 0.7 * momentum + gradient / scale
            size = self.eps * (0.5 * (1 - step / self.steps) ** 2 + 0.01)
            at = torch.minimum(torch.maximum(at + size * momentum.sign(), low), high)
            if step % every == every - 1:
                rate = self.correct(at, labels, draws)
                better = rate < share
                best[better], share[better] = at[better], rate[better]
        return best, share
