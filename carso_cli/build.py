"""From recipe sections to objects: the only place where a recipe's names become classes.

- `build_classifier`, `build_purifier`: one part each;
- `load_defence`: a trained run as a `Defence`, the way in from Python.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from carso_cli.attacks.gradient_sources import Model, are_probabilities, named_modules
from carso_cli.classifiers.architectures import Blueprint
from carso_cli.classifiers.given import GivenClassifier
from carso_cli.classifiers.layer_choice import default_layers
from carso_cli.classifiers.load import check_classifier, load_classifier
from carso_cli.classifiers.robustbench_zoo import ZOO, find_entry, load_zoo_model
from carso_cli.classifiers.weights import load_strict, require_finite
from carso_cli.data.datasets import load_split
from carso_cli.data.image_set import ImageSet, balanced_subset
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.representation import (
    RULE,
    extract_representation,
    module_shapes,
    overwrites_outputs,
)
from carso_cli.defence.vae import Purifier
from carso_cli.distributed.world import device_of_process
from carso_cli.errors import DataError, RecipeError, StateError, UsageError, WeightsError
from carso_cli.io.checksum import fingerprint
from carso_cli.io.json_files import read_json
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import AUTO, Recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.precision import set_tf32
from carso_cli.runtime.reporter import Reporter, SilentReporter

_LEVELS = 4


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:N` or `mps` into a device; under torchrun, into this process's own.

    Raises:
        UsageError: If the device is unknown or not present, or is one for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # First: under torchrun plain `cuda` is another GPU in each process.
    name = device_of_process(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps") from error
    # `torch.device` takes names and numbers of devices that are not there.
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= present.get(device.type, 0):
        raise UsageError(f"device '{name}' is not present here", hint="leave out --device to choose one")
    return device


def device_for(recipe: Recipe, name: str) -> torch.device:
    """Return the device of a name, set to the recipe's precision.

    Raises:
        UsageError: See `choose_device`; if the device does not have the precision.
    """
    device = choose_device(name)
    set_tf32(recipe.precision, device)
    return device


def build_classifier(recipe: Recipe, kind: str, device: torch.device | str = "cpu") -> nn.Module:
    """Load the recipe's classifier, trained as `at` or `clean`, frozen and in evaluation mode.

    Raises:
        RecipeError: If the recipe names no weights of this kind.
        WeightsError: If the weights are missing, damaged or of another architecture.
    """
    if recipe.classifier.family == "given":
        return _given_again(recipe, device)
    weights = recipe.classifier.at if kind == "at" else recipe.classifier.clean
    if weights is None:
        raise RecipeError(
            f"recipe '{recipe.name}' names no weights for classifier.{kind}",
            hint=f"train them with: carso train-classifier {recipe.reference} --kind {kind}, and name the "
            f"file in classifier.{kind}",
        )
    classifier = load_classifier(
        _blueprint(recipe),
        **weights.model_dump(),
        dataset=recipe.data.name,
        recipe=recipe.reference,
        kind=kind,
        folders=search_folders(recipe),
        of_run=recipe.file is not None and RunFolder(recipe.file.parent).purifier.is_file(),
    )
    classifier = classifier.to(device)
    return channels_last(classifier) if recipe.classifier.family == "wide-resnet" else classifier


def _given_again(recipe: Recipe, device: torch.device | str) -> nn.Module:
    """Load a given classifier that RobustBench's zoo has; no other is named by anything but code.

    Raises:
        RecipeError: If code is needed, which a recipe never names to be run.
    """
    given = recipe.classifier.given or ""
    if given.startswith(ZOO):
        entry = find_entry(given.removeprefix(ZOO), dataset=None, norm=None)
        return user_classifier(load_zoo_model(entry, reporter=SilentReporter()).to(device), recipe)
    raise RecipeError(
        f"the classifier of recipe '{recipe.name}' was given as {given or 'a model in Python'}, and a "
        "recipe never names code to be run",
        hint=f"name it yourself with --classifier {given or 'FILE.py:NAME'}, which `audit`, `predict` and "
        "`export` take; in Python, load_defence(run, classifier=model)",
    )


def build_second_classifier(recipe: Recipe, device: torch.device | str = "cpu") -> nn.Module | None:
    """Load the classifier of the reconstructions; None where it is the one that yields the representation.

    Raises:
        RecipeError, WeightsError: As `build_classifier`.
    """
    kind = recipe.evaluation.second_kind
    # None instead of a second copy: both instances are then one module in memory.
    return None if kind == recipe.representation.kind else build_classifier(recipe, kind, device)


def channels_last(module: nn.Module) -> nn.Module:
    """Store a module's convolutions channels-last, about twice as fast on CPUs at these sizes.

    Measured for our own architectures, and for them alone: others may be slower so, or fail, as `view` after
    a convolution does.
    """
    # torch declares no such form of `to`.
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def search_folders(recipe: Recipe) -> list[Path]:
    """Return the folders in which a recipe's relative paths are looked for, after the working directory.

    They are those around its file, three levels up, and the one in which a run was trained.
    """
    if recipe.file is None:
        return []
    inside = recipe.file.resolve().parent
    folders = [inside, *inside.parents][:_LEVELS]
    # A run that was moved alone has left its weights and images where they were.
    with suppress(StateError):
        trained_in = read_json(RunFolder(inside).environment).get("working_folder")
        folders += [Path(trained_in)] if isinstance(trained_in, str) else []
    return folders


def find_around(path: Path, recipe: Recipe) -> Path:
    """Return where a recipe's path lies: as given, or in one of `search_folders`; as given if in none."""
    places = (path, *(folder / path for folder in search_folders(recipe)))
    return next(filter(Path.exists, places), path)


