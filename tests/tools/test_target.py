"""Targets by name: runs, recipes, code, RobustBench; and images with the channels that a target takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.build import load_defence
from carso_cli.data.labelled_images import LabelledImages
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import DataError, StateError, UsageError
from carso_cli.evaluation.audit_setup import prepare_audit
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.tools.target import (
    Target,
    fit_channels,
    load_target,
    load_target_examples,
    load_target_images,
    weights_checksum,
)


def images_of(images: Tensor) -> LabelledImages:
    count = len(images)
    return LabelledImages(
        images, torch.arange(count), torch.arange(count), tuple(map(str, range(count))), "x"
    )


def test_a_run_is_its_defence_in_the_exact_view(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    target = load_target(str(run), reporter=SILENT)
    images = load_target_images(None, target, reporter=SILENT, limit=4)
    assert images.images.shape == (4, 3, 32, 32)
    defence = load_defence(run)
    torch.manual_seed(0)
    expected = defence(images.pixels, view="exact")
    torch.manual_seed(0)
    assert torch.equal(target.model(images.pixels), expected)
    assert target.identity["kind"] == "defence"
    # An audit takes the defence, which says of itself what is random.
    assert isinstance(target.audited, Defence)
    assert target.dataset == "digits"


def test_a_recipe_without_a_run_is_its_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(dump_recipe(load_recipe("digits")))
    for text in ("digits", "mine.yaml"):
        target = load_target(text, reporter=recorder)
        assert target.identity["kind"] == "classifier"
        assert "holds no trained purifier; its classifier is audited" in recorder.said[-1]
        found = load_target_images("digits", target, reporter=recorder, limit=10)
        right = target.model(found.pixels).argmax(dim=1) == found.labels
        assert int(right.sum()) >= 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("digit", ["no file, no run and no recipe", "did you mean 'digits'"]),
        ("model.py", ["names a file and nothing in it", "model.py:NAME"]),
        ("empty", ["is a folder, and no run of carso"]),
        ("robustbench:Wong2020Fas", ["no model 'Wong2020Fas'", "did you mean 'Wong2020Fast'"]),
    ],
)
def test_what_names_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.py").write_text("")
    with pytest.raises(UsageError) as caught:
        load_target(text, reporter=SILENT)
    told = f"{caught.value.message}\n{caught.value.hint}"
    assert all(part in told for part in said), told


def test_an_unfinished_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("digits")))
    with pytest.raises(StateError, match="holds no trained purifier"):
        load_target(str(tmp_path), reporter=SILENT)


def _takes(channels: int) -> Target:
    def model(images: Tensor) -> Tensor:
        assert images.shape[1] == channels, f"{channels} channels are needed"
        return images.flatten(1)[:, :3]

    return Target("t", model, {})


def test_grey_images_get_the_channels_that_the_model_takes() -> None:
    grey = images_of(torch.rand(4, 1, 5, 5))
    assert fit_channels(grey, _takes(1)) is grey
    tripled = fit_channels(grey, _takes(3))
    assert tripled.images.shape == (4, 3, 5, 5)
    assert fit_channels(tripled, _takes(1)).images.shape == (4, 1, 5, 5)
    with pytest.raises(UsageError) as caught:
        fit_channels(images_of(torch.rand(4, 3, 5, 5)), _takes(1))
    assert "3 x 5 x 5" in caught.value.message
    assert "1 channels are needed" in caught.value.message


def test_images_must_be_named_for_code() -> None:
    with pytest.raises(UsageError, match="says nothing about its images"):
        load_target_images(None, _takes(3), reporter=SILENT)


def test_weights_of_a_function_are_those_it_uses() -> None:
    module = torch.nn.Linear(2, 2)

    def scores(images: Tensor) -> Tensor:
        answer: Tensor = module(images)
        return answer

    before = weights_checksum(scores)
    assert before is not None
    module.weight.data += 1
    assert weights_checksum(scores) != before
    assert weights_checksum(lambda images: images) is None


def test_examples_for_all_images_or_for_the_choice(tmp_path: Path) -> None:
    path = tmp_path / "adv.pt"
    whole = torch.rand(6, 3, 4, 4)
    found = images_of(whole)
    choice = LabelledImages(whole[[4, 1]], torch.tensor([0, 1]), torch.tensor([4, 1]), ("0", "1"), "x")
    torch.save({"adversarial": whole}, path)
    assert torch.equal(load_target_examples(path, found, reporter=SILENT), whole)
    assert torch.equal(load_target_examples(path, choice, reporter=SILENT), whole[[4, 1]])
    torch.save(whole[:2], path)
    assert torch.equal(load_target_examples(path, choice, reporter=SILENT), whole[:2])
    with pytest.raises(DataError, match=r"\(2, 3, 4, 4\); the images are \(6, 3, 4, 4\)"):
        load_target_examples(path, found, reporter=SILENT)


def test_a_defence_that_draws_nothing_meets_the_attacks_on_deterministic_models(toys: Any) -> None:
    found = toys.images_with_margins(toys.LinearDefence(), [0.3, 0.6, 0.9, 1.3])
    prepared = prepare_audit(toys.LinearDefence(noise=0.0), found, None, eps=0.1, budget="quick")
    job = prepared.plan.strongest
    assert job is not None
    assert not prepared.setting.models.target(job, 0, 0).stochastic
