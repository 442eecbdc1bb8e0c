"""carso: the CARSO adversarial defence, and an evaluation that attacks it honestly.

`load_defence` is the way in from Python; importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carso_cli.build import load_defence as load_defence

__all__ = ["__version__", "load_defence"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401  (module attributes have any type)
    # Resolved on first use so that `carso --help` stays free of torch.
    if name == "load_defence":
        from carso_cli.build import load_defence

        return load_defence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
