"""From a recipe's classifier section, as plain arguments, to a frozen classifier.

Every classifier takes (B, channels, H, W) images in [0, 1], standardises them itself, and returns (B, C)
logits. Weights files are looked for as given, then in CARSO_HOME's `weights` folder; RobustBench's in the
layout in which RobustBench caches them, `<dataset>/Linf/<name>.pt`, there and in `./models`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import hub, nn

from carso_cli.classifiers.architectures import Standardised
from carso_cli.classifiers.blueprint import Blueprint
from carso_cli.classifiers.interface import check_classifier
from carso_cli.classifiers.registry import PUBLISHED_FILES, ClassifierRecord, Published, find_record
from carso_cli.classifiers.weights import load_strict, read_header, read_state_dict
from carso_cli.errors import RecipeError, WeightsError, nearest
from carso_cli.io.download import fetch_command, recorded_problem
from carso_cli.io.paths import weights_home

ENTRY_POINT_GROUP = "carso.classifiers"


def load_classifier(
    blueprint: Blueprint,
    *,
    source: str,
    name: str | None,
    file: str | None,
    dataset: str,
    recipe: str,
    kind: str,
) -> nn.Module:
    """Load a classifier, frozen and in evaluation mode.

    Args:
        blueprint: What it is; a shipped or RobustBench classifier keeps its own standardisation.
        source: `shipped`, `robustbench`, `file` or `entry-point`.
        name: Name of a shipped, RobustBench or entry-point classifier.
        file: Weights file, for source `file`.
        dataset: Name of the data set.
        recipe: What a command line names the recipe by, for the commands that get missing weights.
        kind: `at` or `clean`, for the same.

    Raises:
        RecipeError: If a name is unknown, the architecture is not the named one's, or the classifier does not
            take the recipe's images or return one logit a class.
        MissingError: If the architecture's library is not installed.
        WeightsError: If the weights are missing, damaged or of another architecture.
    """
    if source == "entry-point" or blueprint.family == "external":
        built = _from_entry_point(name or "", blueprint.family, source)
        return _checked(_frozen(built), blueprint, f"entry point '{name}'")
    if source == "file":
        path = find_weights(file or "", blueprint.family, recipe, kind)
    else:
        record = find_record(source, name or "", dataset)
        _check_architecture(record, blueprint)
        mean, std = record.standardisation
        blueprint = replace(blueprint, mean=mean, std=std)
        path = _shipped(record) if source == "shipped" else _robustbench(record, recipe)
    classifier = blueprint.build()
    stated = {"mean": list(blueprint.mean), "std": list(blueprint.std)}
    if isinstance(classifier, Standardised):
        _check_file(path, stated)
        load_strict(classifier.network, read_state_dict(path), path, keys="classifier.architecture")
        return _checked(_frozen(classifier), blueprint, f"{blueprint.family}'s {blueprint.architecture}")
    _check_file(path, {"activation": blueprint.activation, **stated})
    load_strict(classifier, read_state_dict(path), path, keys="classifier.depth, classifier.width")
    return _frozen(classifier)


def find_weights(file: str, family: str, recipe: str, kind: str) -> Path:
    """Find a weights file: as given, then in the caches.

    Args:
        file: Path or name of the file.
        family: Family of the classifier.
        recipe: What a command line names the recipe by, for the message.
        kind: `at` or `clean`, for the message.

    Raises:
        WeightsError: Saying where it was looked for and how to get it.
    """
    places = weights_places(file, family)
    for path in places:
        if path.is_file():
            return path
    if file in PUBLISHED_FILES:
        hint = _fetching(PUBLISHED_FILES[file], recipe, weights_home() / file)
    elif family == "wide-resnet":
        hint = f"train them with: carso train-classifier {recipe} --kind {kind}"
    else:
        hint = f"put the file into {weights_home()}, or name its path in classifier.{kind}.file"
    raise WeightsError(
        f"the classifier's weights '{file}' are missing; looked for {_listed(places)}", hint=hint
    )


def weights_places(file: str, family: str) -> tuple[Path, ...]:
    """Return where a weights file is looked for: as given, in CARSO_HOME, in torchvision's own cache."""
    places = (Path(os.path.expanduser(file)), weights_home() / file)
    return (*places, Path(hub.get_dir()) / "checkpoints" / file) if family == "torchvision" else places


