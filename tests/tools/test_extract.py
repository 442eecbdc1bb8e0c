from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from carso_cli.build import build_classifier, load_images
from carso_cli.cli.app import run
from carso_cli.defence.representation import extract_representation
from carso_cli.errors import UsageError
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools.extract import extract, list_layers

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
            "'--split': 'val' is not allowed; use train or test",
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


def test_the_list_proposes_layers_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["extract", "digits", "--list"]) == 0
    assert "the recipe names every layer that the rule proposes" in capsys.readouterr().out
    # Whatever the recipe names, of which nothing need exist; weights need not either.
    other = ["--set=representation.layers=[to choose]", "--set=classifier.at={source: file, file: no}"]
    assert run(["extract", "digits", "--list", *other]) == 0
    table, _, block = capsys.readouterr().out.partition("put into the recipe:\n")
    pasted = yaml.safe_load(block)
    assert pasted == {"representation": {"kind": "at", "layers": list(RECIPE.representation.layers)}}
    marked = [line.split()[0] for line in table.splitlines() if line.rstrip().endswith(" yes")]
    assert marked == list(RECIPE.representation.layers)


def test_an_architecture_that_does_not_take_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    values = [
        "classifier.family=torchvision",
        "classifier.architecture=vit_b_16",
        "classifier.at={source: file, file: no}",
        "classifier.clean=null",
    ]
    options = [text for value in values for text in ("--set", value)]
    assert run(["extract", "digits", "--list", *options]) == 2
    assert "does not take 3x32x32 images: Wrong image height" in capsys.readouterr().err


def test_a_run_stands_for_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    layer = "layer.2.block.0.conv_1"
    mine = load_recipe("digits", [f"representation.layers=[{layer}]"])
    (folder / "recipe.yaml").write_text(dump_recipe(mine))
    assert run(["extract", "--run", str(folder), "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed if one["in_recipe"]] == [layer]
    assert run(["extract", "--run", str(tmp_path / "none"), "--list"]) == 5
    assert "holds no run" in capsys.readouterr().err
