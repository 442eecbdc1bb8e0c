from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from carso_cli.ablation.variants import (
    adversarial_fractions,
    aggregations,
    attack_mixes,
    choose_budget,
    first_and_second,
    layer_subsets,
    perturbation_sizes,
    row_order,
    sample_counts,
    seeds,
)
from carso_cli.errors import RecipeError, UsageError
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe

DIGITS = load_recipe("digits")
ROOT = Path("runs") / "digits"


def test_the_four_combinations_need_one_purifier_per_first_instance() -> None:
    variants = first_and_second(DIGITS).variants
    assert [variant.label for variant in variants] == ["clean/clean", "AT/clean", "clean/AT", "AT/AT"]
    folders = [variant.run_folder(ROOT).name for variant in variants]
    assert folders == ["digits-first-clean", "digits", "digits-first-clean", "digits"]
    assert [variant.recipe.representation.kind for variant in variants] == ["clean", "at", "clean", "at"]
    assert [variant.recipe.evaluation.second_kind for variant in variants] == ["clean", "clean", "at", "at"]
    assert [variant.kinds for variant in variants] == [{"clean"}, {"at", "clean"}, {"at", "clean"}, {"at"}]


def test_what_is_left_out_is_the_recipes_own() -> None:
    recipe = load_recipe("digits", ["representation.kind=clean"])
    (variant,) = first_and_second(recipe, [(None, "clean")]).variants
    assert (variant.label, variant.suffix) == ("clean/clean", "")
    (other,) = first_and_second(recipe, [("at", None)]).variants
    assert (other.label, other.suffix) == ("AT/AT", "-first-at")


def test_rules_of_tables_four_and_five() -> None:
    found = {variant.label: variant.paper for variant in aggregations(DIGITS).variants}
    assert found == {
        "logit-mean": ("4", "logit-mean"),
        "probability-mean": ("4", "probability-mean"),
        "doubly-exponential": ("4", "doubly-exponential"),
        "majority-vote": ("5", "majority-vote"),
    }


def test_layer_subsets_cover_every_layer_once_by_groups() -> None:
    recipe = load_recipe("cifar10")
    layers = recipe.representation.layers
    found = {v.label: v for v in layer_subsets(recipe, ["all", "first", "groups", "last"]).variants}
    groups = [label for label in found if label not in ("all", "first", "last")]
    assert groups == ["layer.0", "layer.1", "layer.2"]
    assert found["all"].suffix == ""
    assert found["layer.1"].suffix == "-layers-layer.1"
    assert found["first"].recipe.representation.layers == (layers[0],)
    assert found["last"].recipe.representation.layers == (layers[-1],)
    together = [layer for group in groups for layer in found[group].recipe.representation.layers]
    assert tuple(together) == layers
    (single,) = layer_subsets(recipe, [layers[4]]).variants
    assert single.recipe.representation.layers == (layers[4],)


def test_unknown_layers_are_named_with_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"unknown layers 'layer\.7'; did you mean 'layer\.") as caught:
        layer_subsets(DIGITS, ["layer.7"])
    assert "all, first, last, groups, layer.0, layer.1, layer.2" in caught.value.hint


def test_the_recipes_own_share_is_its_own_run() -> None:
    variants = adversarial_fractions(DIGITS, [0.5, 0.0, 0.25]).variants
    assert [(v.label, v.suffix) for v in variants] == [
        ("0", "-adversarial-0"),
        ("0.25", "-adversarial-0.25"),
        ("0.5", ""),
    ]
    assert variants[1].recipe.training.attack_mix.adversarial_fraction == 0.25
    with pytest.raises(RecipeError, match=r"adversarial_fraction.*1\.5"):
        adversarial_fractions(DIGITS, [1.5])
    # Through the defence, the share is that of the attack on it.
    (through,) = adversarial_fractions(load_recipe("digits-adversarial"), [0.25]).variants
    assert through.recipe.training.adversarial.adversarial_fraction == 0.25


