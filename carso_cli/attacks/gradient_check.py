"""Whether a model's gradient says how its output changes: finite differences, and a step against it.

A gradient can be finite, nonzero and wrong. Four measurements find that out, at any images; where an attack
ends, they find gradients that are right at the clean images and mislead the attack later:

- *matches*: along the sign of the gradient, and in random directions, a central difference over 0.001 gives
  the gradient's own slope, within a third. Wrong, replaced and partly dead gradients fail.
- *lasts*: a step of eps / 4 against its sign gains at least a quarter of what the slope promises. Gradients
  fail that are exact and useless, such as those of a rippled function.
- *descends*: a step of eps / 4 against the sign of the gradient lowers the margin by more than any of 8
  random steps of that size. Gradients fail that are right for tiny steps only, such as those of a small
  differentiable term beside a rounded one;
- *predicts*: where a few pixels at random move by eps, the gradient of a random combination of all scores
  foretells the change, with an error below 0.3 of it, summed over 12 such blocks. Gradients fail that are
  useless in some of the pixels or for some of the classes only, which the other measurements average away.

They hold for whatever random numbers the model draws, held fixed. The images are split into groups with a
seed each, since a model may spoil its gradient in some calls only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carso_cli.attacks.gradient_sources import gradient_of, margin_gradient
from carso_cli.attacks.losses import margin
from carso_cli.attacks.model_parts import Model
from carso_cli.runtime.seed import all_seeded, generator

STEP = 1e-3
"""Half of the width of a central difference, in pixel units."""
_STEPS = (STEP, 8 * STEP)
"""One of them has to agree: a model that computes in bfloat16 does not see the smaller."""
_TOLERANCE = 1.0 / 3.0
_RANDOM_STEPS = 8
_ROUNDING = 32.0
"""Steps of the largest score's precision below which a change may be rounding."""
_TINY, _TINY_STEPS, _OVER_TINY = 1e-4, 4, 8.0
"""Size and number of steps whose effect is mostly rounding, and how far a slope must exceed it."""
_DIRECTIONS = 6
"""Random directions whose slope is measured too: a gradient that some pixels lack is right along itself."""
_LASTING = 0.25
"""Least share of its slope that a step of eps / 4 must gain; on ripples a steep slope leads nowhere."""
_BLOCKS, _BLOCK_SHARE, _ERROR = 12, 1 / 16, 0.3
"""Blocks of pixels that are moved, the share of pixels in a large one, the largest error that is right."""
_GROUPS = 8
"""Groups of images, each with its own seed: a gradient may be spoilt in some calls only."""


@dataclass(frozen=True)
class GradientCheck:
    """What was measured at B images; shares are in [0, 1].

    Args:
        path: Whether there is a gradient at all.
        finite: Share of images with a finite gradient.
        nonzero: Share of images whose gradient is finite and not exactly zero.
        matches: Share of the images that can be judged whose central difference is the gradient's slope.
        judged: Images whose slope is large enough for a finite difference to be told from rounding.
        descends: Share of images at which a step against the gradient does better than random steps.
        lasts: Share of images at which that step gains a quarter of what the slope promises, or more.
        predicts: Share of the images that can be judged at which it foretells the moves of blocks of pixels.
        foretold: Images at which those moves change the scores by more than rounding.
        images: B.
    """

    path: bool
    finite: float = 0.0
    nonzero: float = 0.0
    matches: float = 0.0
    judged: int = 0
    descends: float = 0.0
    lasts: float = 0.0
    predicts: float = 0.0
    foretold: int = 0
    images: int = 0


