"""Square with Expectation over Transformation: black box, for random defences.

Title: "Square Attack: a query-efficient black-box adversarial attack via random search" (Andriushchenko
et al., 2020), Algorithms 1-3, https://arxiv.org/abs/1912.00049; the loss is the mean margin over draws.
Distance: linf, l2, with one radius per image if wanted.
Published setting: 5000 queries, first patch 0.8 of the image.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = SquareEoT(ThreatModel("linf", 8 / 255), queries=5000, draws=20)
    perturbed = attack(target, images, labels)

It asks for no gradient, so where it does better than the white-box attacks their gradients are masked.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carso_cli.attacks.attack import BestPoint, require_finite
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel, per_image
from carso_cli.runtime.seed import generator

_FIRST_SHARE = 0.8
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the patch's share of the image halves."""


@dataclass(frozen=True, eq=False)
class SquareEoT:
    """Random search: change a square patch, keep the change if the mean margin grows.

    Args:
        threat: Norm and radius (or radii).
        queries: Patches tried per image; each costs `draws` draws of the model.
        draws: K, draws per query; a deterministic target needs 1, and its images stop when fooled.
        seed: Seed of the search.
    """

    name: ClassVar[str] = "square"
    threat: ThreatModel
    _: KW_ONLY
    queries: int
    draws: int
    seed: int = 0

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`."""
        source = generator(self.seed, "square-eot")
        search = (
            _LinfSearch(self.threat, source) if self.threat.norm == "linf" else _L2Search(self.threat, source)
        )
        best = BestPoint(images)
        point = search.start(images)
        for query in range(self.queries):
            best.offer(point, target.expected_loss(point, labels, margin, self.draws).rank)
            if not target.stochastic and bool((best.loss > 0).all()):
                break
            point = search.propose(best.images, images, patch_share(query, self.queries))
        return require_finite(best.images, self.name)


def patch_share(query: int, queries: int) -> float:
    """Return the share of the image's area that a patch covers: 0.8 at first, halved nine times."""
    progress = query / queries * 10_000
    return float(_FIRST_SHARE / 2 ** sum(progress > milestone for milestone in _HALVINGS))


class _LinfSearch:
    """Patches of one sign per channel, at the ball's corners; the start is vertical stripes."""

    def __init__(self, threat: ThreatModel, source: torch.Generator) -> None:
        self.threat = threat
        self.source = source

    def start(self, images: Tensor) -> Tensor:
        """Return the first point, (B, channels, H, W)."""
        batch, channels, _, width = images.shape
        return self._corner(_signs((batch, channels, 1, width), self.source, images), images)

    def propose(self, best: Tensor, images: Tensor, share: float) -> Tensor:
        """Return the best point, (B, channels, H, W), with one patch of this share of the area changed."""
        side = _side(share, images, smallest=1)
        window = _place(torch.ones(side, side), images, self.source)
        corner = self._corner(_signs((*images.shape[:2], 1, 1), self.source, images), images)
        return torch.where(window > 0, corner, best)

    def _corner(self, signs: Tensor, images: Tensor) -> Tensor:
        return self.threat.project(images + per_image(self.threat.radii(images), images) * signs, images)


class _L2Search:
    """Patches that move the change's length from one window to another (Algorithm 3)."""

    def __init__(self, threat: ThreatModel, source: torch.Generator) -> None:
        self.threat = threat
        self.source = source

    def start(self, images: Tensor) -> Tensor:
        """Return the first point, (B, channels, H, W)."""
        height, width = images.shape[2:]
        side = max(min(height, width) // 5, 2)
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        signs = _signs((*images.shape[:2], rows, columns), self.source, images)
        signs = signs.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
        tiles = l2_patch(side).to(images).repeat(rows, columns) * signs
        return self._at_full_length(tiles[..., :height, :width], images)

    def propose(self, best: Tensor, images: Tensor, share: float) -> Tensor:
        """Return the best point, (B, channels, H, W), with the length in one window moved to a patch."""
        change = best - images
        patch = l2_patch(_side(share, images, smallest=3))
        if bool(torch.rand(1, generator=self.source) < 0.5):
            patch = patch.T
        added = _place(patch, images, self.source)
        into = (added != 0).to(images.dtype)
        out_of = _place(torch.ones_like(patch), images, self.source)
        either = torch.maximum(into, out_of)
        fresh = added * _signs((*images.shape[:2], 1, 1), self.source, images) + _unit(change * into)
        spare = (per_image(self.threat.radii(images), images) ** 2 - _length(change, (1, 2, 3)) ** 2).clamp(
            min=0
        )
        length = (spare / images.shape[1] + _length(change * either, (2, 3)) ** 2).sqrt()
        return self._at_full_length(change * (1 - either) + _unit(fresh) * length, images)

    def _at_full_length(self, change: Tensor, images: Tensor) -> Tensor:
        direction = change / _length(change, (1, 2, 3)).clamp(min=1e-12)
        return self.threat.project(images + per_image(self.threat.radii(images), images) * direction, images)


def l2_patch(side: int) -> Tensor:
    """Return the (side, side) patch of unit length: two bumps of opposite sign, one above the other."""
    upper = side // 2
    patch = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    unit: Tensor = patch / patch.norm()
    return unit


def _bump(rows: int, columns: int) -> Tensor:
    """Nested rectangles around the centre, the k-th of height 1/k^2, normalised (equation 2)."""
    reach = max(rows, columns) // 2 + 1
    heights = 1.0 / torch.arange(1, reach + 1, dtype=torch.float32) ** 2
    covered = heights.flip(0).cumsum(0).flip(0)
    from_centre = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()[None, :]
    )
    bump = covered[from_centre.clamp(max=reach - 1)]
    unit: Tensor = bump / bump.norm()
    return unit


def _side(share: float, images: Tensor, smallest: int) -> int:
    height, width = images.shape[2:]
    side = max(round(math.sqrt(share * height * width)), smallest)
    if smallest == 3 and side % 2 == 0:
        side += 1
    return min(side, height, width)


def _place(patch: Tensor, images: Tensor, source: torch.Generator) -> Tensor:
    """Put a (side, side) patch of the CPU at a random place of each image: (B, 1, H, W), zero elsewhere."""
    (batch, _, height, width), side = images.shape, len(patch)
    row = torch.arange(height) - torch.randint(height - side + 1, (batch, 1), generator=source)
    column = torch.arange(width) - torch.randint(width - side + 1, (batch, 1), generator=source)
    row_in, column_in = (row >= 0) & (row < side), (column >= 0) & (column < side)
    picked = patch[row.clamp(0, side - 1)[:, :, None], column.clamp(0, side - 1)[:, None, :]]
    return (picked * (row_in[:, :, None] & column_in[:, None, :]))[:, None].to(images)


def _signs(shape: tuple[int, ...], source: torch.Generator, images: Tensor) -> Tensor:
    return (torch.randint(2, shape, generator=source) * 2 - 1).to(images)


def _length(change: Tensor, axes: tuple[int, ...]) -> Tensor:
    return change.square().sum(dim=axes, keepdim=True).sqrt()


def _unit(change: Tensor) -> Tensor:
    return change / _length(change, (2, 3)).clamp(min=1e-12)
