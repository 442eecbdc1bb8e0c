from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from carso_cli.build import build_classifier, load_images
from carso_cli.cli.app import run
from carso_cli.errors import UsageError
from carso_cli.recipe.load import load_recipe
from carso_cli.reporter import SilentReporter
from carso_cli.representation import extract_representation
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.workflows.extract import extract, list_layers

RECIPE = load_recipe("digits")


def test_lists_what_a_recipe_may_name() -> None:
    layers = {layer.name: layer for layer in list_layers(RECIPE)}
    assert {name for name, layer in layers.items() if layer.in_recipe} == set(RECIPE.representation.layers)
    assert layers["layer.1.block.0.shortcut"].shape == (32, 16, 16)
    assert layers["layer.1.block.0.shortcut"].kind == "Conv2d"
    assert layers["logits"].shape == (10,)
    assert [layer.name for layer in list_layers(RECIPE, pattern="layer.2*conv_?")] == [
        "layer.2.block.0.conv_0",
        "layer.2.block.0.conv_1",
    ]


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no layer matches 'layer\.9\*'"):
        list_layers(RECIPE, pattern="layer.9*")


def test_a_split_is_written_batch_by_batch_as_in_one_pass(tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["evaluation.batch_size=7"])
    out = tmp_path / "reps.safetensors"
    result = extract(recipe, out=out, reporter=SilentReporter(), limit=20, device="cpu")
    tensors, metadata = load_tensors(out)
    images = load_images(recipe, "test", limit=20)
    expected = extract_representation(
        build_classifier(recipe, "at"), images.pixels(slice(0, 20)), recipe.representation.layers
    )
    assert metadata["layers"] == list(expected)
    assert torch.equal(tensors["labels"], images.labels)
    assert torch.equal(tensors["indices"], images.indices)
    for row, (layer, output) in zip(result["layers"], expected.items(), strict=True):
        torch.testing.assert_close(tensors[layer], output, rtol=1e-4, atol=1e-5)
        assert row["layer"] == layer
        assert row["shape"] == tuple(output.shape[1:])
        assert row["mean"] == pytest.approx(output.mean().item(), abs=1e-4)
        assert row["std"] == pytest.approx(output.std().item(), rel=1e-3)


def test_image_files_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for shade in (40, 200):
        files.append(tmp_path / f"{shade}.png")
        Image.new("L", (32, 32), shade).save(files[-1])
    out = tmp_path / "reps.safetensors"
    arguments = [
        "extract",
        "digits",
        *map(str, files),
        "--layers",
        "layer.0*conv_0",
        "--out",
        str(out),
        "--json",
    ]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    tensors, metadata = load_tensors(out)
    assert list(tensors) == ["layer.0.block.0.conv_0"]
    assert tensors["layer.0.block.0.conv_0"].shape == (2, 16, 32, 32)
    assert metadata["source"] == [str(file) for file in files]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("extract", "digits"), "--out FILE is needed", 2),
        (
            ("extract", "digits", "--split", "val", "--list"),
            "--split val is not allowed; use train or test",
            2,
        ),
        (("extract", "digits", "absent.png", "--out", "x.safetensors"), "absent.png", 3),
    ],
)
def test_wrong_use(
    arguments: tuple[str, ...], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    assert message in capsys.readouterr().err
