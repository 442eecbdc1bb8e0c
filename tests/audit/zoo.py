"""Models of known robustness, masked and sound, on 8x8 digits under linf with eps 0.1.

    python tests/audit/zoo.py [MODEL ...]        prints model, clean accuracy and truth (an hour for all)

*Sound* means that an audit must trust its own number, and that the number is the truth. Of every other model
an audit must find the truth, or say that its number is not to be trusted.

The truths in `TRUTH` come from `zoo_truth.TrickAttack` with the settings of `attack_of`: for each function in
`Entry.known` 60 steps on each of 11 losses; where that function is random 40 steps on each of 5 losses, with
10 samples per gradient. Random models: examples chosen on 20 + 80 draws, counted on 200 fresh ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))  # where this file is run as a script

import zoo_models as models
from zoo_networks import EPS, Network, held_out_images, load
from zoo_truth import TrickAttack

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """A model and what is known of it.

    Args:
        make: Makes it, so that each user has one of its own.
        known: Makes the functions that an attack follows which knows the trick.
        sound: Whether an audit has to trust its own number.
        random: Whether two calls on the same images may differ.
        noisy: Whether `known` is random, so that its gradients must be averaged.
    """

    make: Callable[[], Function]
    known: Callable[[], tuple[Function, ...]]
    sound: bool
    random: bool = False
    noisy: bool = False


def _decoy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Network().eval().requires_grad_(False)


def _plain() -> nn.Module:
    return load("plain")


def _robust() -> nn.Module:
    return load("robust")


def _only(make: Callable[[], Function]) -> Callable[[], tuple[Function, ...]]:
    return lambda: (make(),)


def _sound(make: Callable[[], Function], known: Callable[[], Function] | None = None, **facts: bool) -> Entry:
    return Entry(make, _only(known or make), sound=True, **facts)


def _masked(
    make: Callable[[], Function], *known: Callable[[], Function], random: bool = False, noisy: bool = False
) -> Entry:
    return Entry(make, lambda: tuple(each() for each in known or (_plain,)), False, random, noisy or random)


def _undone(kind: type[models.Around]) -> Callable[[], Function]:
    """Return what makes a model with the identity's gradient through what it does to the images."""

    def make() -> Function:
        model = kind(_plain())
        return lambda images: model.net(models.straight(images, model.prepare(images)))

    return make


def _in_place() -> Function:
    network = _robust()
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return network


def _function() -> Function:
    """Return a plain function, standardising included."""
    network = _robust()
    return lambda images: network((images - 0.3) / 0.4 * 0.4 + 0.3)


def _smoothed() -> Function:
    """Return the mean of 4 noisy answers."""
    network = _robust()
    return lambda images: torch.stack(
        [network(images + 0.2 * torch.randn_like(images)) for _ in range(4)]
    ).mean(dim=0)


def _without_modules() -> Function:
    """Return a thermometer code before a network written out by hand: there is no module to look into."""
    weights = dict(_plain().state_dict())

    def scores(images: Tensor) -> Tensor:
        coded = (images[..., None] > torch.arange(8) / 8).float().mean(dim=-1)
        first = F.conv2d(coded, weights["features.0.weight"], weights["features.0.bias"], padding=1)
        second = F.conv2d(
            F.max_pool2d(first.relu(), 2), weights["features.4.weight"], weights["features.4.bias"], padding=1
        )
        flat = F.max_pool2d(second.relu(), 2).flatten(1)
        hidden = F.linear(flat, weights["features.8.weight"], weights["features.8.bias"]).relu()
        return F.linear(hidden, weights["head.weight"], weights["head.bias"])

    return scores


def _bare(make: Callable[[], Function]) -> Callable[[], Function]:
    """Return what makes a model as a function that shows none of its modules."""

    class Bare:
        __slots__ = ("hidden",)

        def __init__(self) -> None:
            self.hidden = make()

        def __call__(self, images: Tensor) -> Tensor:
            return self.hidden(images)

    return Bare


def _winners_smoothed() -> Function:
    """Return k-winners-take-all under a little noise, which evens its breaks out."""
    network = load("winners")
    return lambda images: network(images + 0.02 * torch.randn_like(images))


def _detector() -> Function:
    """Return the detector with a slope in place of its threshold."""
    network = _plain()

    def scores(images: Tensor) -> Tensor:
        excess = models.edge_ink(images) - models.Detector.limit
        constant = F.one_hot(torch.zeros(len(images), dtype=torch.long), 10)
        answer: Tensor = network(images) + 200 * excess[:, None] * constant
        return answer

    return scores


def _pruning() -> Function:
    model = models.Pruning(_plain())
    model.detached = True
    return model


def _members() -> tuple[nn.Module, ...]:
    return _plain(), load("norm"), load("winners")


def _mean_of_members() -> Function:
    return models.Mean(*_members()[:2])


def _half_detached() -> Function:
    return models.HalfDetached(*_members()[:2])


def _votes() -> Function:
    """Return the mean probability of three networks."""
    members = _members()
    return lambda images: torch.stack([member(images).softmax(dim=1) for member in members]).mean(dim=0)


