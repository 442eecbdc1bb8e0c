"""Loading a frozen classifier from a recipe's classifier section, given as plain arguments.

Every classifier takes (B, channels, H, W) images in [0, 1], standardises them itself, and returns (B, C)
logits; `check_classifier` tries this on one image. Weights files are looked for as given, then in the folder
`weights` of CARSO_HOME; RobustBench's in the layout in which RobustBench caches them,
`<dataset>/Linf/<name>.pt`, there and in `./models`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, hub, nn

from carso_cli.classifiers.architectures import Blueprint, Standardised
from carso_cli.classifiers.registry import PUBLISHED_FILES, ClassifierRecord, Published, find_record
from carso_cli.classifiers.weights import (
    load_strict,
    read_header,
    read_state_dict,
    split_standardisation,
)
from carso_cli.errors import RecipeError, WeightsError, nearest
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch_command, recorded_problem
from carso_cli.io.paths import weights_home

_GREY = 0.5
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
    folders: Sequence[Path] = (),
    of_run: bool = False,
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
        folders: Where relative files are looked for too, after the working directory.
        of_run: Whether the recipe is that of a trained run, which needs the weights of its training.

    Raises:
        RecipeError: If a name is unknown, the architecture is not the named one's, or the classifier does not
            take the recipe's images or return one logit a class.
        MissingError: If the architecture's library is not installed.
        WeightsError: If the weights are missing, damaged or of another architecture.
    """
    if source == "entry-point" or blueprint.family == "external":
        # Either without the other is refused there.
        built = _from_entry_point(name or "", blueprint.family, source)
        return _frozen_checked(built, blueprint, f"entry point '{name}'")
    if source == "file":
        path = find_weights(file or "", blueprint.family, recipe, kind, folders=folders, of_run=of_run)
    else:
        record = find_record(source, name or "", dataset)
        _check_architecture(record, blueprint)
        # Known weights need the standardisation of their own training, whatever the recipe's data have.
        mean, std = record.standardisation
        blueprint = replace(blueprint, mean=mean, std=std)
        path = _shipped(record) if source == "shipped" else _robustbench(record, recipe)
    classifier = blueprint.build()
    stated = {"mean": list(blueprint.mean), "std": list(blueprint.std)}
    # A library's file holds the network alone, without the layer of ours around it.
    if isinstance(classifier, Standardised):
        _check_file(path, stated)
        load_strict(classifier.network, _state(path, stated), path, keys="classifier.architecture")
        return _frozen_checked(classifier, blueprint, f"{blueprint.family}'s {blueprint.architecture}")
    _check_file(path, {"activation": blueprint.activation, **stated})
    load_strict(classifier, _state(path, stated), path, keys="classifier.depth, classifier.width")
    return classifier.eval().requires_grad_(False)


def find_weights(
    file: str, family: str, recipe: str, kind: str, *, folders: Sequence[Path] = (), of_run: bool = False
) -> Path:
    """Find a weights file, as given or in the caches; arguments as of `load_classifier`.

    Raises:
        WeightsError: If it is missing; the message says where it was looked for and how to get it.
    """
    places = weights_places(file, family, folders)
    if found := next(filter(Path.is_file, places), None):
        return found
    if folder := next(filter(Path.is_dir, places), None):
        raise WeightsError(f"the classifier's weights, {folder}, are a folder; a file is needed")
    if of_run and file not in PUBLISHED_FILES:
        # Not to train them again: the run's purifier fits no other weights.
        hint = (
            "this run needs the very file of its training: copy it to "
            f"{weights_home() / Path(file).name}, or use the run from the folder where it was trained"
        )
    elif file in PUBLISHED_FILES:
        hint = _fetching(PUBLISHED_FILES[file], recipe, weights_home() / file)
    elif family == "wide-resnet":
        hint = f"train them with: carso train-classifier {recipe} --kind {kind}"
    else:
        hint = f"put the file into {weights_home()}, or name its path in classifier.{kind}.file"
    raise WeightsError(f"the classifier's weights '{file}' are missing; {_looked_for(places)}", hint=hint)


