"""Any attack on any PyTorch model, in one call; `carso_cli.attack`.

    perturb = attack("pgd", model, eps=8 / 255)
    examples = perturb(images, labels)

For a number to report use `carso_cli.audit`: it attacks in several ways and says whether to trust the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from carso_cli.attacks.gradient_sources import OUTPUT, GradientSource
from carso_cli.attacks.registry import Budget, build_attack
from carso_cli.attacks.source_target import SourceTarget
from carso_cli.attacks.target import AttackTarget, Model
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError, nearest

_DEFAULTS = {
    "pgd_steps": 40,
    "apgd_steps": 100,
    "pgd_eot_steps": 200,
    "eot_draws": 20,
    "square_queries": 5000,
    "restarts": 1,
}
Perturb = Callable[[Tensor, Tensor], Tensor]


def attack(
    name: str,
    model: Model | AttackTarget,
    *,
    eps: float,
    norm: str = "linf",
    random: bool = False,
    seed: int = 0,
    **budget: float,
) -> Perturb:
    """Return an attack on a model: a function from images and labels to adversarial examples.

    Args:
        name: As on the command line: `fgsm`, `pgd`, `apgd-ce`, `apgd-targeted`, `fab`, `square`, `aa`,
            `pgd-eot`, `rand-aa`, …; `carso attacks ls` lists them.
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores, differentiable in the images. A module
            is put into evaluation mode.
        eps: Radius in pixel units, such as 8 / 255.
        norm: `linf` or `l2`.
        random: Whether the model is random: gradients are then means over `eot_draws` samples.
        seed: Seed of everything random in the attack, and of the model's own randomness.
        **budget: `pgd_steps` (40), `apgd_steps` (100), `pgd_eot_steps` (200), `eot_draws` (20),
            `square_queries` (5000), `restarts` (1), and `pgd_step_size` and `pgd_eot_step_size` (2.5 eps
            divided by the steps).

    Returns:
        A function from (B, channels, H, W) images in [0, 1] and (B,) int64 labels to examples of the same
        shape, in the ball and in [0, 1].

    Raises:
        UsageError: If the attack is unknown or does not fit the model, or an option is none of the budget's.
    """
    known = [field.name for field in fields(Budget)]
    if unknown := budget.keys() - set(known):
        raise UsageError(
            f"unknown option '{min(unknown)}' of an attack's budget; {nearest(min(unknown), known)}".rstrip(
                "; "
            ),
            hint=f"options: {', '.join(known)}",
        )
    values: dict[str, Any] = _DEFAULTS | budget
    for kind in ("pgd", "pgd_eot"):
        values.setdefault(f"{kind}_step_size", 2.5 * eps / values[f"{kind}_steps"])
    filled = Budget(**values)
    if isinstance(model, nn.Module):
        model.eval()
    random = model.stochastic if isinstance(model, AttackTarget) else random
    made = build_attack(name, ThreatModel(norm, eps), filled, stochastic=random, seed=seed)

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        if isinstance(model, AttackTarget):
            return made(model, images, labels)
        # Built for each call, so that two calls give the same examples.
        source = GradientSource(OUTPUT, OUTPUT, 1.0, model)
        return made(SourceTarget(source, stochastic=random, seed=seed), images, labels)

    return perturb
