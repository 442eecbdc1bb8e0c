"""Errors of recipes: every kind, every section, all at once, in plain words."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from carso_cli.errors import RecipeError
from carso_cli.recipe.load import dump_recipe, load_recipe, load_recipe_text
from carso_cli.recipe.schema import Recipe

COMPLETE = dump_recipe(load_recipe("cifar10"))


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe_text(text, source="mine.yaml", overrides=overrides)
    head, *rest = caught.value.message.splitlines()
    count = "a problem" if len(rest) == 1 else f"{len(rest)} problems"
    # Every problem placed at a `--set` is one that the file alone does not have.
    blamed = all(line.startswith("  --set ") for line in rest)
    assert head == (f"--set has {count} with mine.yaml:" if blamed else f"mine.yaml has {count}:")
    assert "carso recipes show digits" in caught.value.hint
    return [line.strip() for line in rest]


def one_problem(*overrides: str) -> str:
    """Return the one problem of the complete recipe with overrides, less its `--set` place."""
    (problem,) = problems(COMPLETE, *overrides)
    place = f"--set {overrides[-1]}, "
    assert problem.startswith(place)
    return problem.removeprefix(place)


def sections(
    model: type[BaseModel] = Recipe, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, model
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        members = (
            get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        )
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from sections(member, (*path, name))


SECTIONS = list(sections())


def line_of(text: str, path: tuple[str, ...]) -> int:
    node: Any = yaml.compose(text)
    for part in path:
        key, node = next(pair for pair in node.value if pair[0].value == part)
    return int(key.start_mark.line) + 1


def test_every_section_is_walked() -> None:
    assert {".".join(path) for path, _ in SECTIONS} == {
        "", "data", "threat", "classifier", "classifier.at", "classifier.clean", "classifier.training",
        "representation", "purifier", "training", "training.learning_rate", "training.beta_increase",
        "training.optimiser", "training.attack_mix", "training.adversarial", "evaluation",
    }  # fmt: skip


def planted(path: tuple[str, ...], add: dict[str, Any]) -> str:
    data = yaml.safe_load(COMPLETE)
    section = data
    for part in path:
        section = section[part]
    section.update(add)
    return yaml.safe_dump(data, sort_keys=False)


@pytest.mark.parametrize(("path", "model"), SECTIONS, ids=[".".join(path) or "top" for path, _ in SECTIONS])
def test_a_typo_in_any_section_is_found(path: tuple[str, ...], model: type[BaseModel]) -> None:
    known = next(iter(model.model_fields))
    typo = f"{known}x"
    text = planted(path, {typo: 1})
    dotted = ".".join((*path, typo))
    (problem,) = problems(text)
    start = f"line {line_of(text, (*path, typo))}, {dotted}: unknown key; did you mean '{known}'"
    assert problem.startswith((f"{start}? known keys: ", f"{start} or "))
    assert problem.endswith(f"known keys: {', '.join(model.model_fields)}")


def test_a_typo_in_every_section_is_found_at_once() -> None:
    data = yaml.safe_load(COMPLETE)
    for path, _ in SECTIONS:
        section = data
        for part in path:
            section = section[part]
        section["zzz"] = 1
    found = problems(yaml.safe_dump(data, sort_keys=False))
    assert len(found) == len(SECTIONS) == 16
    lines = [int(problem.split(",")[0].removeprefix("line ")) for problem in found]
    assert lines == sorted(lines)
    assert {problem.split(", ")[1].split(":")[0] for problem in found} == {
        ".".join((*path, "zzz")) for path, _ in SECTIONS
    }


@pytest.mark.parametrize(("path", "model"), SECTIONS[1:], ids=[".".join(path) for path, _ in SECTIONS[1:]])
def test_a_value_in_place_of_any_section_is_refused(path: tuple[str, ...], model: type[BaseModel]) -> None:
    dotted = ".".join(path)
    text = one_problem(f"{dotted}=3")
    assert text.startswith(
        f"{dotted}: 3 is not allowed; use a section with the keys {next(iter(model.model_fields))}"
    )


NUMBERS = "such as 0.1, 1e-3 or 8/255"
ABOVE = f"use a number above 0, {NUMBERS}"
NO_NUMBER = f"is not allowed (not a number or a fraction); {ABOVE}"
LAYERS = "use a list of at least one, each item text, not empty"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.epochs=ten", "'ten' is not allowed; use an integer from 1"),
        ("training.batch_size=1", "1 is not allowed; use an integer from 2"),
        ("training.batch_size=0", "0 is not allowed; use an integer from 2"),
        ("training.batch_size=1.0", "1.0 is not allowed; use an integer from 2"),
        ("training.batch_size=true", "true is not allowed; use an integer from 2"),
        ("training.batch_size=null", "null is not allowed; use an integer from 2"),
        ("training.batch_size=[1]", "[1] is not allowed; use an integer from 2"),
        ("training.batch_size={a: 1}", "a section is not allowed; use an integer from 2"),
        ("data.image_size=27", "27 is not allowed; use an integer from 28 to 224"),
        ("data.train_limit=-1", "-1 is not allowed; use an integer from 1, or null"),
        ("seed=-1", "-1 is not allowed; use an integer from 0"),
        ("purifier.layer_convolutions=6", "6 is not allowed; use an integer from 1 to 5, or null"),
        ("threat.eps=0", f"0 is not allowed; {ABOVE}"),
        ("threat.eps=8/0", f"'8/0' is not allowed (the denominator is zero); {ABOVE}"),
        ("threat.eps=nan", f"'nan' {NO_NUMBER}"),
        ("threat.eps=1e999", f"'1e999' is not allowed (the number is not finite); {ABOVE}"),
        ("threat.eps=true", f"true {NO_NUMBER}"),
        ("data.holdout=0.6", f"0.6 is not allowed; use a number from 0 to 0.5, {NUMBERS}"),
        ("training.optimiser.beta1=2", f"2 is not allowed; use a number from 0 to 1, {NUMBERS}"),
        (
            "classifier.training.step_size=x",
            f"'x' is not allowed (not a number or a fraction); use a number above 0, {NUMBERS}, or null",
        ),
        ("classifier.training.augment=maybe", "'maybe' is not allowed; use true or false"),
        ("description=''", "'' is not allowed; use text, not empty"),
        ("description=7", "7 is not allowed; use text, not empty"),
        ("data.root=7", "7 is not allowed; use text, or null"),
        ("threat.norm=linff", "'linff' is not allowed; use one of 'linf', 'l2'; did you mean 'linf'?"),
        ("threat.norm=L2", "'L2' is not allowed; use one of 'linf', 'l2'; did you mean 'l2'?"),
        ("data.channels=2", "2 is not allowed; use one of 1, 3"),
        ("data.channels=true", "true is not allowed (not a number); use one of 1, 3"),
        (
            "precision=fp16",
            "'fp16' is not allowed; use one of 'fp32', 'tf32', 'bf16'; did you mean 'bf16' or 'fp32'?",
        ),
        (
            "evaluation.aggregation=logit-meen",
            "'logit-meen' is not allowed; use one of 'doubly-exponential', 'logit-mean', 'probability-mean', "
            "'majority-vote'; did you mean 'logit-mean' or 'probability-mean'?",
        ),
        ("purifier.input_share=1", f"1 is not allowed; use a number from 0 to below 1, {NUMBERS}"),
        ("purifier.input_share=false", f"false {NO_NUMBER.replace('above 0', 'from 0 to below 1')}"),
        ("representation.layers=[]", f"[] is not allowed; {LAYERS}"),
        ("representation.layers=a", f"'a' is not allowed; {LAYERS}"),
        ("data.mean=0.5", f"0.5 is not allowed; use a list, each item a number from 0 to 1, {NUMBERS}"),
        ("name=My Run", "'My Run' is not allowed; use up to 80 lower-case letters, digits, dots, hyphens and "
         "underscores"),
        ("name=" + "a" * 81, f"'{'a' * 56}... is not allowed; use up to 80 lower-case letters, digits, dots, "
         "hyphens and underscores"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_says_what_is(override: str, problem: str) -> None:
    assert one_problem(override) == f"{override.split('=')[0]}: {problem}"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.channels=1", "mean has 3 values for 1 channels"),
        ("data.name=image-folder", "an image-folder needs both 'train' and 'test': a folder or a zip each"),
        ("classifier.at.file=x.pt", "source 'robustbench' needs 'name' and takes no 'file'"),
        ("classifier.clean.name=x", "source 'file' needs 'file' and takes no 'name'"),
        (
            "classifier.depth=12",
            "a WideResNet has 6 k + 4 layers (10, 16, 22, 28, 34); 12 is not one of these",
        ),
        ("representation.layers=[a, b, a]", "a layer is named twice"),
        ("training.beta_increase.last_epoch=3", "last_epoch 3 comes before first_epoch 25"),
        (
            "training.learning_rate.warmup_epochs=24",
            "warm-up, plateau and annealing last 199 epochs together; epochs is 200",
        ),
    ],
)
def test_values_that_do_not_fit_together(override: str, problem: str) -> None:
    (found,) = problems(COMPLETE, override)
    key = override.partition("=")[0]
    section = {"training.learning_rate": "training"}.get(key.rpartition(".")[0], key.rpartition(".")[0])
    assert found == f"--set {override}, {section}: {problem}"
    # The same in the file is placed there.
    text = dump_recipe(load_recipe("cifar10")).replace("  eps: 0.03137254901960784", "  eps: 8")
    (found,) = problems(text)
    assert found.startswith(f"line {line_of(text, ('threat',))}, threat: eps 8 is more than")


def test_a_set_of_a_whole_section_is_the_place_of_its_values() -> None:
    (found,) = problems(COMPLETE, "training.optimiser={beta1: 2}")
    assert found.startswith("--set training.optimiser={beta1: 2}, training.optimiser.beta1: 2 is not allowed")


def test_a_shipped_recipe_is_called_by_its_name() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", ["evaluation.imagse=3"])
    head, line = caught.value.message.splitlines()
    assert head == "--set has a problem with recipe 'digits':"
    assert line.startswith(
        "  --set evaluation.imagse=3, evaluation.imagse: unknown key; did you mean 'images'"
    )


def test_items_of_lists_are_placed() -> None:
    text = COMPLETE.replace("  - 0.4822", "  - 1.4822").replace("  - 0.2616", "  - wide")
    mean, std = line_of(COMPLETE, ("data", "mean")), line_of(COMPLETE, ("data", "std"))
    assert problems(text) == [
        f"line {mean + 2}, data.mean.1: 1.4822 is not allowed; use a number from 0 to 1, {NUMBERS}",
        f"line {std + 3}, data.std.2: 'wide' is not allowed (not a number or a fraction); "
        f"use a number above 0, {NUMBERS}",
    ]


def test_missing_keys_are_placed_at_their_section() -> None:
    data = yaml.safe_load(COMPLETE)
    del data["data"]["classes"], data["description"], data["representation"]["layers"]
    text = yaml.safe_dump(data, sort_keys=False)
    assert problems(text) == [
        "description: is missing; give text, not empty",
        f"line {line_of(text, ('data',))}, data.classes: is missing; give an integer from 2",
        f"line {line_of(text, ('representation',))}, representation.layers: is missing; "
        "give a list of at least one, each item text, not empty",
    ]


def test_reading_and_checking_problems_come_together() -> None:
    text = COMPLETE.replace("  norm: linf", "  norm: linf\n  norm: l2\n  epss: 1") + "evaluation: {}\n"
    found = problems(text, "seed=x")
    norm = line_of(COMPLETE, ("threat", "norm"))
    assert [problem.split(": ")[0] for problem in found] == [
        f"line {norm + 1}, threat.norm",
        f"line {norm + 2}, threat.epss",
        f"line {len(text.splitlines())}, evaluation",
        "--set seed=x, seed",
    ]


def test_plain_words_hold_no_jargon() -> None:
    text = " ".join(problems(planted((), {"training": {"epochs": "x", "optimiser": [], "attack_mix": None}})))
    for word in ("type=", "Input", "pydantic", "dict", "int_", "NoneType", "ValidationError", "Value error"):
        assert word not in text
