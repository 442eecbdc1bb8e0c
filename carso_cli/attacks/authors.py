"""AutoAttack's `rand` version as its library runs it: the paper's randAA, step by step.

Title: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"
(Croce and Hein, 2020), `rand` version, https://arxiv.org/abs/2003.01690; pyautoattack's implementation.
Distance: linf, l2.
Published setting (Section 5.1): 100 steps, 20 EoT samples, one restart of each loss.

    attack = AuthorsRandAA(ThreatModel("linf", 8 / 255), steps=100, eot_samples=20)
    examples = attack(DefenceTarget(defence, "released", 4096, generator), images, labels)

Losses and decisions are those of one draw, DLR runs on what cross-entropy left, and an image for which no
example was found is returned unperturbed. Where the output saturates, as the released view does, gradients
are NaN, and the library returns nearly all images unperturbed. `rand_autoattack` holds our own version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.attack import Attack, require_finite
from carso_cli.attacks.library_model import LOGGER, LibraryModel, warnings_to
from carso_cli.attacks.target import AttackTarget
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import derive_seed, seeded
from carso_cli.runtime.third_party import prepare


@dataclass(frozen=True, eq=False, kw_only=True)
class AuthorsRandAA(Attack):
    """The library's own run; with two classes, where DLR is undefined, on cross-entropy alone.

    Args:
        steps: Steps of APGD.
        eot_samples: K, samples of the model per gradient.
    """

    name: ClassVar[str] = "authors-rand-aa"
    steps: int
    eot_samples: int

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`. Images for which nothing was found are returned as they are.

        Raises:
            UsageError: If each image has its own radius.
        """
        if isinstance(self.threat.eps, Tensor) and self.threat.eps.ndim:
            raise UsageError(f"attack '{self.name}' takes one eps for all images")
        prepare()
        from pyautoattack import AutoAttack
        from pyautoattack.autopgd_base import APGDAttack

        # Under l2 the library would turn images of NaN gradients into NaN, and count them as fooled.
        model = LibraryModel(target, recorder=self.recorder, keep_nan=self.threat.norm == "linf")
        settings = {
            "eps": float(self.threat.eps),
            "norm": {"linf": "Linf", "l2": "L2"}[self.threat.norm],
            "seed": derive_seed(self.seed, self.name),
            "device": images.device,
        }
        with warnings_to(self.recorder), seeded(self.seed, self.name):
            library = AutoAttack(model, version="rand", **settings)
            # Built again: a number of steps set afterwards would leave the library's checkpoints stale.
            library.apgd = APGDAttack(
                model, n_iter=self.steps, eot_iter=self.eot_samples, logger=LOGGER, **settings
            )
            if model(images[:1]).shape[1] < 3:
                library.attacks_to_run = ["apgd-ce"]
            # The library calls `.view` on images, which must be contiguous.
            found, _ = library.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))
        return require_finite(found, self.name)
