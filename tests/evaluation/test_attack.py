from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carso_cli.errors import DataError, UsageError
from carso_cli.evaluation.attack import attack
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runtime.reporter import SilentReporter

SHARES = [0.5, 0.9, 1.1, 1.5, 0.7]


def make(toys: ModuleType, run: Path, **options: Any) -> dict[str, Any]:
    defence = toys.LinearDefence(noise=0.0)
    chosen: dict[str, Any] = {
        "name": "pgd-eot",
        "images": toys.images_with_margins(defence, SHARES),
        "defence": defence,
        "device": "cpu",
    }
    return attack(toys.small_recipe(), run=run, reporter=SilentReporter(), **{**chosen, **options})


@pytest.mark.parametrize("target", ["classifier", "defence"])
def test_examples_are_saved_with_what_is_known_of_them(toys: ModuleType, tmp_path: Path, target: str) -> None:
    result = make(toys, tmp_path, target=target)
    assert result["out"] == str(tmp_path / "attacks" / f"pgd-eot-{target}.safetensors")
    tensors, metadata = load_tensors(Path(result["out"]))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        **dict.fromkeys(("images", "adversarial"), (5, 1, 4, 4)),
        **dict.fromkeys(("labels", "indices", "predictions", "correct", "distances"), (5,)),
    }
    change = (tensors["adversarial"] - tensors["images"]).abs().flatten(1).amax(1)
    torch.testing.assert_close(change, tensors["distances"])
    assert float(change.max()) == pytest.approx(toys.EPS, abs=1e-6)
    # Images whose margin eps can take away are fooled, the others are not.
    fooled = tensors["predictions"] != tensors["labels"]
    assert fooled.tolist() == [share < 1 for share in SHARES]
    assert tensors["indices"].tolist() == [100, 101, 102, 103, 104]
    assert result["clean"] == 1.0
    assert result["accuracy"] == pytest.approx(0.4)
    assert (metadata["attack"], metadata["target"], metadata["eps"]) == ("pgd-eot", target, toys.EPS)
    assert metadata["label_source"] == "data"
    with Image.open(result["picture"]) as picture:
        # The defence adds a row: one reconstruction.
        assert picture.format == "PNG"
        assert picture.height > (430 if target == "defence" else 350)


def test_a_file_is_what_its_suffix_says_and_has_its_own_picture(toys: ModuleType, tmp_path: Path) -> None:
    results = [make(toys, tmp_path, out=tmp_path / name) for name in ("a.npz", "a.safetensors")]
    with np.load(tmp_path / "a.npz") as arrays:
        tensors, metadata = load_tensors(tmp_path / "a.safetensors")
        assert {*arrays} == {*tensors, "metadata"}
        np.testing.assert_array_equal(arrays["adversarial"], tensors["adversarial"].numpy())
        assert json.loads(str(arrays["metadata"]))["attack"] == metadata["attack"] == "pgd-eot"
    assert len({result["picture"] for result in results}) == 2
    for result in results:
        for kind in (".png", ".svg", ".pdf"):
            assert Path(result["picture"]).with_suffix(kind).is_file()
    with pytest.raises(UsageError, match=r"written as \.safetensors or \.npz, not '\.pt'"):
        make(toys, tmp_path, out=tmp_path / "a.pt")


def test_image_files_take_the_targets_decision_as_label(tmp_path: Path, toys: ModuleType) -> None:
    # The recipe's images are 3x32x32: a classifier of them that looks at the mean brightness.
    for number, level in enumerate((40, 200)):
        Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / f"{number}.png")

    def classifier(images: torch.Tensor) -> torch.Tensor:
        bright = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-bright, bright, *[torch.full_like(bright, -9.0)] * 8], dim=1)

    files = [tmp_path / "0.png", tmp_path / "1.png"]
    options: dict[str, Any] = {"classifier": classifier, "target": "classifier", "name": "pgd"}
    options |= {"run": tmp_path, "reporter": SilentReporter(), "device": "cpu"}
    recipe = toys.small_recipe("threat.eps=0.3", "evaluation.pgd_step_size=0.1")
    result = attack(recipe, files=files, **options)
    tensors, metadata = load_tensors(Path(result["out"]))
    assert tensors["labels"].tolist() == [0, 1]
    assert metadata["label_source"] == "prediction"
    assert metadata["source"] == [str(file) for file in files]
    # 40/255 and 0.3 do not reach mid-grey; 200/255 less 0.3 does.
    assert tensors["predictions"].tolist() == [0, 0]
    with pytest.raises(DataError, match=r"gone\.png"):
        attack(recipe, files=[tmp_path / "gone.png"], **options)


def test_a_protocol_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'adaptive' is a protocol"):
        make(toys, tmp_path, name="adaptive")
