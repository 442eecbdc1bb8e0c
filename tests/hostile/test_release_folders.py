"""Folders that should hold a published purifier: a run that works, or a message and no run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from carso_cli.build import build_classifier, build_purifier, classifier_fingerprint
from carso_cli.defence.release_format import PUBLISHED_PARTS, to_release
from carso_cli.errors import CarsoError
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools.import_release import import_release
from tests.hostile.conftest import Bounded

NAMES = [f"model_{part}.safetensors" for part in PUBLISHED_PARTS]


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load_recipe("digits", ["purifier.condition_features=8", "purifier.latent_features=4"])


@pytest.fixture(scope="session")
def release(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    classifier = build_classifier(recipe, "at")
    torch.manual_seed(0)
    state = build_purifier(recipe, classifier).state_dict()
    folder = tmp_path_factory.mktemp("release")
    for name, part in zip(NAMES, PUBLISHED_PARTS, strict=True):
        about = {"part": part, "classifier": classifier_fingerprint(classifier)}
        save_tensors(folder / name, to_release(part, state), about)
    return folder


HARMS = (
    *("cut", "flip", "lose", "empty", "twice", "folder", "link"),
    *("rename tensor", "other shape", "not finite"),
)


def harm(folder: Path, name: str, kind: str, place: float) -> None:
    path = folder / name
    content = path.read_bytes()
    spot = int(place * (len(content) - 1))
    if kind == "cut":
        path.write_bytes(content[:spot])
    elif kind == "flip":
        path.write_bytes(content[:spot] + bytes([content[spot] ^ 16]) + content[spot + 1 :])
    elif kind in ("lose", "empty", "folder", "link"):
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/dev/zero")
    elif kind == "twice":
        shutil.copy(path, folder / f"other_{name}")
    else:
        tensors = load_file(path)
        key = sorted(tensors)[int(place * (len(tensors) - 1))]
        if kind == "rename tensor":
            tensors[f"x{key}"] = tensors.pop(key)
        elif kind == "other shape":
            tensors[key] = torch.zeros(*tensors[key].shape, 2)
        else:
            tensors[key] = torch.full(tensors[key].shape, float("nan"))
        save_file(tensors, path)


@given(
    harms=st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(HARMS), st.floats(0, 1)),
        max_size=2,
        unique_by=lambda harm: harm[0],
    ),
    extra=st.sampled_from([None, "README.md", "x_encoder.safetensors", ".hidden", "a\nb"]),
)
def test_release_folders(
    release: Path,
    recipe: Recipe,
    bounded: Bounded,
    tmp_path_factory: pytest.TempPathFactory,
    harms: list[tuple[str, str, float]],
    extra: str | None,
) -> None:
    work = tmp_path_factory.getbasetemp() / "imported"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(release, work / "release")
    if extra is not None:
        (work / "release" / extra).write_text("nothing")
    for name, kind, place in harms:
        harm(work / "release", name, kind, place)
    try:
        with bounded():
            import_release(work / "release", recipe, run=work / "run", reporter=SilentReporter())
    except CarsoError as error:
        refused = error
    else:
        assert not harms
        assert (work / "run" / "recipe.yaml").is_file()
        return
    assert harms, refused.message
    # The folder itself, a file in it, or the part that a file holds.
    culprits = {
        "release",
        *(name.removesuffix(".safetensors").removeprefix("model_") for name, _, _ in harms),
    }
    assert any(culprit in refused.message for culprit in culprits), refused.message
    assert not (work / "run" / "recipe.yaml").exists()
