"""`carso predict`: decisions, votes, latents by content, reconstructions on disk, refusals."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carso_cli.build import load_defence
from carso_cli.cli.app import run as carso
from carso_cli.data.digits import load_digits_split
from carso_cli.defence.answer import classify, draw_latents
from carso_cli.errors import DataError
from carso_cli.io.json_files import write_json
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools.predict import find_images, predict

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Five digits as PNG files."""
    digits = load_digits_split("test", channels=3, image_size=32)
    paths = []
    for number in range(5):
        path = tmp_path / "in" / f"digit {number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.images[number].permute(1, 2, 0).numpy()).save(path)
        paths.append(path)
    return paths


def ask(run: Path, named: list[Path], **options: Any) -> dict[str, Any]:
    return predict(named, run=run, reporter=SilentReporter(), device="cpu", **options)


def test_the_decision_is_the_defences_own(run: Path, images: list[Path]) -> None:
    defence = load_defence(run, device="cpu")
    pixels = load_digits_split("test", channels=3, image_size=32).pixels(slice(0, 5))
    answer = classify(defence, pixels, seed=7)
    with torch.no_grad():
        logits = defence.second_classifier(answer.reconstructions.flatten(0, 1)).reshape(5, 8, 10)
    sums = logits.double().exp().sum(dim=1)
    assert answer.decision.tolist() == sums.argmax(dim=1).tolist()
    torch.testing.assert_close(answer.probability.double(), sums.softmax(dim=1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(answer.sample_probability, logits.softmax(dim=2))
    with torch.no_grad():
        bare = defence.classifier(pixels).softmax(dim=1)
    torch.testing.assert_close(answer.classifier_probability, bare)


def test_votes_agreement_and_probabilities_add_up(run: Path, images: list[Path]) -> None:
    result = ask(run, images, n_samples=5)
    assert (result["n_samples"], result["aggregation"], result["seed"]) == (5, "doubly-exponential", 0)
    assert [row["path"] for row in result["images"]] == [str(path) for path in images]
    for row in result["images"]:
        classes = [sample["class"] for sample in row["samples"]]
        assert row["votes"] == {name: classes.count(name) for name in dict.fromkeys(row["votes"])}
        assert sum(row["votes"].values()) == len(classes) == 5
        assert row["agreement"] == classes.count(row["class"]) / 5
        assert row["class"] == str(row["label"])
        assert 0.0 <= row["mean_probability"] <= 1.0


def test_majority_vote_decides_by_votes(run: Path, images: list[Path]) -> None:
    for row in ask(run, images, aggregation="majority-vote", n_samples=7)["images"]:
        assert row["votes"][row["class"]] == max(row["votes"].values())
        assert row["probability"] == pytest.approx(row["agreement"])


def test_an_image_gets_the_same_answer_alone_or_among_others(run: Path, images: list[Path]) -> None:
    together = ask(run, images)["images"]
    (alone,) = ask(run, [images[3]])["images"]
    assert alone["votes"] == together[3]["votes"]
    assert alone["mean_probability"] == pytest.approx(together[3]["mean_probability"], abs=1e-5)


def test_latents_are_decided_by_seed_and_pixels_alone(run: Path) -> None:
    defence = load_defence(run, device="cpu")
    one, other = load_digits_split("test", channels=3, image_size=32).pixels(slice(0, 2))
    latents = draw_latents(defence, one, 3)
    assert latents.shape == (1, 8, 32)
    torch.testing.assert_close(draw_latents(defence, one, 3), latents, rtol=0.0, atol=0.0)
    for changed in (draw_latents(defence, one, 4), draw_latents(defence, other, 3)):
        assert float((changed - latents).abs().mean()) > 0.5
    alone, together = classify(defence, one[None], 3), classify(defence, torch.stack([other, one]), 3)
    torch.testing.assert_close(alone.reconstructions[0], together.reconstructions[1], rtol=1e-4, atol=1e-5)


def test_reconstructions_are_written_under_harmless_names(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    result = ask(run, images[:2], n_samples=2, save=tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        *(f"0001-digit_0-{part}.png" for part in ("mean", "sample-1", "sample-2")),
        *(f"0002-digit_1-{part}.png" for part in ("mean", "sample-1", "sample-2")),
        *("grid.pdf", "grid.png", "grid.svg"),
    ]
    assert result["grid"] == str(tmp_path / "out" / "grid.png")
    saved = [path for row in result["images"] for path in row["saved"]]
    assert sorted(saved) == [str(tmp_path / "out" / name) for name in names[:-3]]
    first, second, mean = (
        torch.tensor(list(Image.open(tmp_path / "out" / f"0001-digit_0-{part}.png").tobytes())).float()
        for part in ("sample-1", "sample-2", "mean")
    )
    assert first.numel() == 3 * 32 * 32
    assert float(((first + second) / 2 - mean).abs().max()) <= 1.0


def test_folders_are_searched_and_hidden_files_passed_over(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/notes.txt", ".hidden.png", ".git/x.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    named = tmp_path / "a" / "notes.txt"
    assert find_images([named, tmp_path]) == [named, tmp_path / "a" / "z.JPG", tmp_path / "b.png"]
    Image.new("L", (32, 32)).save(tmp_path / "a" / "y", "PNG")
    told: list[str] = []
    reporter = SilentReporter()
    reporter.warning = told.append  # type: ignore[method-assign, assignment]
    assert find_images([tmp_path / "a"], reporter) == [tmp_path / "a" / "y", tmp_path / "a" / "z.JPG"]
    assert told == [f"{tmp_path / 'a'}: 1 of 3 files are left out: they are no images that can be read"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image file"):
        find_images([tmp_path / "empty"])


def test_classes_have_the_runs_names_where_it_stores_them(tmp_path: Path) -> None:
    recipe, folder = load_recipe("digits"), RunFolder(tmp_path)
    numbers = tuple("0123456789")
    assert class_names(folder, recipe) == numbers
    write_json(folder.environment, {"classes": ["too", "few"]})
    assert class_names(folder, recipe) == numbers
    write_json(folder.environment, {"classes": list("abcdefghij")})
    assert class_names(folder, recipe) == tuple("abcdefghij")


def test_another_size_is_refused_or_fitted(
    run: Path, images: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    odd = tmp_path / "odd.png"
    Image.open(images[0]).convert("L").resize((50, 40)).save(odd)
    assert carso(["predict", str(odd), "--run", str(run)]) == 3
    assert f"{odd} is 50x40; 32x32 is needed" in capsys.readouterr().err
    assert carso(["predict", str(odd), "--run", str(run), "--resize", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 1


def test_paths_on_stdin(
    run: Path, images: list[Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def feed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    feed(b"\n".join([os.fsencode(images[1]), b"", os.fsencode(images[0])]))
    assert carso(["predict", "-", str(images[2]), "--run", str(run), "--json"]) == 0
    shown = [row["path"] for row in json.loads(capsys.readouterr().out)["images"]]
    assert shown == [str(images[1]), str(images[0]), str(images[2])]
    feed(b"\n \n")
    assert carso(["predict", "-", "--run", str(run)]) == 2
    assert "no path came on stdin" in capsys.readouterr().err


def test_what_is_shown(
    run: Path, images: list[Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(images[0].parent)
    assert carso(["predict", "digit 0.png", "--run", str(run), "--n-samples", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "digits: doubly-exponential, N = 3, seed 0"
    assert any(line.startswith("digit 0.png") for line in lines)


def test_a_run_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    assert carso(["predict", "x.png", "--run", str(tmp_path / "none")]) == 5
    assert "holds no trained purifier" in capsys.readouterr().err
    assert carso(["predict", "x.png", "--aggregation", "mean"]) == 2
    assert "'--aggregation': 'mean' is not allowed; use doubly-exponential" in capsys.readouterr().err
