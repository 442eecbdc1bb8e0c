"""How a training batch of the paper's size fits the memory of one device.

Batch statistics are those of the whole batch, so it is not cut into smaller ones. Where its graph does not
fit, a backward pass computes the layers' encodings again, and where their inputs do not fit either, also
these, layer by layer; the perturbed images are made in passes. Results are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carso_cli.attacks.target import Model
from carso_cli.defence.conditioning import as_map, kept_statistics
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.memory import graph_bytes, usable_bytes
from carso_cli.runtime.precision import autocast
from carso_cli.runtime.reporter import Reporter

_WHOLE = 2**31


@dataclass(frozen=True)
class Fit:
    """How a batch is computed.

    Args:
        at_once: Most images perturbed in one pass.
        recompute_encodings: Whether a backward pass computes the layers' encodings again.
        recompute_layers: Whether it computes the layers' outputs again as well.
    """

    at_once: int = _WHOLE
    recompute_encodings: bool = False
    recompute_layers: bool = False


class LayerOutputs(Mapping[str, Tensor]):
    """The internal representation of images, each layer computed when it is asked for, and not kept.

    Args:
        classifier: The frozen classifier.
        images: (B, channels, H, W).
        layers: Names of the layers.
    """

    def __init__(self, classifier: nn.Module, images: Tensor, layers: tuple[str, ...]) -> None:
        self._classifier, self._images, self._layers = classifier, images, layers

    @torch.no_grad()
    def __getitem__(self, layer: str) -> Tensor:
        """Return the output of a layer, (B, c, h, w)."""
        return extract_representation(self._classifier, self._images, (layer,))[layer]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the layers' names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)


def fit_batch(
    recipe: Recipe,
    classifier: nn.Module,
    attacked: Model,
    purifier: Purifier,
    images: int,
    reporter: Reporter,
) -> Fit:
    """Choose how a batch on the ELBO is computed, from the free memory of the purifier's device.

    Args:
        recipe: The recipe.
        classifier: The frozen classifier, whose layers are read.
        attacked: The classifier as attacks call it.
        purifier: The purifier, in training mode.
        images: Images of this process in a batch.
        reporter: Told, once, if they do not fit as they are.
    """
    device, layers = purifier.mean.device, recipe.representation.layers
    usable = usable_bytes(device)
    if usable is None:
        return Fit()
    # Two, as batch statistics need more than one.
    shape = (2, recipe.data.channels, recipe.data.image_size, recipe.data.image_size)
    probe = torch.zeros(shape, device=device)
    with kept_statistics(purifier), autocast(recipe.precision, device):
        with torch.no_grad():
            outputs = extract_representation(classifier, probe, layers)
        noise = torch.zeros(2, purifier.latent_features, device=device)
        whole = graph_bytes(lambda: purifier(probe, outputs, noise)[0]) / 2 * images
        encoders = zip(layers, purifier.representation_encoder.layer_encoders, strict=True)
        one = [graph_bytes(lambda e=encoder, x=outputs[layer]: e(as_map(x))) for layer, encoder in encoders]  # type: ignore[misc]
        largest, kept = max(one) / 2 * images, sum(x.nbytes for x in outputs.values()) / 2 * images
        gradient = graph_bytes(lambda: attacked(probe.clone().requires_grad_())) / 2
    at_once = max(int(usable / max(gradient, 1)), 1)
    if whole <= usable:
        return Fit(at_once)
    fit = Fit(at_once, recompute_encodings=True, recompute_layers=kept + largest > usable)
    again = "layers and encodings" if fit.recompute_layers else "encodings"
    reporter.info(
        f"{images:,} images need {whole / 2**30:.0f} GiB and {usable / 2**30:.0f} are free: {again} are "
        "computed again in the backward pass"
    )
    return fit
