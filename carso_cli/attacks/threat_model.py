"""What the attacker may do: norm and radius, within the pixel range [0, 1] (Section 3; Table 14).

`ThreatModel` has projection, distance, random starts and the steepest-ascent direction, so that no attack
depends on a norm. Axes: B images; every tensor of images is (B, channels, H, W) in [0, 1].

    threat = ThreatModel("linf", 8 / 255)
    perturbed = threat.project(images + 0.1 * threat.ascent_direction(gradient), images)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carso_cli.errors import UsageError


@dataclass(frozen=True, eq=False)
class ThreatModel:
    """A ball around each image, cut to the pixel range [0, 1].

    Args:
        norm: `linf` (largest change of a pixel) or `l2` (Euclidean length of the change).
        eps: Radius in pixel units of [0, 1] images: one for all images, or one each, (B,).

    Raises:
        UsageError: If the norm is unknown, or a radius is negative or not finite.
    """

    norm: str
    eps: float | Tensor

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise UsageError(f"unknown norm '{self.norm}'; known are linf, l2")
        # As a tensor, since a recipe gives a float and training one radius per image.
        radii = torch.as_tensor(self.eps)
        # One answer for all, since each `bool` waits for the device.
        if radii.ndim > 1 or not bool((radii.isfinite() & (radii >= 0)).all()):
            raise UsageError(f"eps must be one number of at least 0, or one per image, not {self.eps}")

    def radii(self, images: Tensor) -> Tensor:
        """Return the radius of each image, (B,), on the images' device and in their type.

        Raises:
            UsageError: If there is one radius per image and their number differs from B.
        """
        radii = torch.as_tensor(self.eps, dtype=images.dtype, device=images.device)
        if radii.ndim and len(radii) != len(images):
            raise UsageError(f"the threat model has {len(radii)} radii for {len(images)} images")
        return radii.expand(len(images))

    def project(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """Project images of any finite values into the ball around `clean` and into the pixel range."""
        radii = per_image(self.radii(clean), clean)
        if self.norm == "linf":
            # Ball and range are boxes that hold `clean`: cut in either order, the point is the same.
            inside = torch.clamp(perturbed, clean - radii, clean + radii)
        else:
            change = perturbed - clean
            length = per_image(self.distance(perturbed, clean), clean)
            # Cut to the range after: as `clean` lies in it, the cut only shortens the change further.
            inside = clean + change * (radii / length.clamp(min=1e-30)).clamp(max=1.0)
        return inside.clamp(0.0, 1.0)

    def distance(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """Return the size of each image's change in this norm, (B,)."""
        change = (perturbed - clean).flatten(1)
        return change.abs().amax(dim=1) if self.norm == "linf" else change.norm(dim=1)

    def contains(self, perturbed: Tensor, clean: Tensor, tolerance: float = 1e-5) -> Tensor:
        """Return whether each image is finite, in the ball and in the pixel range, (B,) bool.

        Args:
            perturbed: (B, channels, H, W).
            clean: Same shape.
            tolerance: Slack for rounding, in pixel units, for ball and range alike.
        """
        pixels = perturbed.flatten(1)
        in_range = ((pixels >= -tolerance) & (pixels <= 1.0 + tolerance)).all(dim=1)
        # A NaN fails every comparison, so an image that holds one is outside.
        return in_range & (self.distance(perturbed, clean) <= self.radii(clean) + tolerance)

    def random_start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a point uniformly from the ball around each image, then cut it to the pixel range.

        The draw is made on the generator's device, so one seed gives the same start everywhere.
        """
        origin = generator.device
        shape = clean.shape
        if self.norm == "linf":
            change = 2.0 * torch.rand(shape, generator=generator, device=origin) - 1.0
        else:
            direction = torch.randn(shape, generator=generator, device=origin)
            # In d dimensions the share of a ball within a fraction r of its radius is r ** d.
            reach = torch.rand(shape[0], generator=generator, device=origin) ** (1.0 / shape[1:].numel())
            # A normal direction is uniform over the sphere.
            change = direction * per_image(reach / direction.flatten(1).norm(dim=1), direction)
        change = change.to(device=clean.device, dtype=clean.dtype)
        return self.project(clean + per_image(self.radii(clean), clean) * change, clean)

    def ascent_direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit size along which a loss of this gradient rises fastest.

        The sign under linf, the normalised gradient under l2. Entries that are NaN count as zero (as in
        advertorch and AutoAttack, where sign(NaN) is 0), infinite ones as the largest finite number. An
        image whose gradient is zero gets a zero direction.
        """
        # Also turns infinities into the largest number: divided by one another below they would be NaN.
        finite = torch.nan_to_num(gradient, nan=0.0)
        if self.norm == "linf":
            return finite.sign()
        # Scaled by its largest entry first: the squares of a gradient of 1e-25 are zero in float32.
        largest = finite.flatten(1).abs().amax(dim=1)
        scaled = finite / per_image(largest.clamp(min=torch.finfo(finite.dtype).tiny), finite)
        length = scaled.flatten(1).norm(dim=1)
        return scaled / per_image(length.clamp(min=1e-12), scaled)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Shape (B,) values so that they broadcast against (B, channels, H, W) images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