ZOO: dict[str, Entry] = {
    # Sound.
    "robust": _sound(_robust),
    "plain": _sound(_plain),
    "transformer": _sound(lambda: load("transformer")),
    "small-logits": _sound(lambda: models.Scaled(_robust(), 1e-3), _robust),
    "huge-logits": _sound(lambda: models.Scaled(_plain(), 1e4), _plain),
    "probabilities": _sound(lambda: models.Probabilities(_robust()), _robust),
    "log-probabilities": _sound(lambda: models.LogProbabilities(_plain()), _plain),
    "dead-class": _sound(lambda: models.DeadClass(_robust())),
    "masked-classes": _sound(lambda: models.MaskedClasses(_robust()), _robust),
    "in-place": _sound(_in_place, _robust),
    "float64": _sound(lambda: models.InFloat64(_robust().double()), _robust),
    "bfloat16": _sound(lambda: models.InBFloat16(_robust()), _robust),
    "function": _sound(_function, _robust),
    "noise": _sound(lambda: models.Noise(_robust(), 0.1), random=True, noisy=True),
    "much-noise": _sound(lambda: models.Noise(_robust(), 0.3), random=True, noisy=True),
    "numpy-noise": _sound(lambda: models.NumpyNoise(_robust(), 0.1), random=True, noisy=True),
    "own-generator": _sound(lambda: models.OwnGenerator(_robust(), 0.1), random=True, noisy=True),
    "smoothed": _sound(_smoothed, random=True, noisy=True),
    "dropout": _sound(lambda: models.Dropout(_robust()), random=True, noisy=True),
    "random-member": _sound(
        lambda: models.RandomMember(_robust(), load("transformer")), random=True, noisy=True
    ),
    # Masked.
    "quantised": _masked(lambda: models.Quantised(_plain()), _plain, _undone(models.Quantised)),
    "quantised-leak": _masked(lambda: models.QuantisedLeak(_plain()), _plain, _undone(models.Quantised)),
    "block-dct": _masked(lambda: models.BlockDCT(_plain()), _plain, _undone(models.BlockDCT)),
    "thermometer": _masked(lambda: models.Thermometer(_plain()), _plain, _undone(models.Thermometer)),
    "without-modules": _masked(_without_modules, _plain, _undone(models.Thermometer)),
    "median": _masked(lambda: models.Median(_plain()), lambda: models.Median(_plain()), _plain),
    "ripple": _masked(lambda: models.Ripple(_plain()), _plain, _undone(models.Ripple)),
    "bare-ripple": _masked(_bare(lambda: models.Ripple(_plain())), _plain, _undone(models.Ripple)),
    "channel-ripple": _masked(lambda: models.ChannelRipple(_plain()), _plain, _undone(models.ChannelRipple)),
    "part-saw": _masked(lambda: models.PartSaw(_plain())),
    "anti-adversary": _masked(
        lambda: models.AntiAdversary(_plain()), _plain, lambda: models.AntiAdversary(_plain())
    ),
    "winners": _masked(lambda: load("winners"), lambda: load("winners"), _winners_smoothed, noisy=True),
    "distilled": _masked(lambda: models.Distilled(_plain())),
    "clamped-log": _masked(lambda: models.ClampedLog(_plain())),
    "rounded-scores": _masked(lambda: models.RoundedScores(_plain())),
    "flipped": _masked(lambda: models.Flipped(_plain())),
    "sometimes-flipped": _masked(lambda: models.SometimesFlipped(_plain())),
    "sometimes-nan": _masked(lambda: models.SometimesNaN(_plain())),
    "decoy": _masked(lambda: models.Decoy(_plain(), _decoy())),
    "true-at-the-start": _masked(lambda: models.TrueAtTheStart(_plain(), _decoy())),
    "by-gradient-mode": _masked(lambda: models.ByGradientMode(_plain(), _decoy())),
    "numpy": _masked(lambda: models.ThroughNumpy(_plain())),
    "without-gradient": _masked(lambda: models.WithoutGradient(_plain())),
    "inference-mode": _masked(lambda: models.InInferenceMode(_plain())),
    "detector": _masked(lambda: models.Detector(_plain()), _detector, _plain),
    "nan-detector": _masked(lambda: models.NaNDetector(_plain()), _detector, _plain),
    "majority-vote": _masked(
        lambda: models.MajorityVote(*_members()), _votes, lambda: models.Mean(*_members())
    ),
    "half-detached": _masked(_half_detached, _mean_of_members),
    "batch-statistics": _masked(lambda: models.BatchStatistics(load("norm")), lambda: load("norm")),
    "remembers": _masked(lambda: models.Remembers(_plain())),
    "every-fourth": _masked(lambda: models.EveryFourth(_plain(), _decoy())),
    # Masked and random, or random where nobody looks.
    "resize-and-pad": _masked(
        lambda: models.ResizeAndPad(_plain()), lambda: models.ResizeAndPad(_plain()), random=True
    ),
    "pruning": _masked(lambda: models.Pruning(_plain()), _pruning, _plain, random=True),
    "noisy-quantised": _masked(
        lambda: models.NoisyQuantised(_plain()), _plain, _undone(models.NoisyQuantised), random=True
    ),
    "noise-off-clean": _masked(
        lambda: models.NoiseOffClean(_plain(), 0.3),
        _plain,
        lambda: models.NoiseOffClean(_plain(), 0.3),
        random=True,
    ),
    "edge-noise": _masked(
        lambda: models.EdgeNoise(_plain(), 2), _plain, lambda: models.EdgeNoise(_plain(), 2), random=True
    ),
}

