"""Published purifiers: the golden files give the golden outputs; a run is exported and imported again."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from carso_cli import load_defence
from carso_cli.build import build_classifier, load_images
from carso_cli.classifiers.registry import SHIPPED_FOLDER
from carso_cli.cli.app import run as carso
from carso_cli.defence.release_format import PUBLISHED_PARTS
from carso_cli.errors import StateError, UsageError, WeightsError
from carso_cli.evaluation.run import evaluate
from carso_cli.io.checksum import file_digest
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools.import_release import export_release, import_release
from carso_cli.training.purifier import train_purifier
from tests.toys import TINY, DigitsRun

pytestmark = pytest.mark.slow  # a purifier is trained for all but the authors' own files
QUIET = SilentReporter()


@pytest.fixture(scope="module")
def trained(digits_run: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(digits_run.folder, tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture
def released(trained: Path, tmp_path: Path) -> Path:
    export_release(trained, tmp_path / "release", name="wrn_10_1_digits_carso")
    return tmp_path / "release"


@pytest.fixture
def imported(trained: Path, released: Path, tmp_path: Path) -> Path:
    import_release(released, recipe_of(trained), run=tmp_path / "back", reporter=QUIET)
    return tmp_path / "back"


def recipe_of(run: Path, *overrides: str) -> Recipe:
    return load_recipe(str(run / "recipe.yaml"), overrides)


# --- the authors' own files ---


@pytest.fixture(scope="module")
def golden(golden_folder: Path) -> dict[str, Tensor]:
    return load_file(golden_folder / "tensors.safetensors")


@pytest.fixture
def golden_recipe(golden_folder: Path, tmp_path: Path) -> Path:
    """The recipe of the tiny model, as a user would write it: cifar10's, with other sizes."""
    with safe_open(golden_folder / "tensors.safetensors", framework="pt") as stream:
        layers = json.loads(stream.metadata()["layers"])
    text = (Path(__file__).parents[2] / "recipes" / "cifar10-small.yaml").read_text()
    head, _, rest = text.partition("  layers:\n")
    tail = rest[rest.index("\npurifier:") :]
    path = tmp_path / "golden.yaml"
    content = head + "  layers: [" + ", ".join(layers) + "]\n" + tail
    for old, new in (
        ("width: 2", "width: 1"),
        ("activation: relu", "activation: silu"),
        ("runs/cifar10-small-classifier-at/classifier.safetensors", golden_folder / "classifier.safetensors"),
        ("condition_features: 128", "condition_features: 48"),
        ("latent_features: 32", "latent_features: 16"),
    ):
        assert content.count(old) == 1
        content = content.replace(old, str(new))
    path.write_text(content)
    return path


def test_the_authors_files_give_their_outputs(
    golden_folder: Path,
    golden: dict[str, Tensor],
    golden_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "golden"
    # The folder also holds the encoder's files, which must not be taken for published ones.
    code = carso(
        ["import-release", str(golden_folder), "--recipe", str(golden_recipe), "--run", str(run), "--json"]
    )
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["sha256"]) == list(PUBLISHED_PARTS)
    defence = load_defence(run, device="cpu")
    latents = golden["z"].transpose(1, 2)
    reconstructions = defence.purify(golden["x"], latents=latents)
    torch.testing.assert_close(reconstructions, golden["reconstructions"], rtol=1e-4, atol=1e-5)
    for rule, key in (
        ("doubly-exponential", "peel"),
        ("logit-mean", "logit"),
        ("probability-mean", "prob"),
        ("majority-vote", "count"),
    ):
        defence.aggregation = rule
        output = defence(golden["x"], latents=latents, view="released")
        torch.testing.assert_close(output, golden[f"released_output.{key}"], rtol=1e-4, atol=1e-5)


# --- there and back ---