def test_the_mixes_of_appendix_a_stand_beside_the_balanced_one() -> None:
    found = {variant.label: variant for variant in attack_mixes(DIGITS, ["subsets", "homogeneous"]).variants}
    subsets = {"fgsm", "pgd", "half", "full", "fgsm-half", "fgsm-full", "pgd-half", "pgd-full"}
    assert set(found) == {"balanced", "homogeneous", *subsets}
    assert found["balanced"].suffix == ""
    mix = found["pgd-half"].recipe.training.attack_mix
    assert (mix.attacks, mix.strengths, mix.adversarial_fraction) == (("pgd",), (0.5,), 0.5)
    assert found["pgd-half"].suffix == "-mix-pgd-half"
    assert found["homogeneous"].recipe.training.attack_mix.homogeneous
    _, only = attack_mixes(DIGITS, ["pgd-only"]).variants
    mix = only.recipe.training.attack_mix
    assert (mix.attacks, mix.strengths, mix.adversarial_fraction) == (("pgd",), (1.0,), 1.0)
    # A mix is the same whatever the recipe's own is.
    (balanced,) = attack_mixes(only.recipe, ["balanced"]).variants
    assert balanced.recipe.training.attack_mix.attacks == ("fgsm", "pgd")
    with pytest.raises(UsageError, match="unknown attack mix 'homogenous'; did you mean 'homogeneous'"):
        attack_mixes(DIGITS, ["homogenous"])
    with pytest.raises(UsageError, match="objective 'adversarial', without an attack mix"):
        attack_mixes(load_recipe("digits-adversarial"), ["pgd"])


def test_seeds_of_training_have_runs_of_their_own() -> None:
    variants = seeds(DIGITS, [2, 0, 1, 0]).variants
    assert [(v.label, v.suffix) for v in variants] == [
        ("seed 0", ""),
        ("seed 1", "-seed-1"),
        ("seed 2", "-seed-2"),
    ]
    with pytest.raises(UsageError, match="--seeds -1 is not allowed"):
        seeds(DIGITS, [-1])


def test_counts_and_sizes_are_checked() -> None:
    assert [v.recipe.evaluation.n_samples for v in sample_counts(DIGITS, [4, 1, 4]).variants] == [1, 4]
    with pytest.raises(UsageError, match="--n-samples 0 is not allowed"):
        sample_counts(DIGITS, [4, 0])
    assert [v.eps for v in perturbation_sizes(DIGITS, [0.0, 0.1, 0.05]).variants] == [0.05, 0.1, 0.0]
    for wrong in ([0.0], [0.1, -0.1]):
        with pytest.raises(UsageError, match="at least one size above 0 and none below"):
            perturbation_sizes(DIGITS, wrong)


@pytest.mark.parametrize(
    "vary",
    [
        lambda recipe: layer_subsets(recipe, ["all", "first"]),
        lambda recipe: first_and_second(recipe, [("clean", "at")]),
    ],
)
def test_a_start_of_other_layers_is_refused_before_training(vary: Callable[[Recipe], object]) -> None:
    started = load_recipe("digits", ["training.initial=a.safetensors"])
    with pytest.raises(UsageError, match=r"cannot start from a\.safetensors"):
        vary(started)
    adversarial_fractions(started, [0.0, 0.5])


def test_rows_are_kept_in_the_papers_order_or_by_size() -> None:
    def labels(*rows: tuple[str, Mapping[str, object]]) -> list[object]:
        stored: list[dict[str, object]] = [{"label": label, "values": values} for label, values in rows]
        return [row["label"] for row in sorted(stored, key=row_order)]

    kinds = ("at", "clean")
    pairs = [(f"{one}/{other}", {"first": one, "second": other}) for one in kinds for other in kinds]
    assert labels(*pairs) == ["clean/clean", "at/clean", "clean/at", "at/at"]
    assert labels(*((str(eps), {"eps": eps}) for eps in (0.1, 0.0, 0.02))) == ["0.0", "0.02", "0.1"]
    layers = ("layer.1", "last", "layer.0", "all")
    found = labels(*((name, {"layers": name, "names": []}) for name in layers))
    assert found == ["all", "last", "layer.0", "layer.1"]


def test_digits_are_attacked_within_minutes_and_it_is_said() -> None:
    attack, limit, note = choose_budget(DIGITS, None, None)
    assert (attack, limit) == ("pgd-eot", 50)
    assert "pgd-eot on 50 test images" in note
    assert choose_budget(DIGITS, "adaptive", 7) == ("adaptive", 7, "")
    assert choose_budget(load_recipe("cifar10"), None, None) == ("adaptive", None, "")
