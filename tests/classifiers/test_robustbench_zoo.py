"""RobustBench's zoo: names, downloads from a server of ours, and files that are refused unread."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import nn

from carso_cli.classifiers import robustbench_zoo as zoo
from carso_cli.classifiers.robustbench_zoo import ZooEntry, find_entry, load_zoo_model
from carso_cli.errors import MissingError, UsageError, WeightsError
from carso_cli.io.paths import weights_home
from carso_cli.runtime.reporter import SILENT


class Site(Protocol):
    url: str
    content: bytes
    kind: str
    asked: list[str | None]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc((images - self.get_buffer("mu")).flatten(1))
        return scores


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([Tiny(), Tiny()])


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def entry(url: str, **changes: Any) -> ZooEntry:
    return ZooEntry(
        **{
            "name": "Tiny2020", "dataset": "cifar10", "threat": "Linf", "files": (url,), "build": Tiny,
            **changes,
        }
    )  # fmt: skip


def test_names_of_the_zoo() -> None:
    assert find_entry("Carmon2019Unlabeled").reference == "cifar10/Linf/Carmon2019Unlabeled"
    assert find_entry("Wong2020Fast", dataset="imagenet").reference == "imagenet/Linf/Wong2020Fast"
    assert find_entry("Standard", norm="l2").reference == "cifar10/L2/Standard"
    assert find_entry("cifar10/linf/Standard").paths() == [Path("cifar10/Linf/Standard.pt")]
    assert len(find_entry("Chen2020Adversarial", dataset="cifar10").files) == 3
    assert find_entry("Debenedetti2022Light_XCiT-S12", dataset="cifar100").files[0].startswith("https://")
    with pytest.raises(UsageError, match="2 models 'Standard'") as caught:
        find_entry("Standard")
    assert "robustbench:cifar10/L2/Standard" in caught.value.hint
    with pytest.raises(UsageError, match="no models for mnist/Linf"):
        find_entry("mnist/Linf/x")


def test_a_real_architecture_is_downloaded_once_and_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_entry("cifar10/Linf/Wong2020Fast")
    monkeypatch.setattr(zoo, "DRIVE", site.url + "?id={}")
    original = found.build()
    state = {f"module.{name}": value for name, value in original.state_dict().items()}
    # As that file is published: without the standardisation, beside numbers of numpy.
    for name in ("module.mu", "module.sigma"):
        del state[name]
    site.content = saved({"state_dict": state, "best": np.float64(0.5)})
    images = torch.rand(2, 3, 32, 32)
    expected = original.eval()(images)
    for _ in range(2):
        model = load_zoo_model(found, reporter=SILENT)
        assert torch.allclose(model(images), expected)
    assert len(site.asked) == 1
    assert not any(parameter.requires_grad for parameter in model.parameters())
    path = weights_home() / "cifar10/Linf/Wong2020Fast.pt"
    path.write_bytes(path.read_bytes()[:-8] + b"x" * 8)
    with pytest.raises(WeightsError, match="it is not what was downloaded"):
        load_zoo_model(found, reporter=SILENT)


def test_an_ensemble_takes_a_file_for_each_model(site: Site) -> None:
    site.content = saved(Tiny().state_dict())
    found = entry(site.url, files=(site.url, site.url), build=Ensemble)
    model = load_zoo_model(found, reporter=SILENT)
    first, second = (model.get_parameter(f"models.{place}.fc.weight") for place in range(2))
    assert torch.equal(first, second)
    assert [path.name for path in found.paths()] == ["Tiny2020.pt_m0.pt", "Tiny2020.pt_m1.pt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (saved({"state_dict": Evil()}), "reading it could run code, and is refused"),
        (saved(nn.Linear(2, 2)), "reading it could run code, and is refused"),
        (saved({"epoch": 3}), "holds no state dict"),
        (saved({"fc.weight": torch.zeros(4, 12), "fc.bias": torch.full((4,), torch.nan)}), "NaN or infinite"),
        (saved({"fc.weight": torch.zeros(4, 11), "fc.bias": torch.zeros(4)}), "fc.weight is (4, 11)"),
        (saved({"fc.weights": torch.zeros(4, 12), "fc.bias": torch.zeros(4)}), "did you mean 'fc.weights'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "is a Git LFS pointer"),
    ],
)
def test_files_that_are_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    site.content = content
    with pytest.raises(WeightsError) as caught:
        load_zoo_model(entry(site.url), reporter=SILENT)
    assert said in caught.value.message
    assert "cifar10/Linf/Tiny2020.pt" in caught.value.message
    assert not (tmp_path / "harmed").exists()


def test_a_web_page_in_place_of_weights(site: Site) -> None:
    site.content, site.kind = b"<!DOCTYPE html><title>Virus scan warning</title>", "text/html"
    with pytest.raises(MissingError) as caught:
        load_zoo_model(entry(site.url), reporter=SILENT)
    assert "the server sent a web page in its place" in caught.value.message
    assert "Tiny2020.pt" in caught.value.hint


def test_an_architecture_that_fails(site: Site) -> None:
    def build() -> nn.Module:
        raise RuntimeError("Unknown model")

    with pytest.raises(MissingError, match=r"fails to build cifar10/Linf/Tiny2020: RuntimeError: Unknown"):
        load_zoo_model(entry(site.url, build=build), reporter=SILENT)


def test_weights_of_torchvision_come_by_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # RobustBench's own entry would have torchvision download and read them.
    asked = []

    def fetch(url: str, path: Path, **_: object) -> None:
        asked.append(url)
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": Evil()}, path)

    monkeypatch.setattr(zoo, "fetch", fetch)
    with pytest.raises(WeightsError, match="reading it could run code, and is refused"):
        load_zoo_model(find_entry("imagenet/Linf/Standard_R50"), reporter=SILENT)
    assert asked[0].startswith("https://download.pytorch.org/models/resnet50-")