def weights_places(file: str, family: str, folders: Sequence[Path] = ()) -> tuple[Path, ...]:
    """Return where a weights file is looked for: as given, in some folders, and in the caches.

    These are CARSO_HOME, by path and by name alone, and torchvision's own.
    """
    given, home = Path(os.path.expanduser(file)), weights_home()
    around = () if given.is_absolute() else tuple(folder / given for folder in folders)
    places = tuple(dict.fromkeys((given, *around, home / file, home / given.name)))
    return (*places, Path(hub.get_dir()) / "checkpoints" / file) if family == "torchvision" else places


def robustbench_places(record: ClassifierRecord) -> tuple[Path, ...]:
    """Return where a RobustBench classifier's weights are looked for; the first is where they belong."""
    return weights_home() / record.file, Path("models") / record.file


def _robustbench(record: ClassifierRecord, recipe: str) -> Path:
    places = robustbench_places(record)
    if found := next(filter(Path.is_file, places), None):
        return found
    raise WeightsError(
        f"the weights of RobustBench's '{record.name}' for {record.dataset} are missing; "
        f"{_looked_for(places)}",
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
    if file_digest(record.file) != record.sha256:
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


def _state(path: Path, stated: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Read the network's weights; a layer of mean and std before it must agree with the recipe's."""
    state, own = split_standardisation(read_state_dict(path))
    for key, values in own.items():
        wanted = stated[key]
        given = values * len(wanted) if len(values) == 1 else values
        if not np.allclose(given, wanted, atol=1e-4):
            raise WeightsError(
                f"{path} holds its own standardisation, with {key} {[round(one, 4) for one in given]}; "
                f"the recipe says {list(wanted)}",
                hint=f"give data.{key} that value",
            )
    return state


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse weights that would load without an error and compute something else."""
    if problem := recorded_problem(path):
        raise WeightsError(f"{path}: {problem}")
    header = read_header(path)
    for key, value in expected.items():
        # Files of other programs have no such keys, and pass.
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
    # The user's code may raise anything; the message must say whose code it was.
    except Exception as error:
        raise WeightsError(f"entry point '{name}' ({points[name].value}) failed: {error}") from error
    if not isinstance(built, nn.Module):
        raise WeightsError(f"entry point '{name}' returned a {type(built).__name__}, not a torch module")
    return built


def _frozen_checked(classifier: nn.Module, blueprint: Blueprint, name: str) -> nn.Module:
    classifier.eval().requires_grad_(False)
    sizes = {"classes": blueprint.classes, "channels": blueprint.channels, "image_size": blueprint.image_size}
    check_classifier(classifier, **sizes, name=name)
    return classifier


def _looked_for(places: Sequence[Path]) -> str:
    return f"looked for {' and '.join(map(str, places))}"


def check_classifier(
    classifier: nn.Module, *, classes: int, channels: int, image_size: int, name: str = "the classifier"
) -> None:
    """Check a classifier's interface by classifying one grey image.

    Args:
        classifier: (B, channels, H, W) images in [0, 1] to (B, C) logits, in evaluation mode.
        classes: C.
        channels: Channels of the images.
        image_size: Height and width of the images.
        name: What to call it in messages.

    Raises:
        RecipeError: If it fails on such an image, or returns anything but one finite logit per class.
    """
    # A module without parameters is taken for one on the CPU.
    parameter = next(classifier.parameters(), torch.empty(0))
    # Grey is in range for every classifier, and no data need be read.
    image = torch.full((1, channels, image_size, image_size), _GREY, device=parameter.device)
    try:
        with torch.no_grad():
            logits: object = classifier(image)
            changed = not bool((image == _GREY).all())
    # The user's code may raise anything; the message must say for which image.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RecipeError(
            f"{name} does not take {channels}x{image_size}x{image_size} images: {reason}",
            hint="data.channels and data.image_size must be those that it was trained on",
        ) from error
    if not isinstance(logits, Tensor):
        raise RecipeError(
            f"{name} returns a {type(logits).__name__}, not a tensor of logits",
            hint="wrap it in a module whose forward returns the logits alone",
        )
    if changed:
        raise RecipeError(
            f"{name} changes the images that it is given",
            hint="an operation in place works on its input: let it begin with images = images.clone()",
        )
    if logits.shape != (1, classes):
        raise RecipeError(
            f"{name} returns {tuple(logits.shape)} for one image; the recipe's {classes} classes need "
            f"(1, {classes})",
            hint="data.classes must be the number that it was trained on",
        )
    if not logits.isfinite().all():
        raise RecipeError(f"{name} returns logits that are NaN or infinite for a grey image")
