"""Names of the attacks and of the protocols that combine them; loads no torch.

`ATTACKS` are the names that `carso_cli.attacks.registry.build_attack` knows. A `Protocol` says which of
them are run against the bare classifier and which against the defence, and on which of its views.
"""

from __future__ import annotations

from dataclasses import dataclass

from carso_cli.errors import UsageError, nearest

BASELINES = ("none", "noise")
TRANSFERS = (
    "transfer-logit-mean",
    "transfer-probability-mean",
    "transfer-single-sample",
    "transfer-log-probability",
    "transfer-straight-through",
    "transfer-classifier",
)
ATTACKS = (
    *BASELINES,
    "fgsm",
    "pgd",
    "apgd-ce",
    "apgd-dlr",
    "fab",
    "square",
    "aa",
    "rand-aa",
    "pgd-eot",
    "pgd-eot-random-start",
    *TRANSFERS,
)
DETERMINISTIC_ONLY = ("aa",)
"""Attacks that need a model without randomness; against the defence `rand-aa` takes their place."""
DEFENCE_ONLY = TRANSFERS
"""Attacks that have no meaning against a bare classifier."""


@dataclass(frozen=True)
class Protocol:
    """A set of attacks whose worst case per image is the result.

    Args:
        name: Name on the command line.
        meaning: One sentence for help texts and tables.
        classifier: Attacks on the bare classifier.
        defence: Attacks on the defence.
        view: View of the defence that is attacked, where an attack does not choose its own.
    """

    name: str
    meaning: str
    classifier: tuple[str, ...]
    defence: tuple[str, ...]
    view: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "adaptive",
            "the lowest accuracy over white-box, surrogate and black-box attacks on the exact view",
            classifier=("aa",),
            defence=("rand-aa", "pgd-eot", "pgd-eot-random-start", *TRANSFERS, "square"),
            view="exact",
        ),
        Protocol(
            "published",
            "the paper's own: AutoAttack on the classifier, randAA and PGD+EoT on the released view",
            classifier=("aa",),
            defence=("rand-aa", "pgd-eot"),
            view="released",
        ),
        Protocol(
            "quick",
            "minutes instead of hours: PGD+EoT and one transfer; an upper bound, not a result to report",
            classifier=("pgd",),
            defence=("pgd-eot", "transfer-classifier"),
            view="exact",
        ),
    )
}


def check_name(name: str) -> str:
    """Return `name` if it is an attack or a protocol.

    Raises:
        UsageError: If it is neither; the message gives the nearest known names.
    """
    known = (*PROTOCOLS, *ATTACKS)
    if name not in known:
        raise UsageError(
            f"unknown attack or protocol '{name}'; {nearest(name, known)}".rstrip("; "),
            hint=f"protocols: {', '.join(PROTOCOLS)}; attacks: {', '.join(ATTACKS)}",
        )
    return name
