"""The defence's answer on a batch of images: decision, probabilities, samples, reconstructions.

The latents of an image are a function of the seed and its pixels, so its answer does not depend on the batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carso_cli.defence.defended_model import Defence
from carso_cli.runtime.precision import in_precision
from carso_cli.runtime.seed import generator


@dataclass(frozen=True, eq=False)
class Answer:
    """What a defence says about a batch.

    Args:
        decision: (B,) int64.
        probability: (B, C) P of the aggregation.
        sample_probability: (B, N, C) softmax of each reconstruction.
        classifier_probability: (B, C) softmax of the bare classifier on the images themselves.
        reconstructions: (B, N, channels, H, W) in [0, 1].
    """

    decision: Tensor
    probability: Tensor
    sample_probability: Tensor
    classifier_probability: Tensor
    reconstructions: Tensor

    def describe(self, place: int, names: Sequence[str]) -> dict[str, Any]:
        """Describe the answer on one image.

        Args:
            place: Position in the batch.
            names: Class names, in label order.

        Returns:
            `class` and `label`, the decision by name and by number; `probability`, P of the decision under
            the aggregation; `mean_probability`, its softmax averaged over the samples; `votes`, samples per
            class; `agreement`, the share of samples for the decision; `samples`, class and softmax of each;
            `classifier`, those of the bare classifier. Probabilities and shares are in [0, 1].
        """
        label = int(self.decision[place])
        confidence, choices = self.sample_probability[place].max(dim=1)
        bare, bare_label = self.classifier_probability[place].max(dim=0)
        counts = Counter(choices.tolist())
        return {
            "class": names[label],
            "label": label,
            "probability": float(self.probability[place, label]),
            "mean_probability": float(self.sample_probability[place, :, label].mean()),
            "votes": {names[choice]: count for choice, count in counts.most_common()},
            # 0 where no sample chose the decision: it need not be the majority's.
            "agreement": counts[label] / len(choices),
            "samples": [
                {"class": names[choice], "probability": share}
                for choice, share in zip(choices.tolist(), confidence.tolist(), strict=True)
            ],
            "classifier": {"class": names[int(bare_label)], "probability": float(bare)},
        }


@torch.no_grad()
def classify(defence: Defence, images: Tensor, seed: int) -> Answer:
    """Classify images (B, channels, H, W) in [0, 1] by a defence; tensors of the answer are on the CPU.

    Raises:
        UsageError: See `Defence.check_images`.
    """
    defence.check_images(images)
    # Every purifier has this buffer, whatever else is left out of it.
    inputs = images.to(defence.purifier.mean.device)
    latents = torch.cat([draw_latents(defence, image, seed) for image in images])
    reconstructions = defence.decode(defence.condition(inputs), latents)
    sample_logits = defence.classify_samples(reconstructions)
    return Answer(
        # The argmax of the exact view is that of log P, without ties where log P saturates.
        defence.aggregate(sample_logits, "exact").argmax(dim=1).cpu(),
        defence.aggregate(sample_logits, "log-probability").exp().cpu(),
        sample_logits.softmax(dim=2).cpu(),
        in_precision(defence.classifier, defence.precision)(inputs).softmax(dim=1).cpu(),
        reconstructions.cpu(),
    )


def draw_latents(defence: Defence, image: Tensor, seed: int) -> Tensor:
    """Draw (1, N, Z) latents for one image (channels, H, W), decided by seed and pixels alone."""
    # As bytes: rounding errors of the pixels must not choose other latents.
    content = image.mul(255.0).round().to(torch.uint8).contiguous().numpy().tobytes()
    origin = generator(seed, "prediction", hashlib.sha256(content).hexdigest())
    return defence.draw_latents(1, defence.n_samples, origin)
