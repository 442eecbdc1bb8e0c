"""Scores examples on the target's true decision, with fresh draws of a defence.

Axes: B images, R draws, N samples per image, C classes, F condition features, Z latent features.

There are three disjoint sets of draws: `selection` decides which example of an image is the worst,
`confirmation` whether it breaks the defence in every draw, and `report` is what accuracy is counted on.
The latents are a function of seed, set and image alone: neither batch size nor order changes a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from carso_cli.attacks.losses import cross_entropy, margin
from carso_cli.attacks.passes import Passes
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.attacks.target import Model
from carso_cli.runtime.nonfinite import require_finite_logits
from carso_cli.runtime.seed import all_seeded, generator

SELECTION, CONFIRMATION, REPORT = "selection", "confirmation", "report"


@dataclass(frozen=True, eq=False)
class Score:
    """What R draws say about each of B images.

    Args:
        draws: R.
        correct: (B,) int64, draws whose decision is the label.
        majority: (B,) bool, whether the label has more draws than any other class.
        predicted: (B,) int64, the class with the most draws.
        margin: (B,) float64, mean lead of the label over the best other class, exact view; positive if right.
        loss: (B,) float64, mean cross-entropy of the exact view.
        disagreements: (B,) int64, draws in which the exact view's argmax is not the decision.
    """

    draws: int
    correct: Tensor
    majority: Tensor
    predicted: Tensor
    margin: Tensor
    loss: Tensor
    disagreements: Tensor

    @classmethod
    def of_rows(cls, scores: Sequence[Score], order: Sequence[int]) -> Score:
        """Return the score whose row b is row b of `scores[order[b]]`."""
        # The first field is R, one number for all.
        _, *names = (entry.name for entry in fields(cls))
        stacked = (torch.stack([getattr(score, name) for score in scores]) for name in names)
        rows = torch.arange(len(order))
        return cls(scores[0].draws, *(values[torch.tensor(order), rows] for values in stacked))


class ClassifierScorer:
    """Scores examples on a deterministic model: one draw says everything, and every set is the same."""

    draws = 1

    def __init__(self, classifier: Model) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def __call__(self, examples: Tensor, labels: Tensor, indices: Sequence[int], draw_set: str) -> Score:
        """Score examples; see `DefenceScorer`."""
        # NaN has an argmax like any other number, and would be counted as an answer.
        logits = require_finite_logits(
            self.classifier(examples), "the classifier", self.classifier, lambda: self.classifier(examples)
        )[:, None]
        return _tally(logits.argmax(dim=2), logits, labels)


@dataclass(frozen=True, eq=False)
class DefenceScorer:
    """Scores examples on a defence, with R fresh draws of N latents for every image and set.

    Args:
        defence: The defence.
        seed: Seed of the evaluation.
        draws: R.
        samples_per_pass: Most reconstructions decoded and classified in one pass.
    """

    defence: RandomDefence
    seed: int
    draws: int
    samples_per_pass: int

    @torch.no_grad()
    def __call__(self, examples: Tensor, labels: Tensor, indices: Sequence[int], draw_set: str) -> Score:
        """Score examples.

        Args:
            examples: (B, channels, H, W) in [0, 1].
            labels: (B,) int64.
            indices: Position of each image in the full split.
            draw_set: `selection`, `confirmation` or `report`.
        """
        condition = self.defence.condition(examples)
        # One generator per image, so that scores do not change with blocks, order or number of processes.
        latents = torch.cat([self._latents(index, draw_set) for index in indices])
        # Image-major: image b has the units from b * R to b * R + R - 1.
        owner = torch.arange(len(latents), device=condition.device) // self.draws

        def one_pass(part: slice) -> tuple[Tensor, Tensor]:
            """Return decisions, (units,), and exact logits, (units, C), of some draws."""
            sample_logits = require_finite_logits(
                self.defence.sample_logits(condition[owner[part]], latents[part]),
                "the defence's reconstructions",
                self.defence,
                # From the images again: the layer that is not finite may lie before the condition.
                lambda: self.defence.sample_logits(
                    self.defence.condition(examples)[owner[part]], latents[part]
                ),
            )
            # The decision as the defence returns it; the exact view is what was attacked, and is compared.
            decisions = self.defence.aggregate(sample_logits, "log-probability").argmax(dim=1)
            return decisions, self.defence.aggregate(sample_logits, "exact")

        # A unit is one draw with all its N samples, since they are aggregated together.
        n_samples = self.defence.n_samples
        passes = Passes(max(self.samples_per_pass // n_samples, 1), self.defence, n_samples)
        decisions, exact = zip(*passes.over(len(latents), one_pass), strict=True)
        shape = (len(examples), self.draws)
        logits = torch.cat(exact)
        return _tally(torch.cat(decisions).reshape(shape), logits.reshape(*shape, -1), labels)

    def _latents(self, index: int, draw_set: str) -> Tensor:
        """Draw (R, N, Z) latents for one image."""
        source = generator(self.seed, "scoring", draw_set, index)
        return self.defence.draw_latents(self.draws, self.defence.n_samples, source)


@dataclass(frozen=True, eq=False)
class ModelScorer:
    """Scores examples on any model, random or not, with R fresh calls for every set.

    A call fixes all seeds to the number of its draw. A model that draws once for a whole batch, such as
    one of several networks, is thus compared on the same draws, whichever images of a block are left.

    Args:
        model: (B, channels, H, W) images to (B, C) scores.
        seed: Seed of the audit.
        draws: R; 1 says everything of a model that is not random.
    """

    model: Model
    seed: int
    draws: int

    @torch.no_grad()
    def __call__(self, examples: Tensor, labels: Tensor, indices: Sequence[int], draw_set: str) -> Score:
        """Score examples; see `DefenceScorer`. An answer that holds NaN is wrong."""
        answers = []
        for draw in range(self.draws):
            with all_seeded(self.seed, "scoring", draw_set, draw):
                answers.append(self.model(examples).detach().float())
        scores = torch.stack(answers, dim=1)
        # NaN has an argmax, which may be the label: instead, the label is below all others.
        wrong = -1e30 * torch.nn.functional.one_hot(labels, scores.shape[2]).to(scores)[:, None]
        scores = torch.where(scores.isnan().any(dim=2, keepdim=True), wrong, scores)
        scores = torch.nan_to_num(scores, posinf=1e30, neginf=-1e30)
        return _tally(scores.argmax(dim=2), scores, labels)


Scorer = ClassifierScorer | DefenceScorer | ModelScorer


def _tally(decisions: Tensor, exact: Tensor, labels: Tensor) -> Score:
    """Summarise (B, R) decisions and (B, R, C) exact logits."""
    batch, draws, classes = exact.shape
    # (B, R, C), summed over draws: how many of R chose each class.
    votes = torch.nn.functional.one_hot(decisions, classes).sum(dim=1)
    for_label = votes.gather(1, labels[:, None])[:, 0]
    # -1 takes the label out of the maximum; a tie with another class is no majority.
    others = votes.scatter(1, labels[:, None], -1).amax(dim=1)
    # In float64, where the loss of a confident answer is still above zero.
    logits, repeated = exact.double().flatten(0, 1), labels.repeat_interleave(draws)
    lead = exact.amax(dim=2) - exact.gather(2, decisions[:, :, None])[:, :, 0]
    return Score(
        draws=draws,
        correct=for_label.cpu(),
        majority=(for_label > others).cpu(),
        predicted=votes.argmax(dim=1).cpu(),
        margin=-margin(logits, repeated).reshape(batch, draws).mean(dim=1).cpu(),
        loss=cross_entropy(logits, repeated).reshape(batch, draws).mean(dim=1).cpu(),
        # Leads within float32's rounding are ties, not disagreements.
        disagreements=(lead > 1e-6 * exact.abs().amax(dim=2).clamp(min=1.0)).sum(dim=1).cpu(),
    )
