"""Training the purifier end to end: objectives `adversarial` and `both`, beyond the paper.

Where `BalancedBatch` perturbs images against the classifier, as the paper does, here they are perturbed
against the whole defence (condition, reconstructions, aggregation), and the loss is that of its output.

The defence that is attacked, trained and evaluated is one function. Batch normalisation keeps the statistics
that the purifier starts with, for three reasons: the attack then sees what the loss sees, an image's loss
does not depend on the rest of its batch, and the samples of one image do not count as a batch of their own.
The classifier is frozen as ever. Under `adversarial` the posterior's encoder takes no part and gets no
gradient.

- `EndToEnd`: the purifier as seen through the defence;
- `perturbed`: images attacked for training;
- `adversarial_terms`: the loss of one batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.passes import samples_per_pass
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import ENCODER_PARTS, Purifier
from carso_cli.distributed.world import World
from carso_cli.errors import RecipeError
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.precision import autocast, in_precision
from carso_cli.runtime.seed import derive_seed, generator

HELD_OUT_STEPS = 10
"""Steps of the attack on held-out images: a purifier can overfit to the few steps of training."""


def refuse_trades(recipe: Recipe) -> None:
    """Refuse a recipe that trains with TRADES, which earlier versions did; its runs still evaluate.

    Raises:
        RecipeError: If its objective is not the ELBO, and `training.adversarial.trades_weight` is given.
    """
    weight = recipe.training.adversarial.trades_weight
    # The ELBO never read the key.
    if weight is not None and recipe.training.objective != "elbo":
        raise RecipeError(
            f"{recipe.reference}: training.adversarial.trades_weight is {weight:g}, and training with TRADES "
            "was removed; only null is allowed",
            hint="leave the key out, and choose training.objective adversarial (cross-entropy through the "
            "whole defence) or both (with the ELBO); runs that were trained with TRADES still evaluate",
        )


class EndToEnd(nn.Module):
    """The purifier's parameters behind the defence's output.

    Args:
        recipe: The recipe.
        classifier: The frozen classifier.
        purifier: What is trained; put into evaluation mode, for its batch normalisation.
        second_classifier: Classifier of the reconstructions, where it is another one.
    """

    def __init__(
        self, recipe: Recipe, classifier: nn.Module, purifier: Purifier, second_classifier: nn.Module | None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.defence = Defence(
            classifier,
            purifier,
            recipe.representation.layers,
            n_samples=recipe.training.adversarial.n_samples,
            aggregation=recipe.evaluation.aggregation,
            second_classifier=second_classifier,
            precision=recipe.precision,
        )
        # A defence freezes all of its parts.
        encodes = recipe.training.objective == "both"
        for name, parameter in purifier.named_parameters():
            parameter.requires_grad_(encodes or not name.startswith(ENCODER_PARTS))

    def forward(self, images: Tensor, latents: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return (B, C) logits of the exact view; with noise, also what the ELBO needs.

        Args:
            images: (B, channels, H, W) in [0, 1].
            latents: (B, N, Z).
            noise: (B, Z) standard normal draws for the posterior; None leaves the ELBO out.
        """
        # Cross-entropy on log P is masked: where we measured, 0.91 of its gradients were exactly zero.
        logits = self.defence(images, latents=latents, view="exact")
        if noise is None:
            return (logits,)
        with autocast(self.recipe.precision, images.device):
            # The classifier is frozen and the images are data: nothing before the purifier learns.
            with torch.no_grad():
                representation = extract_representation(self.defence.classifier, images, self.defence.layers)
            return logits, *self.defence.purifier(images, representation, noise)