def start_file(recipe: Recipe) -> Path:
    """Return the file of the purifier that training starts from, `training.initial`."""
    return find_around(Path(recipe.training.initial or "").expanduser(), recipe)


def untrained_classifier(recipe: Recipe) -> nn.Module:
    """Build the recipe's classifier with initial weights; that of an entry point has its own.

    Raises:
        RecipeError: If its architecture is unknown.
    """
    if recipe.classifier.family == "external":
        return build_classifier(recipe, recipe.representation.kind)
    return _blueprint(recipe).build()


def _blueprint(recipe: Recipe) -> Blueprint:
    section, data = recipe.classifier, recipe.data
    return Blueprint(
        family=section.family,
        architecture=section.architecture,
        options=section.architecture_options,
        depth=section.depth,
        width=section.width,
        activation=section.activation,
        classes=data.classes,
        channels=data.channels,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
    )


def user_classifier(classifier: Model, recipe: Recipe) -> nn.Module:
    """Freeze a classifier given in Python, checked against the recipe's images and classes.

    A function becomes a module; in a recipe of the family `given`, probabilities become logits.

    Raises:
        RecipeError: If it does not take the images, or returns anything but one logit per class.
    """
    data = recipe.data
    if not isinstance(classifier, nn.Module):
        roots = (part for name, part in named_modules(classifier).items() if "." not in name)
        classifier = GivenClassifier(classifier, parts=roots)
    classifier.eval().requires_grad_(False)
    check_classifier(classifier, classes=data.classes, channels=data.channels, image_size=data.image_size)
    if recipe.classifier.family == "given":
        # On the device of its weights, as `check_classifier` has tried.
        like = next(classifier.parameters(), torch.empty(0))
        grey = torch.full((1, data.channels, data.image_size, data.image_size), 0.5, device=like.device)
        with torch.no_grad():
            if are_probabilities(classifier(grey)):
                classifier = GivenClassifier(classifier, logarithm=True).eval()
    return classifier


def with_layers(recipe: Recipe, classifier: nn.Module) -> Recipe:
    """Return a recipe with `layers: auto` replaced by the layers that `carso extract --list` proposes.

    Raises:
        UsageError: If there are none in this classifier.
    """
    if recipe.representation.layers != (AUTO,):
        return recipe
    device = next(classifier.parameters(), torch.empty(0)).device
    size = recipe.data.image_size
    image = torch.zeros(1, recipe.data.channels, size, size, device=device)
    layers = default_layers(classifier, module_shapes(classifier, image))
    if not layers:
        raise UsageError(
            "representation.layers: auto finds no convolution that gives square maps in this classifier",
            hint="list its layers with: carso extract RECIPE --list, and name some",
        )
    section = recipe.representation.model_copy(update={"layers": layers})
    return recipe.model_copy(update={"representation": section})


