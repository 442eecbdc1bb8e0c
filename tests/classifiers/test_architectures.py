"""Architectures of torchvision and timm: built, loaded and refused. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, hub, nn

from carso_cli.classifiers.architectures import Blueprint, Standardised
from carso_cli.classifiers.load import check_classifier, load_classifier
from carso_cli.defence.conditioning import RepresentationEncoder, as_map, map_shape
from carso_cli.defence.representation import extract_representation, module_shapes
from carso_cli.errors import RecipeError, UsageError, WeightsError
from carso_cli.io.paths import weights_home
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.load import dump_recipe, load_recipe, load_recipe_text
from carso_cli.runtime.third_party import prepare, quiet

prepare()
with quiet():
    import timm
    from torchvision import models

MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.2, 0.4)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("weights were to be downloaded")

    monkeypatch.setattr(hub, "load_state_dict_from_url", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def blueprint(
    family: str, architecture: str, classes: int = 7, channels: int = 3, size: int = 40
) -> Blueprint:
    mean, std = MEAN[:channels], STD[:channels]
    return Blueprint(family, architecture, 28, 10, "silu", classes, channels, size, mean=mean, std=std)


def load(form: Blueprint, file: str) -> nn.Module:
    return load_classifier(
        form, source="file", name=None, file=file, dataset="image-folder", recipe="mine", kind="at"
    )


def standardise(images: Tensor) -> Tensor:
    channels = images.shape[1]
    mean, std = (torch.tensor(values[:channels]).view(1, -1, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def perturbed(network: nn.Module) -> nn.Module:
    """Return a network whose statistics are not the initial ones, which any network would have."""
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return network.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_torchvisions_from_a_file(tmp_path: Path, suffix: str) -> None:
    network = perturbed(models.resnet18(weights=None, num_classes=7))
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    loaded = load(blueprint("torchvision", "resnet18"), str(path))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(loaded(images), network(standardise(images)))


@pytest.mark.parametrize("channels", [1, 3])
def test_timms_from_a_file(tmp_path: Path, channels: int) -> None:
    network = perturbed(timm.create_model("resnet10t", num_classes=7, in_chans=channels))
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    loaded = load(blueprint("timm", "resnet10t", channels=channels), str(tmp_path / "mine.safetensors"))
    images = torch.rand(2, channels, 40, 40)
    torch.testing.assert_close(loaded(images), network(standardise(images)))


def test_torchvisions_own_cache_is_looked_in(tmp_path: Path) -> None:
    network = perturbed(models.squeezenet1_1(weights=None))
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(parents=True)
    torch.save(network.state_dict(), cached)
    form = blueprint("torchvision", "squeezenet1_1", classes=1000)
    images = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(load(form, cached.name)(images), network(standardise(images)))
    with pytest.raises(
        WeightsError, match=r"looked for other\.pth and .* and .*/checkpoints/other\.pth"
    ) as caught:
        load(form, "other.pth")
    # Nothing of carso's trains it.
    assert caught.value.hint == f"put the file into {weights_home()}, or name its path in classifier.at.file"


@pytest.mark.parametrize(
    ("family", "name", "message", "hint"),
    [
        ("torchvision", "resnet19", "torchvision has no 'resnet19'", "'resnet18'"),
        ("timm", "resnet10", "timm has no 'resnet10'", "'resnet101'"),
        # A name with a prefix of this kind would be looked up in the network.
        ("timm", "hf-hub:someone/something", "timm has no 'hf-hub:someone/something'", ""),
        ("torchvision", "fcn_resnet50", "torchvision has no 'fcn_resnet50'", "'resnet50'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(family: str, name: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"classifier.architecture: {message}") as caught:
        blueprint(family, name).build()
    assert hint in caught.value.hint


def test_another_number_of_classes_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(models.squeezenet1_1(weights=None, num_classes=5).state_dict(), path)
    with pytest.raises(WeightsError, match=r"classifier\.1\.weight is \(5, 512, 1, 1\), not \(7") as caught:
        load(blueprint("torchvision", "squeezenet1_1"), str(path))
    assert caught.value.hint.startswith("check classifier.architecture, data.classes")


def test_images_that_an_architecture_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(models.squeezenet1_1(weights=None, num_classes=7).state_dict(), path)
    with pytest.raises(RecipeError, match="squeezenet1_1 does not take 3x8x8 images: "):
        load(blueprint("torchvision", "squeezenet1_1", size=8), str(path))
    with pytest.raises(RecipeError, match="takes 3 channels; the recipe says 1") as caught:
        blueprint("torchvision", "resnet18", channels=1).build()
    assert "classifier.family=timm" in caught.value.hint


def test_recorded_outputs_are_not_written_over() -> None:
    # As torchvision builds it, this one's ReLUs write over what the convolutions gave.
    built = blueprint("torchvision", "squeezenet1_1").build().eval()
    images = torch.rand(2, 3, 40, 40)
    layers = ["network.features.0", "network.features.12.expand3x3"]
    recorded = extract_representation(built, images, layers)
    convolution = built.get_submodule(layers[0])
    torch.testing.assert_close(recorded[layers[0]], convolution(standardise(images)))
    assert recorded[layers[0]].min() < 0


def test_standardised_weights_are_those_of_the_network() -> None:
    wrapped = Standardised(nn.Linear(2, 1), [0.5], [0.5])
    assert list(wrapped.state_dict()) == ["network.weight", "network.bias"]


class Returning(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((torch.zeros(1, 2),), "returns a tuple, not a tensor of logits"),
        (torch.zeros(2), r"returns \(2,\) for one image; the recipe's 2 classes need \(1, 2\)"),
        (torch.tensor([[0.0, torch.nan]]), "NaN or infinite for a grey image"),
    ],
)
def test_what_is_no_classifier(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_classifier(Returning(value), classes=2, channels=1, image_size=4)


def test_a_vit_of_small_patches_loads_and_its_tokens_are_maps(tmp_path: Path) -> None:
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    network = perturbed(timm.create_model("vit_tiny_patch16_224", num_classes=7, **options)).eval()
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    form = replace(blueprint("timm", "vit_tiny_patch16_224", size=32), options=options)
    classifier, images = load(form, str(tmp_path / "vit.safetensors")), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(images), network(standardise(images)))
    tokens = extract_representation(classifier, images, ["network.blocks.0"])["network.blocks.0"]
    assert tokens.shape == (2, 65, 24)
    encoder = RepresentationEncoder({"network.blocks.0": (65, 24)}, 5, 3).eval()
    mapped = RepresentationEncoder({"network.blocks.0": (24, 8, 8)}, 5, 3).eval()
    mapped.load_state_dict(encoder.state_dict())
    # Token 1 + 8 r + c is that of row r and column c; token 0 is the class token.
    maps = torch.stack(
        [torch.stack([tokens[:, 1 + 8 * row + column] for column in range(8)], 2) for row in range(8)], 2
    )
    torch.testing.assert_close(encoder({"network.blocks.0": tokens}), mapped({"network.blocks.0": maps}))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((49, 6), (6, 7, 7)),
        ((50, 6), (6, 7, 7)),
        ((201, 6), (6, 14, 14)),
        ((5, 5, 9), (9, 5, 5)),
        ((9, 5, 5), (9, 5, 5)),
        ((60, 6), None),
        ((1, 6), None),
        ((6,), None),
        ((3, 4, 5), None),
    ],
)
def test_which_outputs_are_maps(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    assert map_shape(shape) == expected
    if expected:
        assert as_map(torch.rand(2, *shape)).shape == (2, *expected)


@pytest.mark.parametrize(("family", "name"), [("torchvision", "resnet18"), ("timm", "resnet18")])
def test_a_cifar_stem_keeps_the_size_of_small_images(family: str, name: str) -> None:
    form = replace(blueprint(family, name, size=32), options={"cifar_stem": True})
    classifier = form.build().eval()
    shapes = module_shapes(classifier, torch.rand(1, 3, 32, 32))
    assert shapes["network.conv1"][1] == (64, 32, 32)
    assert shapes["network.layer1"][1] == (64, 32, 32)
    assert shapes["network.layer4"][1] == (512, 4, 4)
    assert classifier.state_dict()["network.conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize(
    ("family", "name", "options", "message"),
    [
        ("timm", "resnet18", {"img_sizes": 32}, "resnet18 cannot be built with"),
        ("torchvision", "resnet18", {"img_size": 32}, "resnet18 cannot be built with"),
        ("torchvision", "vit_b_16", {"image_size": 33}, "vit_b_16 cannot be built with"),
        ("timm", "resnet18", {"checkpoint_path": "x.pth"}, "'checkpoint_path' is not allowed"),
        ("timm", "resnet18", {"pretrained": True}, "'pretrained' is not allowed"),
        ("torchvision", "resnet18", {"weights": "DEFAULT"}, "'weights' is not allowed"),
        ("torchvision", "vgg11", {"cifar_stem": True}, "cifar_stem is for ResNets"),
    ],
)
def test_options_that_do_not_fit_are_told(
    family: str, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(blueprint(family, name, size=32), options=options).build()


def test_options_are_keys_of_a_recipe_and_count_in_its_hash() -> None:
    change = "classifier={family: timm, architecture: vit_tiny_patch16_224, clean: null, "
    weights = "at: {source: file, file: vit.pt}"
    plain = load_recipe("cifar10", [f"{change}{weights}}}"])
    chosen = load_recipe(
        "cifar10", [f"{change}{weights}, architecture_options: {{img_size: 32, patch_size: 4}}}}"]
    )
    assert chosen.classifier.architecture_options == {"img_size": 32, "patch_size": 4}
    assert load_recipe_text(dump_recipe(chosen)) == chosen
    assert recipe_hash(chosen) != recipe_hash(plain)
    assert len({chosen, plain}) == 2
    with pytest.raises(RecipeError, match="takes no 'architecture_options'"):
        load_recipe("cifar10", ["classifier.architecture_options={a: 1}"])


def test_too_many_features_are_refused_with_the_reason() -> None:
    # 32 channels of 98 x 98 are left by one convolution.
    with pytest.raises(UsageError, match=r"the layers give 307,328 features.* need 30,732,800,000 weights"):
        RepresentationEncoder({"a": (64, 100, 100)}, 100_000, 1)