def check_gradient(
    function: Model, images: Tensor, labels: Tensor, *, eps: float, seed: int = 0
) -> GradientCheck:
    """Measure the gradient of the margin of a function at some images.

    Args:
        function: (B, channels, H, W) images to (B, C) scores.
        images: (B, channels, H, W), clean or adversarial.
        labels: (B,) int64.
        eps: Radius of the attack under linf, in pixel units.
        seed: Seed of the random steps and of whatever is random in the function.
    """
    size = max(-(-len(images) // _GROUPS), 1)
    parts = [
        _check(function, images[at : at + size], labels[at : at + size], eps, seed + number)
        for number, at in enumerate(range(0, len(images), size))
    ]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or not found:
        return GradientCheck(path=False, images=len(images))
    masks, blocks = zip(*found, strict=True)
    finite, usable, judged, matches, descends, lasts = (
        int(torch.cat(each).sum()) for each in zip(*masks, strict=True)
    )
    predicts, foretold = _foretold(torch.cat(blocks, dim=1))
    of = max(len(images), 1)
    return GradientCheck(
        path=True,
        finite=finite / of,
        nonzero=usable / of,
        matches=matches / max(judged, 1),
        judged=judged,
        descends=descends / of,
        lasts=lasts / of,
        predicts=predicts / max(foretold, 1),
        foretold=foretold,
        images=len(images),
    )


def _check(
    function: Model, images: Tensor, labels: Tensor, eps: float, seed: int
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Return (B,) masks of one group in the order of `GradientCheck`'s fields, and errors in blocks.

    None where there is no gradient path.
    """
    gradient = margin_gradient(function, images, labels, seed)
    if gradient is None:
        return None

    @torch.no_grad()
    def value(at: Tensor) -> Tensor:
        with all_seeded(seed):
            return margin(function(at), labels).double()

    source = generator(seed, "random steps")

    def random_signs() -> Tensor:
        return torch.randint(0, 2, images.shape, generator=source).to(images) * 2 - 1

    flat = gradient.flatten(1)
    finite = flat.isfinite().all(dim=1)
    usable = finite & (flat != 0).any(dim=1)
    direction = torch.nan_to_num(gradient, 0.0, 0.0, 0.0).sign()
    slope = flat.abs().sum(dim=1).double()
    measured = (value(images + STEP * direction) - value(images - STEP * direction)) / (2 * STEP)
    with torch.no_grad(), all_seeded(seed):
        scores = function(images)
    # An answer in bfloat16 has steps of its own, wherever the model computes.
    precision = max(torch.finfo(scores.dtype).eps, torch.finfo(torch.float32).eps)
    scale = torch.where(scores.isfinite(), scores, 0.0).abs().amax(dim=1).double() * precision
    start = value(images)
    # What a tiny step changes is rounding, in bfloat16 far more of it than the dtype of the answer says.
    tiny = torch.stack([value(images + _TINY * random_signs()) for _ in range(_TINY_STEPS)])
    # Coarse rounding often leaves an answer as it is; the largest change in the group shows its size.
    rounding = (_ROUNDING * scale).clamp_min(_OVER_TINY * float((tiny - start).abs().max()))
    # What is measured counts too: a gradient far too small for its function is not let off as rounding.
    judged = usable & (torch.maximum(slope, measured.abs()) * STEP > rounding)
    directions = [random_signs() for _ in range(_DIRECTIONS)]
    matches = judged & torch.stack(
        [_slopes_agree(value, images, gradient, [direction], step) for step in _STEPS]
    ).any(dim=0)
    matches &= torch.stack([_slopes_agree(value, images, gradient, directions, step) for step in _STEPS]).any(
        dim=0
    )
    best = torch.full_like(start, -torch.inf)
    for _ in range(_RANDOM_STEPS):
        best = torch.maximum(best, start - value(images + eps / 4 * random_signs()))
    gained = start - value(images - eps / 4 * direction)
    descends = usable & (gained > best)
    lasts = usable & (gained >= _LASTING * eps / 4 * slope)
    return (finite, usable, judged, matches, descends, lasts), _block_errors(function, images, eps, seed)


def _foretold(errors: Tensor) -> tuple[int, int]:
    """Return how many images the gradient is right at, of how many, from (sizes, B) errors in blocks."""
    # Small blocks drown in rounding, large ones bend: whichever suits the model is taken, for all images.
    judged = errors.isfinite()
    means = torch.where(judged, errors.clamp(max=1.0), 1.0).mean(dim=1)
    best = errors[int(means.argmin())]
    return int((best < _ERROR).sum()), int(best.isfinite().sum())


def _block_errors(function: Model, images: Tensor, eps: float, seed: int) -> Tensor:
    """Return (sizes, B) errors of the gradient over moves of blocks; infinite where rounding hides the moves.

    An error is the sum of what the gradient fails to foretell, as a share of the larger of both sums.
    """
    source = generator(seed, "blocks")

    @torch.no_grad()
    def scores(at: Tensor) -> Tensor:
        with all_seeded(seed):
            return function(at).double()

    start = scores(images)
    # All classes at once: a term in any of their scores shows in every image.
    weights = torch.randn(start.shape, generator=source).to(start)
    gradient = gradient_of(lambda at: (function(at) * weights.to(at)).sum(dim=1), images, seed)
    sizes = sorted(
        {max(round(images[0].numel() ** 0.5 / 2), 1), max(round(images[0].numel() * _BLOCK_SHARE), 1)}
    )
    if gradient is None:
        return torch.full((len(sizes), len(images)), torch.inf, dtype=torch.float64)

    def combined(one: Tensor, other: Tensor) -> Tensor:
        # Differences first: a class that is never meant may score so low that its rounding hides the others.
        return torch.nan_to_num((one - other) * weights).sum(dim=1)

    signs = torch.where(gradient >= 0, 1.0, -1.0)
    step = eps / 2 * signs
    ahead, behind = (images + step).clamp(0, 1), (images - step).clamp(0, 1)
    tiny = [
        combined(
            scores(images + _TINY * (torch.randint(0, 2, images.shape, generator=source).to(images) * 2 - 1)),
            start,
        )
        for _ in range(_TINY_STEPS)
    ]
    precision = torch.finfo(torch.float32).eps * (start.abs() * weights.abs()).amax(dim=1)
    rounding = torch.maximum(precision, _OVER_TINY * torch.stack(tiny).abs().amax(dim=0))
    found = []
    for size in sizes:
        wrong, whole = torch.zeros_like(start[:, 0]), torch.zeros_like(start[:, 0])
        for _ in range(_BLOCKS):
            block = torch.rand(images.shape, generator=source).to(images) * images[0].numel() < size
            up, down = torch.where(block, ahead, images), torch.where(block, behind, images)
            change = combined(scores(up), scores(down))
            told = ((up - down).double() * gradient.double()).flatten(1).sum(dim=1)
            wrong += (change - told).abs()
            whole += torch.maximum(change.abs(), told.abs())
        found.append(torch.where(whole > _BLOCKS * rounding, wrong / whole, torch.inf))
    return torch.stack(found).cpu()


def _slopes_agree(
    value: Callable[[Tensor], Tensor],
    images: Tensor,
    gradient: Tensor,
    directions: Sequence[Tensor],
    step: float,
) -> Tensor:
    """Say of each image whether differences along some directions are the gradient's slopes."""
    seen, told = [], []
    for direction in directions:
        seen.append((value(images + step * direction) - value(images - step * direction)) / (2 * step))
        told.append((gradient.double() * direction).flatten(1).sum(dim=1))
    measured, promised = torch.stack(seen), torch.stack(told)
    size = torch.maximum(measured.square().sum(dim=0), promised.square().sum(dim=0)).sqrt()
    return (measured - promised).square().sum(dim=0).sqrt() < _TOLERANCE * size