TRUTH: dict[str, tuple[float, float]] = {
    "robust": (0.7900, 0.7850),
    "plain": (0.5000, 0.4850),
    "transformer": (0.7900, 0.8150),
    "small-logits": (0.7900, 0.7850),
    "huge-logits": (0.5000, 0.4850),
    "probabilities": (0.7900, 0.7850),
    "log-probabilities": (0.5000, 0.4850),
    "dead-class": (0.7900, 0.7850),
    "masked-classes": (0.7900, 0.7850),
    "in-place": (0.7900, 0.7850),
    "float64": (0.7900, 0.7850),
    "bfloat16": (0.7900, 0.7850),
    "function": (0.7900, 0.7850),
    "noise": (0.7902, 0.7886),
    "much-noise": (0.6239, 0.6302),
    "numpy-noise": (0.7902, 0.7886),
    "own-generator": (0.7902, 0.7886),
    "smoothed": (0.7630, 0.7747),
    "dropout": (0.6541, 0.6446),
    "random-member": (0.8100, 0.8138),
    "quantised": (0.3000, 0.2750),
    "quantised-leak": (0.3000, 0.2750),
    "block-dct": (0.4100, 0.3600),
    "thermometer": (0.5600, 0.5350),
    "without-modules": (0.5600, 0.5350),
    "median": (0.0800, 0.0850),
    "ripple": (0.5200, 0.5050),
    "bare-ripple": (0.5200, 0.5050),
    "channel-ripple": (0.5100, 0.5050),
    "part-saw": (0.4900, 0.4800),
    "anti-adversary": (0.5000, 0.4850),
    "winners": (0.3300, 0.3150),
    "distilled": (0.5000, 0.4850),
    "clamped-log": (0.5000, 0.4850),
    "rounded-scores": (0.4700, 0.4750),
    "flipped": (0.5000, 0.4850),
    "sometimes-flipped": (0.4900, 0.4850),
    "sometimes-nan": (0.4900, 0.4850),
    "decoy": (0.5000, 0.4850),
    "true-at-the-start": (0.5000, 0.4850),
    "by-gradient-mode": (0.5000, 0.4850),
    "numpy": (0.5000, 0.4850),
    "without-gradient": (0.5000, 0.4850),
    "inference-mode": (0.5000, 0.4850),
    "detector": (0.1200, 0.1100),
    "nan-detector": (0.0000, 0.0000),
    "majority-vote": (0.5800, 0.5550),
    "half-detached": (0.6000, 0.6100),
    "batch-statistics": (0.5400, 0.5200),
    "remembers": (0.5000, 0.4850),
    "every-fourth": (0.5000, 0.4850),
    "resize-and-pad": (0.3111, 0.2955),
    "pruning": (0.4612, 0.4520),
    "noisy-quantised": (0.4912, 0.4832),
    "noise-off-clean": (0.3203, 0.3114),
    "edge-noise": (0.4911, 0.4707),
}
"""Robust accuracy on the first 100 and the first 200 held-out images.

Models that draw or answer alike have one truth: the two other ways to draw small noise, the ripple without
modules, and the stateful models, whose truth is that of their first call.
"""


def attack_of(entry: Entry, *, steps: int | None = None) -> TrickAttack:
    """Return the attack that a truth comes from."""
    return TrickAttack(
        entry.make,
        entry.known(),
        entry.random,
        EPS,
        steps=steps or (40 if entry.noisy else 60),
        eot=10 if entry.noisy else 1,
        targets=3 if entry.noisy else 9,
    )


def clean_accuracy(entry: Entry, count: int = 200) -> float:
    """Return the accuracy on the first held-out images."""
    images, labels = held_out_images(count)
    with torch.no_grad():
        return float((entry.make()(images).argmax(dim=1) == labels).float().mean())


def truth_of(name: str, count: int = 200, *, steps: int | None = None) -> Tensor:
    """Return the share of draws in which each of the first held-out images withstands, (count,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return attack_of(ZOO[name], steps=steps)(*held_out_images(count))


def main(names: list[str]) -> None:
    """Print the table."""
    for name in names or list(ZOO):
        entry, withstands = ZOO[name], truth_of(name)
        half, whole = float(withstands[:100].mean()), float(withstands.mean())
        kind = ("sound" if entry.sound else "masked") + ", random" * entry.random
        sys.stdout.write(
            f'    "{name}": ({half:.4f}, {whole:.4f}),  # clean {clean_accuracy(entry):.3f}, {kind}\n'
        )
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
