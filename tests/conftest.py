"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of golden tensors and real images beside the checkout."""
    if not (SHARED / "golden" / "README.md").is_file():
        pytest.skip("needs the golden tensors and real images of ../shared, which is absent here")
    return SHARED


@pytest.fixture(scope="session")
def golden_folder(shared_folder: Path) -> Path:
    return shared_folder / "golden"


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests never read or fill the user's own cache.
    monkeypatch.setenv("CARSO_HOME", str(tmp_path_factory.mktemp("carso-home")))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