def test_a_trained_run_comes_back_to_identical_predictions(
    trained: Path, released: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(trained)
    result = import_release(released, recipe, run=tmp_path / "back", reporter=QUIET)
    before, after = load_defence(trained, device="cpu"), load_defence(tmp_path / "back", device="cpu")
    images = load_images(recipe, "test", limit=20).pixels(slice(None))
    latents = before.draw_latents(len(images), generator=torch.Generator().manual_seed(1))
    assert torch.equal(before(images, latents=latents), after(images, latents=latents))
    names = {name for name, _ in after.purifier.named_parameters()}
    assert {name.partition(".")[0] for name in names} == {"representation_encoder", "decoder"}
    assert result["parameters"] == sum(p.numel() for p in after.purifier.parameters())


@pytest.mark.shared
def test_so_it_does_on_real_images(shared_folder: Path, tmp_path: Path) -> None:
    # CIFAR-10's test images, and a WideResNet of ours for images of that form.
    kept: dict[str, int] = {}
    with (
        zipfile.ZipFile(shared_folder / "data" / "cifar10-test.zip") as every,
        zipfile.ZipFile(tmp_path / "test.zip", "w") as test,
        zipfile.ZipFile(tmp_path / "train.zip", "w") as train,
    ):
        for name in (member for member in every.namelist() if not member.endswith("/")):
            folder = name.rpartition("/")[0]
            kept[folder] = kept.get(folder, 0) + 1
            if kept[folder] <= 6:
                test.writestr(name, every.read(name))
                train.writestr(name.replace("/test/", "/train/"), every.read(name))
    recipe = load_recipe(
        "cifar10-small",
        (
            *TINY,
            "data.name=image-folder",
            f"data.root={tmp_path}",
            "data.train=train.zip",
            "data.test=test.zip",
            "data.mean=[0.3051, 0.3051, 0.3051]",
            "data.std=[0.3238, 0.3238, 0.3238]",
            "classifier.width=1",
            f"classifier.at.file={SHIPPED_FOLDER / 'digits-at.safetensors'}",
            "representation.layers=[layer.0.block.0.conv_0, layer.2.block.0.conv_1]",
        ),
    )
    train_purifier(recipe, run=tmp_path / "run", reporter=QUIET, device="cpu")
    export_release(tmp_path / "run", tmp_path / "release", name="wrn_10_1_cifar10_carso")
    import_release(tmp_path / "release", recipe, run=tmp_path / "back", reporter=QUIET)
    images = load_images(recipe, "test", limit=30).pixels(slice(None))
    before, after = (load_defence(tmp_path / run, device="cpu") for run in ("run", "back"))
    latents = before.draw_latents(len(images))
    assert torch.equal(before(images, latents=latents), after(images, latents=latents))


def test_the_run_says_what_it_is(trained: Path, released: Path, imported: Path) -> None:
    names = sorted(path.name for path in imported.iterdir())
    assert names == ["environment.json", "purifier.safetensors", "recipe.yaml"]
    assert recipe_of(imported) == recipe_of(trained)
    _, metadata = load_tensors(imported / "purifier.safetensors")
    assert metadata["inference_only"] is True
    assert metadata["imported_from"] == {path.name: file_digest(path) for path in sorted(released.iterdir())}


def test_a_share_of_the_input_has_no_place_in_the_published_form(tmp_path: Path) -> None:
    recipe = load_recipe("digits", (*TINY, "purifier.input_share=0.5"))
    train_purifier(recipe, run=tmp_path / "run", reporter=QUIET, device="cpu", limit=24)
    with pytest.raises(UsageError, match=r"mixes 0\.5 of the input into what it classifies"):
        export_release(tmp_path / "run", tmp_path / "release", name="any")
    assert not (tmp_path / "release").exists()


def test_evaluate_takes_it_like_any_other(trained: Path, imported: Path) -> None:
    options: dict[str, Any] = {"attack": "none", "limit": 10, "device": "cpu", "reporter": QUIET}
    small = ("evaluation.scoring_draws=2", "evaluation.n_samples=2")
    before, after = (
        {
            row["target"]: row["accuracy"]
            for row in evaluate(recipe_of(run, *small), run=run, **options)["results"]
        }
        for run in (trained, imported)
    )
    assert before == after
    assert "defence" in before


def test_so_do_attack_predict_and_report(imported: Path, tmp_path: Path) -> None:
    budget = ["--n-samples", "2", "--device", "cpu"]
    measured = ["--run", str(imported), "--attack", "fgsm", "--limit", "10"]
    assert carso(["attack", *measured, "--out", str(tmp_path / "adversarial.npz"), *budget]) == 0
    Image.new("L", (32, 32), 90).save(tmp_path / "grey.png")
    assert carso(["predict", str(tmp_path / "grey.png"), "--run", str(imported), *budget]) == 0
    assert carso(["evaluate", *measured, "--set", "evaluation.scoring_draws=2", *budget]) == 0
    assert carso(["report", str(imported), "--html", str(tmp_path / "page.html"), "--device", "cpu"]) == 0
    assert "fgsm" in (tmp_path / "page.html").read_text()


def test_it_cannot_be_trained_on(imported: Path) -> None:
    with pytest.raises(StateError, match=r"state\.safetensors is missing.*no encoder.*cannot be trained on"):
        train_purifier(recipe_of(imported), run=imported, reporter=QUIET, resume=True, device="cpu", limit=48)
    purifier = load_defence(imported, device="cpu").purifier
    with pytest.raises(UsageError, match="this purifier has no encoder"):
        purifier.encode(torch.rand(1, 3, 32, 32), torch.rand(1, 16))


def test_another_classifier_is_refused(imported: Path) -> None:
    other = build_classifier(recipe_of(imported), "clean")
    with pytest.raises(WeightsError, match="trained for a classifier with checksum"):
        load_defence(imported, device="cpu", classifier=other)


def test_a_run_is_never_overwritten(trained: Path, released: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        import_release(released, recipe_of(trained), run=trained, reporter=QUIET)


# --- what does not fit ---


def test_files_of_ours_say_which_classifier_they_are_for(
    trained: Path, released: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(trained, "representation.kind=clean")
    with pytest.raises(
        WeightsError, match=r"_repr_compressors\.safetensors is for a classifier with checksum"
    ):
        import_release(released, recipe, run=tmp_path / "back", reporter=QUIET)


def part_of(folder: Path, part: str) -> Path:
    return next(folder.glob(f"*_{part}.safetensors"))


def drop(folder: Path) -> None:
    part_of(folder, "decoder").unlink()


def double(folder: Path) -> None:
    path = part_of(folder, "repr_compressors")
    shutil.copy(path, path.with_name(f"other_{path.name}"))


def mix(folder: Path) -> None:
    part_of(folder, "decoder").rename(folder / "wrn_10_1_digits_other_decoder.safetensors")


def truncate(folder: Path) -> None:
    path = part_of(folder, "decoder")
    path.write_bytes(path.read_bytes()[:-9])


def poison(folder: Path) -> None:
    tensors = load_file(part_of(folder, "decoder"))
    tensors["5.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, part_of(folder, "decoder"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"exactly one file for each ending; it does not for\n_decoder\.safetensors: none"),
        (double, r"_repr_compressors\.safetensors: 2 files, other_wrn_10_1_digits_carso_repr_compressors"),
        (mix, r"different purifiers: wrn_10_1_digits_carso, wrn_10_1_digits_other"),
        (truncate, r"_decoder\.safetensors is not a readable safetensors file"),
        (poison, r"tensor '5\.weight' holds values that are NaN"),
    ],
)
def test_unusable_folders(
    trained: Path, released: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(released)
    with pytest.raises(WeightsError, match=message):
        import_release(released, recipe_of(trained), run=tmp_path / "back", reporter=QUIET)
    assert not (tmp_path / "back").exists()


def test_no_folder(trained: Path, released: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"relaese is no folder") as caught:
        import_release(tmp_path / "relaese", recipe_of(trained), run=tmp_path / "back", reporter=QUIET)
    assert caught.value.hint == "did you mean 'release'?"


def test_every_mismatch_is_listed(trained: Path, released: Path, tmp_path: Path) -> None:
    path = part_of(released, "repr_fcn_compressor")
    tensors = load_file(path)
    tensors["1.9.weight"] = tensors.pop("1.1.weight")
    save_file(tensors, path)
    recipe = recipe_of(trained, "purifier.latent_features=6")
    with pytest.raises(WeightsError) as caught:
        import_release(released, recipe, run=tmp_path / "back", reporter=QUIET)
    assert caught.value.message.splitlines()[1:] == [
        "repr_fcn_compressor: 1 missing: 1.1.weight",
        "repr_fcn_compressor: 1 unexpected: 1.9.weight",
        "decoder: 1 of another shape: 0.1.weight is (2304, 20), not (2304, 22)",
    ]
    assert caught.value.hint == "purifier.latent_features: 4 in the files, 6 in the recipe"


def test_tensors_without_axes_are_a_mismatch_too(trained: Path, released: Path, tmp_path: Path) -> None:
    for part, key in (
        ("decoder", "0.1.weight"),
        ("decoder", "5.weight"),
        ("repr_fcn_compressor", "1.0.weight"),
    ):
        path = part_of(released, part)
        tensors = load_file(path)
        tensors[key] = torch.tensor(1.0) if part == "repr_fcn_compressor" else torch.ones(3)
        save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"0\.1\.weight is \(3,\), not") as caught:
        import_release(released, recipe_of(trained), run=tmp_path / "back", reporter=QUIET)
    assert caught.value.hint.startswith("use the recipe of the classifier")


def test_too_few_layers_are_named(trained: Path, released: Path, tmp_path: Path) -> None:
    path = part_of(released, "repr_compressors")
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("1.")}
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"repr_compressors: 6 missing: 1\.0\.0\.weight, ") as caught:
        import_release(released, recipe_of(trained), run=tmp_path / "back", reporter=QUIET)
    assert caught.value.hint == "representation.layers: 1 in the files, 2 in the recipe"