def perturbed(
    recipe: Recipe, defence: Defence, images: Tensor, labels: Tensor, seed: int, steps: int | None = None
) -> Tensor:
    """Attack images for training as `training.adversarial` says.

    By PGD on the cross-entropy of the exact view, with fresh latents at every step (Athalye et al., 2018),
    from a random point of the ball, in steps of 2.5 radii over their number (Madry et al., 2018), or a single
    one of 1.25 (Wong et al., 2020).

    Args:
        recipe: The recipe; the radius is that of its threat model.
        defence: What is attacked, in evaluation mode.
        images: (B, channels, H, W) in [0, 1].
        labels: (B,).
        seed: Seed of starts and latents.
        steps: Steps of the attack; those of training when None.
    """
    # A small shard may hold no image that is attacked.
    if len(images) == 0:
        return images
    section, evaluation, eps = recipe.training.adversarial, recipe.evaluation, recipe.threat.eps
    steps = steps or section.steps
    target = DefenceTarget(
        defence,
        "exact",
        samples_per_pass=samples_per_pass(evaluation.samples_per_pass, images.device, section.n_samples),
        generator=generator(seed, "latents"),
        n_samples=section.n_samples,
    )
    attack = PGDEoT(
        ThreatModel(recipe.threat.norm, eps),
        steps=steps,
        eot_samples=1,
        # `max` makes a single step 1.25 radii long.
        step_size=2.5 * eps / max(steps, 2),
        random_start=True,
        seed=seed,
    )
    return attack(target, images, labels)


def adversarial_terms(
    trained: EndToEnd,
    replica: nn.Module,
    clean: Tensor,
    labels: Tensor,
    place: tuple[int, int],
    beta: float,
    world: World,
) -> dict[str, Tensor]:
    """Perturb this process's shard of a batch against the current defence, and return its loss.

    Args:
        trained: The purifier behind the defence.
        replica: The same, to be called where gradients are to be summed over processes.
        clean: (B, channels, H, W) in [0, 1]: the whole batch.
        labels: (B,).
        place: Epoch and batch; every random choice depends on them, and that of the attack on the process.
        beta: Weight of the KL term, for `both`.
        world: The processes that share the batch.

    Returns:
        Scalars summed over the shard: `loss`, to be minimised, and `accuracy`, the right answers on it as
        perturbed; for `both` also `bce` and `kl` of the ELBO on the same images.
    """
    recipe, defence = trained.recipe, trained.defence
    seed, section = recipe.seed, recipe.training.adversarial
    whole, shard = len(clean), world.shard(len(clean))
    # Drawn for the whole batch: an image's latents do not depend on the number of processes.
    latents = defence.draw_latents(whole, generator=generator(seed, "prior", *place))[shard]
    noise = None
    if recipe.training.objective == "both":
        shape = (whole, defence.latent_features)
        noise = torch.randn(shape, generator=generator(seed, "posterior", *place))[shard].to(clean.device)
    # The leading part of the batch is attacked, as in `BalancedBatch`: batches are shuffled already.
    count = int((torch.arange(whole)[shard] < round(whole * section.adversarial_fraction)).sum())
    clean, labels = clean[shard], labels[shard]
    aims: Tensor = labels
    if section.targets == "classifier":
        with torch.no_grad():
            aims = in_precision(defence.classifier, recipe.precision)(clean).softmax(dim=1)
        # The attack needs one class; the loss takes all of the answer.
        labels = aims.argmax(dim=1)
    # The rank takes part: otherwise images of two processes would meet the same random numbers.
    attack_seed = derive_seed(seed, "attack on the defence", *place, world.rank)
    attacked = perturbed(recipe, defence, clean[:count], labels[:count], attack_seed)
    # One call for both parts: DDP sums gradients once per forward and backward.
    logits, *encoded = replica(torch.cat((attacked, clean[count:])), latents, noise)
    # Summed over images, as the learning rates of Table 16 are meant for.
    loss = F.cross_entropy(logits, aims, reduction="sum")
    terms = {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).sum()}
    if noise is not None:
        reconstruction, mean, log_variance = encoded
        if not reconstruction.detach().isfinite().all():
            # Its cross-entropy would raise an error of torch's own, which on a GPU ends the process. The sum
            # over processes is not finite either, so that all of them raise ours.
            return terms | dict.fromkeys(("loss", "bce", "kl"), loss.new_tensor(math.nan))
        elbo = negative_elbo(reconstruction, clean, mean, log_variance, beta)
        terms |= {"loss": loss + section.elbo_weight * elbo.total, "bce": elbo.bce, "kl": elbo.kl}
    return terms
