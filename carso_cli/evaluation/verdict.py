"""Whether a number can be trusted, in one sentence: what the checks that failed say against it."""

from __future__ import annotations

from collections.abc import Sequence

from carso_cli.evaluation.sanity_checks import Check
from carso_cli.runs.summary import describe_upper_bound

REASONS = {
    "batch-independence": "an image's answer depends on the other images of its batch",
    "no-memory": "the model remembers what it was asked before",
    "repeatable": "under fixed seeds it answers otherwise each time",
    "deterministic": "the model is random on attacked images only, and was attacked as if it were not",
    "finite-answers": "the model answers NaN to attacked images, which counts as wrong",
    "input-kept": "the model changes the images that it is given",
    "above-chance": "the clean accuracy is at chance, or the images are too few to tell",
    "faithful-gradient": "no gradient that the attacks could follow is that of the model's decision",
    "black-box": "a black-box attack finds what the gradients miss",
    "other-attacks": "attacks by the same gradients disagree: following the slope leads nowhere",
    "other-sources": "attacks on a changed model find what the model's own gradients miss",
    "twice-the-steps": "twice the steps break more images: the budget is too small",
    "large-eps-attack": "even where any image can become any other, the attack fails",
    "eot-adequacy": "the gradient of a random model is averaged over too few samples",
    "float64-agreement": "the decisions depend on the rounding of float32",
    "in-ball": "an example leaves the ball",
    "gradients-followed": "no attack followed the model's own gradients",
    "nan-gradients": "gradients are NaN or infinite",
    "zero-gradients": "gradients are zero on images that are still right",
    "saturated-outputs": "outputs saturate",
    "loss-rises": "no attack lowers the label's lead",
    "examples-moved": "no attack moves the images towards another class",
    "attack-order": "a stronger attack does worse than a weaker one",
    "surrogates": "attacks on surrogates find what the gradients miss",
    "classifier-black-box": "a black-box attack finds what gradients of the classifier miss",
    "falls-with-eps": "a larger ball leaves more images right",
    "rule-agreement": "the attacked view decides otherwise than the defence",
}
"""What a failed check says against a number, in the order in which reasons are given."""


def verdict_of(checks: Sequence[Check], *, upper_bound: bool = False) -> tuple[bool | None, str]:
    """Return whether a number can be trusted, and the verdict in words.

    Args:
        checks: The checks.
        upper_bound: Whether the number comes from a few attacks only, as of `quick` or one attack.

    Returns:
        False and `not trusted: ` with the reasons where a check failed. Otherwise True and `trusted`; of an
        upper bound None and `upper bound: ` with counts, since no check says what other attacks would find.
    """
    names = [check.name for check in checks if check.passed is False]
    if not names:
        if upper_bound:
            return None, describe_upper_bound([check.as_dict() for check in checks])
        return True, "trusted"
    told = dict.fromkeys(REASONS.get(name, name) for name in sorted(names, key=[*REASONS, *names].index))
    return False, f"not trusted: {'; '.join(told)}"
