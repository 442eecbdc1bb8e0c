"""Reading recipes: references, YAML within its limits, overrides, dumping, hashing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from carso_cli.errors import RecipeError
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.load import MAX_BYTES, dump_recipe, load_recipe, load_recipe_text, read_recipe_file
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import list_recipes

DIGITS = read_recipe_file("digits")


def line_of(text: str) -> int:
    """Return the line of the digits recipe that starts with a text."""
    return next(i for i, line in enumerate(DIGITS.splitlines(), start=1) if line.startswith(text))


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe_text(text, source="mine.yaml", overrides=overrides)
    assert caught.value.exit_code == 2
    return caught.value.message


# References


def test_no_reference_means_digits() -> None:
    assert load_recipe(None).name == "digits"


def test_a_shipped_name_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert load_recipe("cifar10").name == "cifar10"


def test_a_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = DIGITS.replace("name: digits\ndescription", "name: mine\ndescription")
    for name in ("digits.yaml", "plain"):
        (tmp_path / name).write_text(text)
        for reference in (name, f"./{name}", str(tmp_path / name)):
            assert load_recipe(reference).name == "mine"


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(RecipeError, match=r"no shipped recipe 'cifar11'; did you mean 'cifar10'") as caught:
        load_recipe("cifar11")
    names = ", ".join(recipe.name for recipe in list_recipes())
    assert caught.value.message.endswith(f"\nshipped recipes: {names}")
    assert "carso recipes ls" in caught.value.hint


def test_a_missing_file_with_a_shipped_name_suggests_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"'digit\.yaml'; did you mean 'digits'"):
        load_recipe("digit.yaml")


@pytest.mark.parametrize("name", ["nowhere/x.yaml", "/nowhere/x.yaml", "./x"])
def test_a_missing_path_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"(cannot read the recipe|no shipped recipe).*x(\.yaml)?\b"):
        load_recipe(name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it is a folder"):
        load_recipe(str(tmp_path))


def test_a_command_line_names_a_recipe_by_its_path_or_shipped_name(tmp_path: Path) -> None:
    path = tmp_path / "my recipe.yaml"
    path.write_text(DIGITS)
    mine, shipped = load_recipe(str(path)), load_recipe("digits")
    assert mine.model_copy(update={"seed": 1}).reference == f"'{path}'"
    assert shipped.reference == load_recipe().reference == "digits"
    assert (mine, hash(mine)) == (shipped, hash(shipped))
    assert mine != load_recipe("digits", ["seed=1"])


# Files that are no recipes


def test_a_large_file_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"a" * (10 * MAX_BYTES))
    with pytest.raises(RecipeError, match="10,000,000 bytes; at most 1,000,000 are allowed"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x80\x02", "not text in UTF-8: byte 0"),
        (DIGITS.encode("utf-16"), "not text in UTF-8: byte 0"),
        (b"name: \x00", "not a text file: character 6"),
    ],
)
def test_binary_files_are_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + DIGITS.encode())
    assert load_recipe(str(path)) == load_recipe("digits")


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "nothing"), ("# only this\n", "nothing"), ("- 1", "a list"), ("7", "a single value")],
)
def test_a_file_without_sections_is_refused(text: str, found: str) -> None:
    assert refused(text) == (
        f"mine.yaml: a recipe is sections of keys and values, and this file holds {found}"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: x\n\tdata: y", "line 2, column 1"),
        ("name: x\ndata: [1, 2", "line 2"),
        ("name: x\ndata: *nowhere", "line 2, column 7"),
        ("name: x\n---\nname: y", "line 2"),
        ("a: 1\n b: 2", "line 2"),
    ],
)
def test_what_is_not_yaml_is_placed(text: str, place: str) -> None:
    message = refused(text)
    assert message.startswith(f"mine.yaml, {place}")
    assert "this is not YAML" in message


def bomb(levels: int) -> str:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(9),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 200_000,
        "a: " * 1 + "{b: " * 500,
        "\n".join("- x" for _ in range(50_000)),
        "a: [" + "1, " * 300_000 + "1]",
    ],
    ids=["bomb", "list in itself", "section in itself", "deep list", "deep section", "long list", "wide"],
)
def test_expansion_and_nesting_are_bounded(text: str) -> None:
    assert "expands to more than 10,000 values or nests deeper than 20" in refused(text)


def test_aliases_within_the_limits_work() -> None:
    text = DIGITS.replace("mean: [0.3051, 0.3051, 0.3051]", "mean: &grey [0.3, 0.3, 0.3]")
    text = text.replace("std: [0.3238, 0.3238, 0.3238]", "std: *grey")
    assert load_recipe_text(text).data.std == (0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system [true]", "!!python/name:os.system ''", "!mine x", "!!binary aGk="],
)
def test_tags_are_refused_and_nothing_runs(tag: str) -> None:
    message = refused(DIGITS.replace('reproduces: ""', f"reproduces: {tag}"))
    assert f"line {line_of('reproduces')}, reproduces: the tag {tag.split()[0]} is not allowed" in message


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    message = refused(DIGITS.replace("  eps: 0.1", "  eps: 0.1\n  eps: 0.2"))
    line = line_of("  eps: 0.1")
    assert message.splitlines()[1:] == [
        f"  line {line + 1}, threat.eps: this key is given twice, first on line {line}; keep one"
    ]


def test_merge_keys_are_refused() -> None:
    assert "no merge keys (<<)" in refused(DIGITS.replace("  norm: linf", "  <<: {norm: linf}"))


@pytest.mark.parametrize("word", ["yes", "on", "2024-01-01", "1_000", "0x1F", "12:30", "010", "1e3"])
def test_text_that_other_yaml_readers_convert_stays_text(word: str) -> None:
    assert load_recipe_text(DIGITS, overrides=[f"description={word}"]).description == word


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("threat.eps=4/255", "threat", "eps", 4 / 255),
        ("data.root=../x", "data", "root", "../x"),
        ("data.root=a=b", "data", "root", "a=b"),
        ("data.train_limit=null", "data", "train_limit", None),
        ("data.root=", "data", "root", None),
        ("representation.layers=[layer.0, layer.1]", "representation", "layers", ("layer.0", "layer.1")),
        ("evaluation.aggregation=logit-mean", "evaluation", "aggregation", "logit-mean"),
        ("purifier={condition_features: 7}", "purifier", "condition_features", 7),
    ],
)
def test_overrides_are_read_as_yaml(override: str, section: str, key: str, value: Any) -> None:
    recipe = load_recipe("digits", [override])
    assert getattr(getattr(recipe, section), key) == value


def test_overrides_create_sections_that_are_left_out() -> None:
    text = DIGITS[: DIGITS.index("evaluation:")]
    assert load_recipe_text(text, overrides=["evaluation.n_samples=3"]).evaluation.n_samples == 3


def test_the_last_of_two_overrides_holds() -> None:
    assert load_recipe("digits", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", ".seed=1", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    message = refused(DIGITS, override)
    assert message.startswith(f"--set {override}: an override is written section.key=value")


def test_an_override_that_is_no_yaml_is_placed() -> None:
    assert refused(DIGITS, "threat.eps=[1").startswith("--set threat.eps=[1, line 1")


def test_an_override_below_a_value_is_refused() -> None:
    message = refused(DIGITS, "seed.deeper=1")
    assert "--set seed.deeper=1, seed.deeper: 'seed' is a value, not a section" in message


def test_errors_in_overrides_say_so() -> None:
    message = refused(DIGITS, "training.batch_size=many", "evaluation.n_sample=8")
    assert "--set training.batch_size=many, training.batch_size: 'many' is not allowed" in message
    assert (
        "--set evaluation.n_sample=8, evaluation.n_sample: unknown key; did you mean 'n_samples'" in message
    )


def schedule(recipe: Recipe) -> tuple[int, ...]:
    rate, beta = recipe.training.learning_rate, recipe.training.beta_increase
    lengths = (rate.warmup_epochs, rate.plateau_epochs, rate.annealing_epochs)
    return (*lengths, beta.first_epoch, beta.last_epoch)


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("cifar10", 200, (25, 25, 150, 25, 34)),
        ("cifar10", 20, (3, 2, 15, 3, 4)),
        ("cifar10", 400, (50, 50, 300, 50, 68)),
        ("cifar10", 3, (1, 0, 2, 0, 1)),
        ("cifar10", 1, (1, 0, 0, 0, 1)),
    ],
)
def test_fewer_epochs_scale_the_schedules(name: str, epochs: int, expected: tuple[int, ...]) -> None:
    assert schedule(load_recipe(name, [f"training.epochs={epochs}"])) == expected


@pytest.mark.parametrize("base", ["cifar10", "digits", "cifar10-small-adversarial"])
def test_epochs_alone_in_an_extending_recipe_scale_as_set_does(base: str) -> None:
    text = f"extends: {base}\nname: mine\ndescription: shorter\ntraining: {{epochs: 20}}\n"
    assert schedule(load_recipe_text(text)) == schedule(load_recipe(base, ["training.epochs=20"]))
    # A --set scales what the recipe has scaled.
    again = load_recipe_text(text, overrides=["training.epochs=50"])
    assert sum(schedule(again)[:3]) == again.training.epochs == 50
    for value in ("many", "0", "true"):
        assert "use an integer from 1" in refused(text.replace("20", value))


def test_epochs_alone_scale_the_defaults() -> None:
    data = yaml.safe_load(DIGITS)
    data["training"] = {"epochs": 20}
    short = load_recipe_text(yaml.safe_dump(data))
    # The defaults are Table 16's, which cifar10 writes out.
    assert schedule(short) == schedule(load_recipe("cifar10", ["training.epochs=20"]))


L2 = "extends: cifar10\nname: mine\ndescription: l2\n"


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (L2, ("threat.norm=l2",)),
        (f"{L2}threat: {{norm: l2}}\n", ()),
        (f"{L2}threat: {{norm: l2, eps: 0.5}}\n", ("threat.norm=linf",)),
    ],
)
def test_another_norm_needs_its_own_eps(text: str, overrides: tuple[str, ...]) -> None:
    assert "another norm needs an eps of its own" in refused(text, *overrides)
    recipe = load_recipe_text(text, overrides=[*overrides, "threat.eps=0.25"]) if overrides else None
    assert recipe is None or recipe.threat.eps == 0.25


def test_the_same_norm_again_keeps_its_eps() -> None:
    assert load_recipe_text(f"{L2}threat: {{norm: linf}}\n").threat.eps == 8 / 255
    assert load_recipe("cifar10", ["threat.norm=linf"]).threat.eps == 8 / 255
    both = load_recipe("cifar10", ["threat={norm: l2, eps: 0.5}"])
    assert (both.threat.norm, both.threat.eps) == ("l2", 0.5)


@settings(deadline=None)
@given(st.integers(1, 10_000))
@pytest.mark.slow
def test_scaled_schedules_always_add_up(epochs: int) -> None:
    recipe = load_recipe_text(DIGITS, overrides=[f"training.epochs={epochs}"])
    assert sum(schedule(recipe)[:3]) == epochs == recipe.training.epochs


@pytest.mark.parametrize(
    ("text", "overrides", "epochs"),
    [
        (DIGITS, ("training.epochs=10", "training.learning_rate.warmup_epochs=1"), 10),
        (DIGITS.replace("  epochs: 12", "  epochs: 13"), (), 13),
    ],
    ids=["schedules are given too", "epochs of a file"],
)
def test_what_is_not_scaled(text: str, overrides: tuple[str, ...], epochs: int) -> None:
    message = refused(text, *overrides)
    assert f"warm-up, plateau and annealing last 12 epochs together; epochs is {epochs}" in message


# Classifiers of other libraries


OTHERS = ("classifier.at={source: file, file: mine.pt}", "classifier.clean=null")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["classifier.family=timm"], "classifier: family 'timm' needs 'architecture'"),
        (["classifier.architecture=resnet18"], "classifier: family 'wide-resnet' takes no 'architecture'"),
        (
            ["classifier.family=torchvision", "classifier.architecture=resnet18", "classifier.clean=null"],
            "family 'torchvision' takes weights of source 'file' only",
        ),
        (["classifier.family=torchvison"], "did you mean 'torchvision'"),
    ],
)
def test_architectures_that_cannot_be(overrides: list[str], message: str) -> None:
    assert message in refused(DIGITS, *overrides)


def test_an_architecture_by_name() -> None:
    recipe = load_recipe(
        "digits", [*OTHERS, "classifier.family=timm", "classifier.architecture=resnet18.a1_in1k"]
    )
    assert recipe.classifier.architecture == "resnet18.a1_in1k"
    other = load_recipe("digits", [*OTHERS, "classifier.family=timm", "classifier.architecture=resnet34"])
    assert recipe_hash(recipe, TRAINING_SECTIONS) != recipe_hash(other, TRAINING_SECTIONS)


# Dump and hash


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "cifar10-small", "tinyimagenet200"])
def test_a_dumped_recipe_loads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe_text(dump_recipe(recipe)) == recipe
    written = yaml.safe_load(dump_recipe(recipe))
    assert set(written) == set(Recipe.model_fields)
    assert set(written["training"]["optimiser"]) == set(type(recipe.training.optimiser).model_fields)


@settings(deadline=None)
@example(text="8\x85»", number=1.0)
@example(text="08", number=1e-8)
@example(text="null", number=0.1)
@given(text=st.text(min_size=1), number=st.floats(1e-300, 1e300))
@pytest.mark.slow
def test_any_text_and_number_survive_a_dump(text: str, number: float) -> None:
    base = load_recipe_text(DIGITS)
    changed = base.model_copy(
        update={"description": text, "threat": base.threat.model_copy(update={"norm": "l2", "eps": number})}
    )
    assert load_recipe_text(dump_recipe(changed)) == changed


def test_the_hash_is_of_values_not_of_how_they_are_written() -> None:
    recipe = load_recipe("digits")
    assert recipe_hash(recipe) == recipe_hash(load_recipe("digits", ["threat.eps=1e-1", "data.channels=3"]))
    assert len(recipe_hash(recipe)) == 64


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        # Of the recipe as it was before classifier.architecture, classifier.training.initial and
        # training.objective were keys: stored runs must still be known.
        ("digits", "classifier", "36f2686044b3613bf0b0dd258c1498c569665933b822aa38b870fa4d6ae4c9c8"),
        ("digits", "training", "81b1a125db4bb40b377f55400982a82ce4d9a8c693243aedd10fa46685c659b1"),
        # As it was before training.adversarial.augment was one.
        (
            "digits-adversarial",
            "training",
            "0e4ee2ee594d19c56f01071f606292a3bdce46ad72c8bb981c80ac94e704d423",
        ),
    ],
)
def test_a_hash_outlives_a_new_version(name: str, section: str, expected: str) -> None:
    assert recipe_hash(load_recipe(name), [section]) == expected


def test_where_files_lie_is_not_hashed() -> None:
    # A run remembers the checksum of the purifier it started from, not its place.
    for place in ("data.root=/elsewhere", "training.initial=a.safetensors"):
        assert recipe_hash(load_recipe("digits")) == recipe_hash(load_recipe("digits", [place]))


def test_only_the_objectives_that_use_a_section_hash_it() -> None:
    steps, initial = "training.adversarial.steps=9", "training.initial=a.safetensors"
    for objective, differ in (("elbo", False), ("adversarial", True), ("both", True)):
        chosen = [f"training.objective={objective}", initial]
        hashes = {recipe_hash(load_recipe("digits", [*chosen, *more])) for more in ([], [steps])}
        assert len(hashes) == 1 + differ


@pytest.mark.parametrize(
    ("override", "retrains"),
    [
        ("seed=1", True),
        ("data.holdout=0.1", True),
        ("threat.eps=0.2", True),
        ("classifier.activation=silu", True),
        ("representation.kind=clean", True),
        ("purifier.latent_features=33", True),
        ("training.attack_mix.pgd_steps=11", True),
        ("classifier.training.initial=at", True),
        ("evaluation.n_samples=9", False),
        ("description=another", False),
        ("reproduces=another", False),
    ],
)
def test_only_what_determines_training_changes_its_hash(override: str, retrains: bool) -> None:
    before, after = load_recipe("digits"), load_recipe("digits", [override])
    assert recipe_hash(before) != recipe_hash(after)
    same = recipe_hash(before, TRAINING_SECTIONS) == recipe_hash(after, TRAINING_SECTIONS)
    assert same is not retrains


def test_an_unknown_section_cannot_be_hashed() -> None:
    with pytest.raises(ValueError, match="no section 'trainings'"):
        recipe_hash(load_recipe("digits"), ["trainings"])
