"""Where data and weights live on this machine: `CARSO_HOME`, or the platform's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """Return the folder that holds data and weights (not created here)."""
    chosen = os.environ.get("CARSO_HOME")
    return (
        Path(os.path.expanduser(chosen))
        if chosen
        else Path(platformdirs.user_cache_dir("carso", appauthor=False))
    )


def data_home() -> Path:
    """Return the folder searched for data sets."""
    return home() / "data"


def weights_home() -> Path:
    """Return the folder searched for classifier weights."""
    return home() / "weights"
