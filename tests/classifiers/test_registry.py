from __future__ import annotations

import pytest

from carso_cli.classifiers.registry import RECORDS, ClassifierRecord, find_record
from carso_cli.classifiers.wide_resnet import ACTIVATIONS
from carso_cli.errors import RecipeError
from carso_cli.recipe.load import load_recipe

ROBUSTBENCH = [record for record in RECORDS if record.source == "robustbench"]


def test_knows_what_the_paper_uses() -> None:
    assert sorted((record.dataset, record.name) for record in RECORDS) == [
        ("cifar10", "Cui2023Decoupled_WRN-28-10"),
        ("cifar10", "Gowal2020Uncovering_28_10_extra"),
        ("cifar10", "Rebuffi2021Fixing_28_10_cutmix_ddpm"),
        ("cifar100", "Cui2023Decoupled_WRN-28-10"),
        ("cifar100", "Rebuffi2021Fixing_28_10_cutmix_ddpm"),
        ("digits", "digits-at"),
        ("digits", "digits-clean"),
    ]
    assert all(record.citation and record.activation in ACTIVATIONS for record in RECORDS)


@pytest.mark.parametrize("record", ROBUSTBENCH, ids=lambda record: f"{record.name}-{record.dataset}")
@pytest.mark.usefixtures("wide_resnets")
def test_agrees_with_robustbench(record: ClassifierRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench.model_zoo import cifar10, cifar100, model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    entry = model_dicts[BenchmarkDataset(record.dataset)][ThreatModel.Linf][record.name]
    assert entry["gdrive_id"] == record.gdrive_id
    built: dict[str, object] = {}
    for zoo in (cifar10, cifar100):
        monkeypatch.setattr(zoo, "DMWideResNet", lambda **arguments: built.update(arguments))
    entry["model"]()
    assert (built["mean"], built["std"]) == record.standardisation
    assert (built["num_classes"], built["depth"], built["width"]) == (record.classes, 28, 10)
    assert built["activation_fn"].__name__ in ("SiLU", "Swish")  # type: ignore[attr-defined]  # a class
    assert record.activation == "silu"


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_shipped_recipes_agree_with_their_classifiers(name: str) -> None:
    recipe = load_recipe(name)
    weights = recipe.classifier.at
    assert weights is not None
    assert weights.name is not None
    record = find_record(weights.source, weights.name, recipe.data.name)
    assert record.standardisation == (recipe.data.mean, recipe.data.std)
    assert record.classes == recipe.data.classes
    section = recipe.classifier
    assert (record.depth, record.width, record.activation) == (
        section.depth,
        section.width,
        section.activation,
    )


def test_suggests_a_name() -> None:
    with pytest.raises(
        RecipeError, match="no shipped classifier 'digits-att'; there are digits-at"
    ) as caught:
        find_record("shipped", "digits-att", "digits")
    assert caught.value.hint.startswith("did you mean 'digits-at'")


def test_says_what_it_was_trained_on() -> None:
    with pytest.raises(RecipeError, match=r"'Gowal2020.*' was trained on cifar10, not on cifar100"):
        find_record("robustbench", "Gowal2020Uncovering_28_10_extra", "cifar100")
