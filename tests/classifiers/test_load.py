from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from carso_cli.classifiers import load as module
from carso_cli.classifiers.architectures import Blueprint
from carso_cli.classifiers.load import load_classifier
from carso_cli.classifiers.registry import find_record
from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.errors import RecipeError, WeightsError
from carso_cli.io.paths import weights_home

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CUI = "Cui2023Decoupled_WRN-28-10"


WRN = Blueprint("wide-resnet", None, 10, 1, "relu", classes=10, channels=3, image_size=32, mean=MEAN, std=STD)


def load(**changes: Any) -> nn.Module:
    weights: dict[str, Any] = {"source": "file", "name": None, "file": None}
    weights |= {"dataset": "image-folder", "recipe": "mine", "kind": "at"}
    named = {key: value for key, value in changes.items() if key in weights}
    blueprint = replace(WRN, **{key: value for key, value in changes.items() if key not in weights})
    return load_classifier(blueprint, **(weights | named))


def small() -> WideResNet:
    return WideResNet(depth=10, width=1, classes=10, activation="relu", mean=MEAN, std=STD)


def assert_frozen(classifier: nn.Module) -> None:
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize("place", ["given", "home"])
def test_finds_a_file_as_given_and_in_the_home(tmp_path: Path, place: str) -> None:
    model = small().eval()
    folder = tmp_path if place == "given" else weights_home()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "mine.safetensors")
    loaded = load(file=str(tmp_path / "mine.safetensors") if place == "given" else "mine.safetensors")
    assert_frozen(loaded)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_missing_file_says_where_it_was_looked_for_and_how_to_train_it() -> None:
    with pytest.raises(WeightsError, match=r"'mine\.pt' are missing") as caught:
        load(file="mine.pt")
    assert f"looked for mine.pt and {weights_home() / 'mine.pt'}" in caught.value.message
    assert caught.value.hint == "train them with: carso train-classifier mine --kind at"
    assert caught.value.exit_code == 3


def test_another_architecture_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save(small().state_dict(), path)
    with pytest.raises(WeightsError, match=r"logits\.weight is \(10, 64\), not \(3, 64\)"):
        load(file=str(path), classes=3)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"activation": "silu"}, "was trained with activation silu; the recipe says relu"),
        ({"mean": [0.5, 0.5, 0.5]}, r"was trained with mean \[0.5, 0.5, 0.5\]; the recipe says \[0.4914"),
    ],
)
def test_refuses_what_would_silently_compute_something_else(
    tmp_path: Path, header: dict[str, Any], message: str
) -> None:
    path = tmp_path / "mine.safetensors"
    metadata = {key: json.dumps(value) for key, value in header.items()}
    save_file(small().state_dict(), path, metadata=metadata)
    with pytest.raises(WeightsError, match=message):
        load(file=str(path))


@pytest.mark.parametrize("name", ["digits-at", "digits-clean"])
def test_loads_what_ships(name: str) -> None:
    classifier = load(source="shipped", name=name, dataset="digits")
    assert_frozen(classifier)
    # Its own standardisation, whatever the recipe says.
    assert classifier.mean.flatten().tolist() == pytest.approx([0.3051] * 3)  # type: ignore[operator]


def test_a_damaged_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_record("shipped", "digits-at", "digits").file.read_bytes()
    (tmp_path / "digits-at.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr("carso_cli.classifiers.registry.SHIPPED_FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="is damaged: its checksum is not that of 'digits-at'"):
        load(source="shipped", name="digits-at", dataset="digits")


def test_the_recipe_cannot_change_a_known_architecture() -> None:
    with pytest.raises(RecipeError, match=r"'digits-at' is a WideResNet-10-1 with relu.*WideResNet-16-1"):
        load(source="shipped", name="digits-at", dataset="digits", depth=16)
    with pytest.raises(RecipeError, match="'digits-at' knows 10 classes; the recipe says 3"):
        load(source="shipped", name="digits-at", dataset="digits", classes=3)


