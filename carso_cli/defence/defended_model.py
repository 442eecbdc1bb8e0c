"""The defence: classifier, purifier and aggregation as one module (Section 4.1 and Figure 1, inference).

Axes: B images, N samples per image, C classes, F condition features, Z latent features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from carso_cli.defence.aggregation import aggregate
from carso_cli.defence.representation import check_layers, extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.errors import UsageError
from carso_cli.runtime.precision import autocast, to_float32

_PIXEL_SLACK = 0.1


class Defence(nn.Module):
    """A classifier with its purifier: images in [0, 1] to one robust prediction.

    The module is frozen and in evaluation mode. Its decision is the argmax over classes, the same in
    every view.

    Args:
        classifier: Frozen classifier f, (B, channels, H, W) in [0, 1] to (B, C) logits.
        purifier: Trained purifier for the representation given by `layers`.
        layers: Names of the classifier's layers, in the purifier's order.
        n_samples: N, reconstructions per image.
        aggregation: Rule of `carso_cli.defence.aggregation`.
        second_classifier: Classifier of the reconstructions; the same one when None (Appendix D).
        precision: `fp32`, `tf32` or `bf16`: that of the models; aggregation is in float32.

    Raises:
        UsageError: If a layer is unknown to the classifier.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Purifier,
        layers: Sequence[str],
        *,
        n_samples: int = 8,
        aggregation: str = "doubly-exponential",
        second_classifier: nn.Module | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        check_layers(classifier, layers)
        self.classifier = classifier
        self.purifier = purifier
        self.second_classifier = second_classifier if second_classifier is not None else classifier
        self.layers = tuple(layers)
        self.n_samples = n_samples
        self.aggregation = aggregation
        self.precision = precision
        self.latent_features = purifier.latent_features
        # The given modules themselves, not copies: who trains a part afterwards sets its gradients again.
        self.requires_grad_(False)
        # Through `super`, because our own `train` changes nothing.
        super().train(False)

    def train(self, mode: bool = True) -> Defence:
        """Stay in evaluation mode: a defence is only ever used for inference."""
        if mode:
            raise UsageError("a defence is frozen; train its purifier with train_purifier instead")
        return self

    def with_second_classifier(self, second_classifier: nn.Module) -> Defence:
        """Return the same defence with another classifier of the reconstructions."""
        changed = copy.copy(self)
        # A shallow copy shares the table of submodules with the original.
        changed._modules = {**self._modules, "second_classifier": second_classifier}
        return changed

    def check_images(self, images: Tensor) -> None:
        """Check that images are what a defence takes; a traced call is not checked.

        Raises:
            UsageError: If they are not (B, channels, H, W), not of the defence's kind of numbers, or have
                values outside [0, 1] or NaN.
        """
        channels, kind = len(self.purifier.mean), self.purifier.mean.dtype
        if not isinstance(images, Tensor):
            raise UsageError(
                f"images are of type {type(images).__name__}; a (B, {channels}, H, W) tensor is needed",
                hint="torch.as_tensor(images, dtype=torch.float32)",
            )
        if images.ndim != 4 or images.shape[1] != channels:
            raise UsageError(f"images have shape {tuple(images.shape)}; (B, {channels}, H, W) is needed")
        if images.dtype != kind:
            name = str(kind).removeprefix("torch.")
            hint = "pixels as bytes become images in [0, 1] by images.float() / 255"
            raise UsageError(
                f"images are {images.dtype}; torch.{name} in [0, 1] is needed",
                hint=hint if not images.is_floating_point() else f"convert them: images.to(torch.{name})",
            )
        if torch.compiler.is_compiling() or not images.numel():
            return
        low, high = map(float, torch.stack(images.detach().aminmax()).cpu())
        # An audit looks a step beyond [0, 1]; bytes and standardised images leave it by far more.
        # All comparisons with NaN fail, hence `not`.
        if not (low >= -_PIXEL_SLACK and high <= 1.0 + _PIXEL_SLACK):
            raise UsageError(
                f"images have values from {low:.4g} to {high:.4g}; a defence takes pixels in [0, 1]",
                hint="divide pixels up to 255 by 255, and do not standardise: the classifier does it itself",
            )

    def condition(self, images: Tensor) -> Tensor:
        """Compute the deterministic part: (B, channels, H, W) images to (B, F) conditions.

        Where the input has a share in what is classified, its pixels follow the F features.
        """
        with autocast(self.precision, images.device):
            # Contiguous: `view` in a user's module refuses what is channels-last.
            recorded = extract_representation(self.classifier, images.contiguous(), self.layers)
            condition = self.purifier.condition(recorded)
        # In one tensor: attacks map gradients from the condition back to the images, and need no second way.
        return torch.cat((condition, images.flatten(1)), dim=1) if self.purifier.input_share else condition

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (B, N, Z) latents from the prior, on the defence's device.

        They are drawn on the generator's own device, so that one seed gives the same latents everywhere.
        """
        device = self.purifier.mean.device
        shape = (batch, n_samples or self.n_samples, self.latent_features)
        origin = generator.device if generator is not None else device
        return torch.randn(shape, generator=generator, device=origin).to(device)

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        """Decode (B, F) conditions with (B, N, Z) latents into images (B, N, channels, H, W) in [0, 1]."""
        # Without a share of the input, no pixels follow.
        features, pixels = condition.tensor_split((self.purifier.condition_features,), dim=1)
        # Row b * N + n of the flattened pair is image b with its latent n.
        repeated = features.unsqueeze(1).expand(-1, latents.shape[1], -1)
        with autocast(self.precision, condition.device):
            images = self.purifier.decode(latents.flatten(0, 1), repeated.flatten(0, 1))
        images = images.reshape(*latents.shape[:2], *images.shape[1:])
        if share := self.purifier.input_share:
            # After the sigmoid, in pixel space: a mean of two images in [0, 1] is one too.
            images = torch.lerp(images, pixels.reshape(-1, 1, *images.shape[2:]), share)
        return images

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        """Reconstruct and classify: (B, F) conditions and (B, N, Z) latents to (B, N, C) logits."""
        return self.classify_samples(self.decode(condition, latents))

    def classify_samples(self, samples: Tensor) -> Tensor:
        """Classify reconstructions: (B, N, channels, H, W) to (B, N, C) logits."""
        with autocast(self.precision, samples.device):
            # All B * N in one pass: in evaluation mode an image's logits do not depend on its batch.
            # Contiguous, as in `condition`: the decoder's images are channels-last.
            logits = to_float32(self.second_classifier(samples.flatten(0, 1).contiguous()))
        return logits.reshape(*samples.shape[:2], logits.shape[1])

    def aggregate(self, sample_logits: Tensor, view: str = "log-probability") -> Tensor:
        """Aggregate (B, N, C) logits into (B, C) by this defence's rule."""
        return aggregate(sample_logits, self.aggregation, view)

    def purify(self, images: Tensor, n_samples: int | None = None, latents: Tensor | None = None) -> Tensor:
        """Return reconstructions (B, N, channels, H, W) in [0, 1] of images (B, channels, H, W)."""
        if latents is None:
            latents = self.draw_latents(len(images), n_samples)
        self.check_images(images)
        return self.decode(self.condition(images), latents)

    def forward(
        self,
        images: Tensor,
        *,
        latents: Tensor | None = None,
        view: str = "log-probability",
        n_samples: int | None = None,
    ) -> Tensor:
        """Classify images.

        Args:
            images: (B, channels, H, W) in [0, 1].
            latents: (B, N, Z); drawn afresh from the prior when None.
            view: `log-probability` (log P), `exact` (logits to attack) or `released` (the authors' release).
            n_samples: N, when latents are drawn here.

        Returns:
            (B, C).

        Raises:
            UsageError: If the images are not as above; if the latents do not fit them or the purifier.
        """
        self.check_images(images)
        if latents is None:
            latents = self.draw_latents(len(images), n_samples)
        # Not `len(images)` or a slice of the shape: torch.export would fix the batch size to the example's.
        elif (
            latents.ndim != 3
            or latents.shape[0] != images.shape[0]
            or latents.shape[2] != self.latent_features
        ):
            raise UsageError(
                f"latents have shape {tuple(latents.shape)}; "
                f"({len(images)}, N, {self.latent_features}) is needed"
            )
        return self.aggregate(self.sample_logits(self.condition(images), latents), view)