def layer_shapes(classifier: nn.Module, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return layer name to the shape of its output for one image, without the batch axis."""
    # The user's own classifier may lie on a GPU, or have no parameters at all.
    device = next(classifier.parameters(), torch.empty(0)).device
    size = recipe.data.image_size
    with torch.no_grad():
        images = torch.zeros(1, recipe.data.channels, size, size, device=device)
        outputs = extract_representation(classifier, images, recipe.representation.layers)
    return {layer: tuple(output.shape[1:]) for layer, output in outputs.items()}


def build_purifier(recipe: Recipe, classifier: nn.Module) -> Purifier:
    """Build an untrained purifier for the recipe's layers of a classifier, on torch's default device."""
    data = recipe.data
    return Purifier(
        layer_shapes(classifier, recipe),
        channels=data.channels,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        **recipe.purifier.model_dump(),
    )


def data_root(recipe: Recipe) -> Path | None:
    """Return the folder that `data.root` names; None where it is left out."""
    return find_around(Path(recipe.data.root).expanduser(), recipe) if recipe.data.root else None


def load_images(
    recipe: Recipe, split: str, *, limit: int | None = None, reporter: Reporter | None = None
) -> ImageSet:
    """Load one split of the recipe's data, cut to a class-balanced subset of `limit` images."""
    data, folders = recipe.data, search_folders(recipe)
    if data.name == "given":
        raise DataError(
            f"the images of recipe '{recipe.name}' were handed over, and cannot be loaded again",
            hint="carso audit RUN --data IMAGES names images for a run",
        )
    root = data_root(recipe)
    images = load_split(
        data.name,
        "train" if split == "train" else "test",
        classes=data.classes,
        channels=data.channels,
        image_size=data.image_size,
        root=root,
        folders=folders,
        source=data.train if split == "train" else data.test,
        other_source=data.test if split == "train" else data.train,
        reporter=reporter or SilentReporter(),
    )
    if split == "train" and data.train_limit is not None:
        # First, so that `limit` cuts what the recipe trains on, not the whole split.
        images = balanced_subset(images, data.train_limit, recipe.seed)
    return images if limit is None else balanced_subset(images, limit, recipe.seed)


def load_defence(
    run: str | Path,
    *,
    device: str = "auto",
    n_samples: int | None = None,
    aggregation: str | None = None,
    classifier: Model | None = None,
) -> Defence:
    """Load a trained run as a defended model.

    Args:
        run: Run folder of `carso train-purifier`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        n_samples: N, reconstructions per image; the recipe's when None.
        aggregation: Aggregation rule; the recipe's when None.
        classifier: The classifier that the purifier was trained for, if it is not one that the recipe names.

    Returns:
        The defence, frozen: `defence(images)` gives log P, (B, C), for images in [0, 1].

    Raises:
        StateError: If the run is absent, unfinished or damaged, or its purifier has other layers.
        WeightsError: If the classifier's weights are missing, or not those of training.
    """
    folder = RunFolder(Path(run))
    # Asked first: of an unfinished run this says how to go on, where loading would only fail.
    path = folder.require_purifier(f"carso train-purifier RECIPE --run {run}")
    recipe = load_recipe(str(folder.recipe))
    target = device_for(recipe, device)
    if classifier is None:
        classifier = build_classifier(recipe, recipe.representation.kind)
    else:
        classifier = user_classifier(classifier, recipe)
    defence = Defence(
        classifier,
        load_purifier(path, recipe, classifier),
        recipe.representation.layers,
        n_samples=n_samples or recipe.evaluation.n_samples,
        aggregation=aggregation or recipe.evaluation.aggregation,
        second_classifier=build_second_classifier(recipe),
        precision=recipe.precision,
    )
    return defence.to(target)


def load_purifier(path: Path, recipe: Recipe, classifier: nn.Module) -> Purifier:
    """Read a trained purifier's weights, strictly, into the recipe's architecture.

    An inference-only file (`carso import-release`) gives a purifier without its encoder.

    Raises:
        StateError: If the file is damaged or was made for other layers or sizes.
        WeightsError: If the classifier is not the one it was trained for, or a weight is NaN or infinite.
    """
    tensors, metadata = load_tensors(path)
    # The checksum only proves that these are the values that were stored.
    require_finite(tensors, path)
    if "layers" not in metadata or "classifier" not in metadata:
        raise StateError(f"{path} does not say what it was trained for: it is no purifier of carso")
    # The order of layers counts too: representations are concatenated in it.
    if tuple(metadata["layers"]) != recipe.representation.layers:
        raise StateError(f"{path} was trained on layers {metadata['layers']}, not on those of its recipe")
    checksum = classifier_fingerprint(classifier)
    if metadata["classifier"] != checksum:
        raise WeightsError(
            f"{path} was trained for a classifier with checksum {metadata['classifier'][:12]}; "
            f"the one loaded has {checksum[:12]}",
            hint="put the classifier's original weights back, or train a purifier for these",
        )
    purifier = build_purifier(recipe, classifier)
    # Building it has run the classifier, which shows whether the two rules differ.
    if metadata.get("representation", 1) < RULE and overwrites_outputs(classifier):
        raise StateError(
            f"{path} was trained by a version that recorded layer outputs after the classifier had written "
            "into them; it does not fit what is recorded now",
            hint="train the purifier again",
        )
    if metadata.get("inference_only"):
        # Before loading, which is strict: keys of an encoder would be missing.
        purifier.drop_encoder()
    try:
        load_strict(purifier, tensors, path, keys="purifier")
    # Files of one run disagree with each other: no weights are to be fetched.
    except WeightsError as error:
        hint = "its recipe.yaml was changed after training; undo that"
        raise StateError(error.message, hint=hint) from None
    channels_last(purifier)
    return purifier


def classifier_fingerprint(classifier: nn.Module) -> str:
    """Return the SHA-256 of a classifier's weights and buffers."""
    return fingerprint(classifier.state_dict())