ROBUSTBENCH: dict[str, Any] = {
    **{"source": "robustbench", "name": CUI, "dataset": "cifar10"},
    **{"depth": 28, "width": 10, "activation": "silu"},
}


def test_missing_robustbench_weights_say_where_they_come_from_and_belong() -> None:
    with pytest.raises(WeightsError, match=f"RobustBench's '{CUI}' for cifar10 are missing") as caught:
        load(**ROBUSTBENCH)
    place = weights_home() / "cifar10" / "Linf" / f"{CUI}.pt"
    assert f"looked for {place} and models/cifar10/Linf/{CUI}.pt" in caught.value.message
    page = "https://drive.google.com/file/d/1-AaTrYt23WJFR22hXgBd-i6kjpsz6Hf2"
    assert caught.value.hint == (f"download them with: carso doctor mine --fetch\nor save {page} as {place}")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("place", ["home", "models"])
def test_loads_robustbenchs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide_resnets: Any, place: str
) -> None:
    # A smaller model, since the real one has 36 million parameters.
    record = replace(find_record("robustbench", CUI, "cifar10"), depth=10, width=1)
    monkeypatch.setattr(module, "find_record", lambda *_: record)
    monkeypatch.chdir(tmp_path)
    reference = wide_resnets.DMWideResNet(10, 10, 1, wide_resnets.Swish, MEAN, STD).eval()
    root = weights_home() if place == "home" else Path("models")
    path = root / "cifar10" / "Linf" / f"{CUI}.pt"
    path.parent.mkdir(parents=True)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in reference.state_dict().items()}}, path
    )
    loaded = load(**ROBUSTBENCH | {"depth": 10, "width": 1})
    assert_frozen(loaded)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), reference(images), rtol=1e-5, atol=1e-5)


def test_a_download_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save(small().state_dict(), path)
    path.with_name("mine.pt.sha256").write_text("0" * 64)
    with pytest.raises(WeightsError, match=r"mine\.pt: it is not what was downloaded"):
        load(file=str(path))


class Offered:
    """What a user's package offers: targets of entry points."""

    @staticmethod
    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    @staticmethod
    def number() -> int:
        return 3

    @staticmethod
    def failing() -> nn.Module:
        raise ValueError("no such checkpoint")


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("offered_classifiers")
    package.Offered = Offered  # type: ignore[attr-defined]  # a module made for this test
    monkeypatch.setitem(sys.modules, "offered_classifiers", package)
    points = [
        EntryPoint(name, f"offered_classifiers:Offered.{name}", "carso.classifiers")
        for name in ("linear", "number", "failing")
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: points if group == "carso.classifiers" else [])


@pytest.mark.usefixtures("offered")
def test_takes_a_module_from_an_entry_point() -> None:
    classifier = load(family="external", source="entry-point", name="linear", image_size=2, classes=3)
    assert_frozen(classifier)
    assert classifier(torch.rand(5, 3, 2, 2)).shape == (5, 3)


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 4}, r"'linear' does not take 3x4x4 images: mat1 and mat2"),
        (
            {"image_size": 2},
            r"'linear' returns \(1, 3\) for one image; the recipe's 10 classes need \(1, 10\)",
        ),
    ],
)
def test_a_module_that_does_not_fit_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(family="external", source="entry-point", name="linear", **changes)


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("liner", RecipeError, "no installed package offers a classifier 'liner'.*failing, linear, number"),
        ("number", WeightsError, "entry point 'number' returned a int, not a torch module"),
        ("failing", WeightsError, r"'failing' \(offered_classifiers:Offered.failing\) failed: no such"),
    ],
)
def test_names_a_bad_entry_point(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load(family="external", source="entry-point", name=name)


def test_external_and_entry_point_go_together() -> None:
    with pytest.raises(RecipeError, match="go together"):
        load(family="external", source="file", file="a.pt")
