"""Square with Expectation over Transformation: black box, for random defences.

Title: "Square Attack: a query-efficient black-box adversarial attack via random search" (Andriushchenko
et al., 2020), Algorithms 1-3, https://arxiv.org/abs/1912.00049; the loss is the mean margin over EoT samples.
Distance: linf, l2, with one radius per image if wanted.
Published setting: 5000 queries, first patch 0.8 of the image.

    attack = SquareEoT(ThreatModel("linf", 8 / 255), queries=5000, eot_samples=20)
    perturbed = attack(target, images, labels)

It asks for no gradient: where it does better than the white-box attacks, their gradients are masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carso_cli.attacks.attack import Attack, BestPoint, require_finite
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel, per_image
from carso_cli.runtime.seed import generator

_FIRST_SHARE = 0.8
# Queries, of 10,000, after which the patch's share of the image halves.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, eq=False, kw_only=True)
class SquareEoT(Attack):
    """Random search: change a square patch, keep the change if the mean margin grows.

    Args:
        queries: Patches tried per image; each costs `eot_samples` samples of the model.
        eot_samples: K, samples per query; a deterministic target needs 1, and its search ends when all images
            are fooled.
    """

    name: ClassVar[str] = "square"
    queries: int
    eot_samples: int

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`."""
        kind = _LinfSearch if self.threat.norm == "linf" else _L2Search
        search = kind(self.threat, images, generator(self.seed, "square-eot"))
        best = BestPoint(images)
        point = search.start()
        for query in range(self.queries):
            # Evaluated before the next is proposed, so `queries` counts evaluations, the start included.
            best.offer(point, target.expected_loss(point, labels, margin, self.eot_samples).rank)
            # A random target goes on: a positive mean margin over K samples does not fool every draw.
            if not target.stochastic and bool((best.loss > 0).all()):
                break
            point = search.propose(best.images, patch_share(query, self.queries))
        return require_finite(best.images, self.name)


def patch_share(query: int, queries: int) -> float:
    """Return the share of the image's area that a patch covers: 0.8 at first, halved nine times."""
    progress = query / queries * 10_000
    # `progress >`, not `>=`: as in the authors' code a milestone itself still has the larger patch.
    return float(_FIRST_SHARE / 2 ** sum(progress > milestone for milestone in _HALVINGS))


class _Search:
    """Points of the search around (B, channels, H, W) images."""

    def __init__(self, threat: ThreatModel, images: Tensor, source: torch.Generator) -> None:
        self.threat = threat
        self.images = images
        self.source = source
        self.radii = per_image(threat.radii(images), images)

    def start(self) -> Tensor:
        """Return the first point, (B, channels, H, W)."""
        raise NotImplementedError

    def propose(self, best: Tensor, share: float) -> Tensor:
        """Return the best point, (B, channels, H, W), with one patch of this share of the area changed."""
        raise NotImplementedError

    def at_radius(self, direction: Tensor) -> Tensor:
        """Return the point that lies a radius along a direction of unit size."""
        return self.threat.project(self.images + self.radii * direction, self.images)

    def signs(self, height: int = 1, width: int = 1) -> Tensor:
        """Return random signs per image and channel, (B, channels, height, width)."""
        shape = (*self.images.shape[:2], height, width)
        # Random numbers come from the CPU, so that a seed gives the same search on every device.
        return (torch.randint(2, shape, generator=self.source) * 2 - 1).to(self.images)

    def side(self, share: float) -> int:
        """Return the side of a square patch of this share of the area."""
        height, width = self.images.shape[2:]
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def place(self, patch: Tensor) -> Tensor:
        """Put a (side, side) patch at a random place of each image: (B, 1, H, W), zero elsewhere."""
        (batch, _, height, width), side = self.images.shape, len(patch)
        row = torch.arange(height) - torch.randint(height - side + 1, (batch, 1), generator=self.source)
        column = torch.arange(width) - torch.randint(width - side + 1, (batch, 1), generator=self.source)
        row_in, column_in = (row >= 0) & (row < side), (column >= 0) & (column < side)
        # Clamped indices read the patch's edge outside the window, which the mask then makes zero.
        picked = patch[row.clamp(0, side - 1)[:, :, None], column.clamp(0, side - 1)[:, None, :]]
        return (picked * (row_in[:, :, None] & column_in[:, None, :]))[:, None].to(self.images)


class _LinfSearch(_Search):
    """Patches of one sign per channel, at the ball's corners; the start is vertical stripes."""

    def start(self) -> Tensor:
        return self.at_radius(self.signs(width=self.images.shape[3]))

    def propose(self, best: Tensor, share: float) -> Tensor:
        side = self.side(share)
        window = self.place(torch.ones(side, side))
        return torch.where(window > 0, self.at_radius(self.signs()), best)


class _L2Search(_Search):
    """Patches that move the change's length from one window to another (Algorithm 3)."""

    def start(self) -> Tensor:
        height, width = self.images.shape[2:]
        # About five tiles a side; a patch has two halves, so it needs at least two rows.
        side = max(min(height, width) // 5, 2)
        # Rounded up and cut below, so that no border of the image stays without a tile.
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        signs = self.signs(rows, columns).repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
        tiles = l2_patch(side).to(self.images).repeat(rows, columns) * signs
        return self.at_radius(_unit(tiles[..., :height, :width], (1, 2, 3)))

    def propose(self, best: Tensor, share: float) -> Tensor:
        change = best - self.images
        patch = l2_patch(self.side(share))
        if bool(torch.rand(1, generator=self.source) < 0.5):
            patch = patch.T
        added = self.place(patch)
        into = (added != 0).to(change)
        # The length that the second window loses, and what the ball still leaves, go to the first.
        either = torch.maximum(into, self.place(torch.ones_like(patch)))
        fresh = added * self.signs() + _unit(change * into, (2, 3))
        # Not negative: by rounding, a change may be longer than the radius by a bit.
        spare = (self.radii**2 - _length(change, (1, 2, 3)) ** 2).clamp(min=0)
        # Per channel: what is spare is shared out evenly, what the windows held stays in its channel.
        length = (spare / change.shape[1] + _length(change * either, (2, 3)) ** 2).sqrt()
        return self.at_radius(_unit(change * (1 - either) + _unit(fresh, (2, 3)) * length, (1, 2, 3)))

    def side(self, share: float) -> int:
        """Return an odd side of at least 3, so that the patch has a centre, where the image allows."""
        height, width = self.images.shape[2:]
        side = max(round(math.sqrt(share * height * width)), 3)
        return min(side + (side + 1) % 2, height, width)


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
    # A pixel at distance d lies in all rectangles from the d-th on, whose heights add up.
    covered = heights.flip(0).cumsum(0).flip(0)
    from_centre = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()[None, :]
    )
    bump = covered[from_centre.clamp(max=reach - 1)]
    unit: Tensor = bump / bump.norm()
    return unit


def _length(change: Tensor, axes: tuple[int, ...]) -> Tensor:
    return change.square().sum(dim=axes, keepdim=True).sqrt()


def _unit(change: Tensor, axes: tuple[int, ...]) -> Tensor:
    # The floor serves windows without any change, of length zero.
    return change / _length(change, axes).clamp(min=1e-12)
