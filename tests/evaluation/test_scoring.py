from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from carso_cli.evaluation.scoring import CONFIRMATION, REPORT, SELECTION, ClassifierScorer, DefenceScorer


def test_every_draw_is_the_defences_own_decision(toys: ModuleType) -> None:
    defence = toys.LinearDefence(noise=2.0)
    images = toys.images_with_margins(defence, [0.05, 0.2, -0.05])
    pixels = images.pixels(slice(0, 3))
    scorer = DefenceScorer(defence, seed=3, draws=40, samples_per_pass=7)
    score = scorer(pixels, images.labels, [5, 6, 7], REPORT)
    for row, index in enumerate((5, 6, 7)):
        latents = scorer._latents(index, REPORT)
        repeated = defence.condition(pixels[row : row + 1]).expand(40, -1)
        decided = defence.aggregate(defence.sample_logits(repeated, latents), "log-probability").argmax(1)
        right = decided == images.labels[row]
        assert int(score.correct[row]) == int(right.sum())
        assert int(score.predicted[row]) == int(torch.bincount(decided, minlength=4).argmax())
    assert 0 < int(score.correct.sum()) < 120


def test_margin_and_loss_are_those_of_the_exact_view(toys: ModuleType) -> None:
    defence = toys.LinearDefence(noise=0.0, scale=1.0, n_samples=1)
    images = toys.images_with_margins(defence, [0.5, -0.5])
    pixels = images.pixels(slice(0, 2))
    score = DefenceScorer(defence, 0, 3, 64)(pixels, images.labels, [0, 1], SELECTION)
    logits = defence.classifier(pixels).double()
    for row, label in enumerate(images.labels.tolist()):
        others = torch.cat([logits[row, :label], logits[row, label + 1 :]])
        torch.testing.assert_close(score.margin[row], logits[row, label] - others.max())
        torch.testing.assert_close(score.loss[row], -logits[row].log_softmax(0)[label])
    assert score.correct.tolist() == [3, 0]
    assert score.majority.tolist() == [True, False]


def test_the_three_sets_are_disjoint_and_repeatable(toys: ModuleType) -> None:
    scorer = DefenceScorer(toys.LinearDefence(), seed=0, draws=6, samples_per_pass=64)
    drawn = {name: scorer._latents(4, name) for name in (SELECTION, CONFIRMATION, REPORT)}
    assert drawn[REPORT].shape == (6, 3, 4)
    assert (
        len({round(float(value), 6) for latents in drawn.values() for value in latents.flatten()}) == 3 * 72
    )
    assert torch.equal(drawn[REPORT], scorer._latents(4, REPORT))
    assert not torch.equal(drawn[REPORT], scorer._latents(5, REPORT))


def test_a_tie_of_votes_is_no_majority() -> None:
    calls = iter([torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])])

    class Alternating:
        n_samples, aggregation = 1, "logit-mean"

        def condition(self, images: Tensor) -> Tensor:
            return images.flatten(1)

        def draw_latents(self, batch: int, n_samples: int, generator: torch.Generator) -> Tensor:
            return torch.zeros(batch, n_samples, 1)

        def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
            return next(calls)[:, None]

        def aggregate(self, sample_logits: Tensor, view: str) -> Tensor:
            return sample_logits[:, 0]

    score = DefenceScorer(Alternating(), 0, 2, 1)(  # type: ignore[arg-type]
        torch.zeros(1, 1, 2, 2), torch.tensor([1]), [0], REPORT
    )
    assert score.correct.tolist() == [1]
    assert score.majority.tolist() == [False]


def test_a_classifier_is_scored_once(toys: ModuleType) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, -0.5])
    score = ClassifierScorer(defence.classifier)(images.pixels(slice(0, 2)), images.labels, [0, 1], REPORT)
    assert (score.draws, score.correct.tolist(), score.disagreements.tolist()) == (1, [1, 0], [0, 0])
