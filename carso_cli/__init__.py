"""carso: the CARSO adversarial defence, and honest evaluation of its robustness.

`audit` measures the robust accuracy of any model, `attack` makes adversarial examples, `harden` puts a
purifier in front of a model. `load_defence` opens a trained run in Python; `load_recipe`, `train_purifier`,
`Defence` and `evaluate` work with a classifier of your own. Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carso_cli.attacks.functional import attack as attack
    from carso_cli.build import load_defence as load_defence
    from carso_cli.defence.defended_model import Defence as Defence
    from carso_cli.evaluation.audit import audit as audit
    from carso_cli.evaluation.run import evaluate as evaluate
    from carso_cli.hardening.harden import harden as harden
    from carso_cli.recipe.load import load_recipe as load_recipe
    from carso_cli.training.purifier import train_purifier as train_purifier

__all__ = [
    "Defence",
    "__version__",
    "attack",
    "audit",
    "evaluate",
    "harden",
    "load_defence",
    "load_recipe",
    "train_purifier",
]
__version__ = "0.1.0"

_HOMES = {
    "Defence": "carso_cli.defence.defended_model",
    "attack": "carso_cli.attacks.functional",
    "audit": "carso_cli.evaluation.audit",
    "evaluate": "carso_cli.evaluation.run",
    "harden": "carso_cli.hardening.harden",
    "load_defence": "carso_cli.build",
    "load_recipe": "carso_cli.recipe.load",
    "train_purifier": "carso_cli.training.purifier",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (module attributes have any type)
    # Resolved on first use so that `carso --help` stays free of torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Names that are loaded on first use are not there to be listed otherwise.
    return sorted({*globals(), *__all__})
