"""Runs to export and predict with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from carso_cli.build import build_classifier, build_purifier, classifier_fingerprint
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runs.folder import RunFolder


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Write a run on digits with the shipped classifier and a purifier with its initial weights."""

    def make(path: Path, *overrides: str) -> Path:
        folder, recipe = RunFolder(path), load_recipe("digits", overrides)
        path.mkdir()
        folder.recipe.write_text(dump_recipe(recipe))
        classifier = build_classifier(recipe, "at")
        torch.manual_seed(0)
        purifier = build_purifier(recipe, classifier)
        # Statistics that differ from those of a new network, as after training.
        for name, buffer in purifier.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
        layers = list(recipe.representation.layers)
        metadata = {"layers": layers, "classifier": classifier_fingerprint(classifier)}
        save_tensors(folder.purifier, purifier.state_dict(), metadata)
        return path

    return make