def robustbench_places(record: ClassifierRecord) -> tuple[Path, ...]:
    """Return where a RobustBench classifier's weights are looked for; the first is where they belong."""
    return weights_home() / record.file, Path("models") / record.file


def _robustbench(record: ClassifierRecord, recipe: str) -> Path:
    places = robustbench_places(record)
    for path in places:
        if path.is_file():
            return path
    raise WeightsError(
        f"the weights of RobustBench's '{record.name}' for {record.dataset} are missing; "
        f"looked for {_listed(places)}",
        hint=_fetching(record.published, recipe, places[0]),
    )


def _fetching(published: Published, recipe: str, place: Path) -> str:
    return (
        f"download them with: {fetch_command(recipe)}\nor save {published.page or published.url} as {place}"
    )


def _shipped(record: ClassifierRecord) -> Path:
    if not record.file.is_file():
        raise WeightsError(
            f"the shipped classifier '{record.name}' is missing; looked for {record.file}",
            hint="install carso again",
        )
    if hashlib.sha256(record.file.read_bytes()).hexdigest() != record.sha256:
        raise WeightsError(
            f"{record.file} is damaged: its checksum is not that of '{record.name}'",
            hint="install carso again",
        )
    return record.file


def _check_architecture(record: ClassifierRecord, blueprint: Blueprint) -> None:
    stated = (blueprint.family, blueprint.depth, blueprint.width, blueprint.activation)
    if stated != ("wide-resnet", record.depth, record.width, record.activation):
        raise RecipeError(
            f"'{record.name}' is a {record.architecture}; "
            f"the recipe says WideResNet-{blueprint.depth}-{blueprint.width} with {blueprint.activation}",
            hint="give classifier.depth, classifier.width and classifier.activation its values",
        )
    if blueprint.classes != record.classes:
        raise RecipeError(
            f"'{record.name}' knows {record.classes} classes; the recipe says {blueprint.classes}"
        )


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse what would load without complaint and compute something else."""
    if problem := recorded_problem(path):
        raise WeightsError(f"{path}: {problem}")
    header = read_header(path)
    for key, value in expected.items():
        if header.get(key, value) != value:
            raise WeightsError(
                f"{path} was trained with {key} {header[key]}; the recipe says {value}",
                hint=f"give {'classifier' if key == 'activation' else 'data'}.{key} the value of training",
            )


def _from_entry_point(name: str, family: str, source: str) -> nn.Module:
    if family != "external" or source != "entry-point":
        raise RecipeError("classifier.family 'external' and source 'entry-point' go together")
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        raise RecipeError(
            f"no installed package offers a classifier '{name}' as an entry point of {ENTRY_POINT_GROUP}; "
            f"offered are: {', '.join(sorted(points)) or 'none'}",
            hint=nearest(name, points) or "install the package that defines it into this environment",
        )
    try:
        built = points[name].load()()
    # The code of others may fail in any way; the user needs to know whose it was.
    except Exception as error:
        raise WeightsError(f"entry point '{name}' ({points[name].value}) failed: {error}") from error
    if not isinstance(built, nn.Module):
        raise WeightsError(f"entry point '{name}' returned a {type(built).__name__}, not a torch module")
    return built


def _checked(classifier: nn.Module, blueprint: Blueprint, name: str) -> nn.Module:
    check_classifier(
        classifier,
        classes=blueprint.classes,
        channels=blueprint.channels,
        image_size=blueprint.image_size,
        name=name,
    )
    return classifier


def _frozen(classifier: nn.Module) -> nn.Module:
    return classifier.eval().requires_grad_(False)


def _listed(places: Sequence[Path]) -> str:
    return " and ".join(str(path) for path in places)
