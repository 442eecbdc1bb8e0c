"""What is audited, as it is named on a command line: a model and what it was made from.

    target = load_target("model.py:build", reporter=reporter)
    target.model(images)

- `FILE.py:NAME`, `PACKAGE.MODULE:NAME`: code of the user, which is run (`carso_cli.tools.user_code`);
- a run folder: its defence, asked for the scores that are attacked (the exact view);
- a recipe, by path or by name: the defence of its run where that is trained, else its classifier;
- `robustbench:NAME`, `robustbench:cifar10/Linf/NAME`: RobustBench's model zoo.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.attacks.model_parts import Model, named_modules
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.build import build_classifier, load_defence, load_images
from carso_cli.classifiers.robustbench_zoo import ZOO, find_entry, load_zoo_model
from carso_cli.data.arrays import read_arrays
from carso_cli.data.labelled_images import LabelledImages, describe, load_labelled
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import CarsoError, DataError, RecipeError, UsageError, nearest
from carso_cli.io.checksum import file_digest, fingerprint
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import list_recipes
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.tools.user_code import load_user_model, split_reference

_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl", ".h5", ".onnx", ".npz", ".npy", ".tar")
_FORMS = (
    "name FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, a run folder, a recipe, or robustbench:NAME; "
    "`carso recipes ls` lists recipes"
)


@dataclass(frozen=True, eq=False)
class Target:
    """A model to be audited.

    Args:
        name: What was named.
        model: (B, channels, H, W) images in [0, 1] to (B, classes) scores; frozen, in evaluation mode.
        identity: What tells it from others: kind, checksum of its weights, checksum of its code file.
        recipe: The recipe, of a run or recipe; its test images may be used.
        dataset: The data set it was made for, where that is known.
    """

    name: str
    model: Model
    identity: dict[str, str | None]
    recipe: Recipe | None = None
    dataset: str | None = None

    @property
    def audited(self) -> Model | RandomDefence:
        """What an audit takes: of a run the defence itself, which it attacks in a fraction of the time."""
        return self.model.defence if isinstance(self.model, ExactView) else self.model


class ExactView(nn.Module):
    """A defence as a model of one argument: images to the scores that are attacked.

    Args:
        defence: The defence; each call draws latents afresh.
    """

    def __init__(self, defence: Defence) -> None:
        super().__init__()
        self.defence = defence
        super().train(False)

    def train(self, mode: bool = True) -> ExactView:
        """Stay in evaluation mode, as the defence does."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images in [0, 1] to (B, C) scores."""
        scores: Tensor = self.defence(images, view="exact")
        return scores


def load_target(
    text: str,
    *,
    reporter: Reporter,
    data: str | None = None,
    norm: str | None = None,
    device: str = "auto",
    classifier: str | None = None,
    bare: bool = False,
) -> Target:
    """Load what a command line names.

    Args:
        text: See the module.
        reporter: Where progress and notes go.
        data: Name of the data set that is attacked, which tells models of RobustBench of one name apart.
        norm: `linf` or `l2`, likewise.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, for a run's defence.
        classifier: What names a run's classifier, where its recipe names none.
        bare: Take the classifier without its purifier, of a run or recipe too.

    Raises:
        UsageError: If it names nothing, or the code that it names fails or gives no model.
        StateError: If a run is unfinished or damaged.
        MissingError: If weights are missing, damaged, or could only be read by running code.
    """
    path = Path(os.path.expanduser(text))
    if text.startswith(ZOO):
        entry = find_entry(text.removeprefix(ZOO), dataset=data, norm=norm)
        model = load_zoo_model(entry, reporter=reporter)
        return Target(
            f"{ZOO}{entry.reference}",
            model,
            {"kind": "robustbench", "weights": weights_checksum(model), "code": None},
            dataset=entry.dataset,
        )
    if path.is_dir():
        return _run(path, text, reporter, device, classifier, bare)
    if (reference := split_reference(text)) is not None:
        given, file = load_user_model(reference, reporter=reporter)
        code = None if file is None else file_digest(file)
        return Target(text, given, {"kind": "code", "weights": weights_checksum(given), "code": code})
    if path.suffix == ".py":
        raise UsageError(
            f"{text} names a file and nothing in it",
            hint=f"write {text}:NAME, where NAME is a function or class that returns the model",
        )
    if path.suffix.lower() in _WEIGHTS and path.is_file():
        raise UsageError(
            f"{text} is a file of weights, and holds no code of the model that they belong to",
            hint="name a function of a Python file that builds the model, loads them with torch.load(FILE, "
            "weights_only=True) or safetensors, and returns it: carso audit model.py:build",
        )
    return _recipe(text, reporter, device, bare)


def given_classifier(text: str | None, *, reporter: Reporter) -> Model | None:
    """Return the classifier that `--classifier` names; None where it is not given."""
    return None if text is None else load_target(text, reporter=reporter).model


def _run(
    path: Path,
    text: str,
    reporter: Reporter,
    device: str,
    classifier: str | None = None,
    bare: bool = False,
) -> Target:
    folder = RunFolder(path)
    if not folder.recipe.is_file() and not folder.purifier.is_file():
        raise UsageError(f"{text} is a folder, and no run of carso: it has no recipe.yaml", hint=_FORMS)
    if bare:
        return _classifier(text, load_recipe(str(folder.recipe.resolve())))
    folder.require_purifier(f"carso train-purifier RECIPE --run {path}")
    given = given_classifier(classifier, reporter=reporter)
    model = ExactView(load_defence(path, device=device, classifier=given))
    identity = {"kind": "defence", "weights": weights_checksum(model), "code": None}
    recipe = load_recipe(str(folder.recipe.resolve()))
    reporter.info(f"{text}: the defence of recipe '{recipe.name}', N = {model.defence.n_samples}")
    return Target(text, model, identity, recipe, recipe.data.name)


def _recipe(text: str, reporter: Reporter, device: str, bare: bool) -> Target:
    try:
        recipe = load_recipe(text)
    except RecipeError as error:
        if Path(text).exists() or text.endswith((".yaml", ".yml")):
            raise
        suggestion = nearest(text, [recipe.name for recipe in list_recipes()])
        hint = "; ".join(filter(None, (suggestion, _FORMS)))
        raise UsageError(f"TARGET '{text}' is no file, no run and no recipe", hint=hint) from error
    run = Path(recipe.run_folder)
    if bare:
        return _classifier(text, recipe)
    if RunFolder(run).purifier.is_file():
        return replace(_run(run, str(run), reporter, device), name=text)
    found = _classifier(text, recipe)
    reporter.info(f"recipe '{recipe.name}': {run} holds no trained purifier; its classifier is audited")
    return found


def _classifier(text: str, recipe: Recipe) -> Target:
    """Return the classifier whose representation a recipe reads."""
    model = build_classifier(recipe, recipe.representation.kind)
    identity = {"kind": "classifier", "weights": weights_checksum(model), "code": None}
    return Target(text, model, identity, recipe, recipe.data.name)


def weights_checksum(model: Model) -> str | None:
    """Return the SHA-256 of all weights and buffers that a model or function uses; None where it has none."""
    tensors: dict[str, Tensor] = dict(model.state_dict()) if isinstance(model, nn.Module) else {}
    if not isinstance(model, nn.Module):
        for name, module in named_modules(model).items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict(keep_vars=True).items()}
    plain = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    return fingerprint(plain) if plain else None


def load_target_images(
    source: str | None,
    target: Target,
    *,
    reporter: Reporter,
    limit: int | None = None,
    resize: int | None = None,
    seed: int = 0,
) -> LabelledImages:
    """Load the images to attack, with the channels that the target takes.

    Args:
        source: See `carso_cli.data.labelled_images.load_labelled`; None means the target's own test images.
        target: The target.
        reporter: Where progress and notes go.
        limit: Only so many images, class-balanced.
        resize: Side of the square that images are cropped and resized to.
        seed: Seed of the choice.

    Raises:
        UsageError: If nothing is named and the target knows no images, or it takes none of this form.
        DataError: If the images are missing or damaged.
    """
    recipe = target.recipe
    if source is None and recipe is None:
        raise UsageError(
            f"{target.name} says nothing about its images",
            hint="name them with --data: a folder, a zip or array file, or a data set such as cifar10",
        )
    if recipe is not None and resize is None and source in (None, recipe.data.name):
        # The recipe says where its images lie and what size they have.
        own = load_images(recipe, "test", limit=limit, reporter=reporter)
        found = LabelledImages(own.images, own.labels, own.indices, own.classes, recipe.data.name)
    else:
        assert source is not None
        found = load_labelled(source, reporter=reporter, limit=limit, resize=resize, seed=seed)
    fitted = fit_channels(found, target)
    if fitted.images.shape[1] < found.images.shape[1]:
        reporter.info(f"{target.name} takes 1 channel; the images have 3 equal ones, of which 1 is kept")
    elif fitted.images.shape[1] > found.images.shape[1]:
        reporter.info(f"{target.name} takes 3 channels; the grey images are shown in each of them")
    reporter.info(f"{fitted.source}: {describe(fitted)}")
    return fitted


def fit_channels(found: LabelledImages, target: Target) -> LabelledImages:
    """Return images that the target takes: grey ones with 1 channel or 3, whichever it takes.

    Raises:
        UsageError: If it takes neither; the message names the shape and what the model said.
    """
    problem = _problem(target.model, found.pixels[:2])
    if problem is None:
        return found
    if found.grey:
        other = found.with_channels(4 - found.images.shape[1])
        if _problem(target.model, other.pixels[:2]) is None:
            return other
    shape = " x ".join(map(str, found.images.shape[1:]))
    raise UsageError(
        f"{target.name} fails on images of {shape} (channels x height x width): {problem}",
        hint="--resize N gives images of NxN pixels; the model must take (B, channels, height, width)",
    )


def load_target_examples(path: Path, images: LabelledImages, *, reporter: Reporter) -> Tensor:
    """Load examples that were made elsewhere for these images, in the order of their source.

    Args:
        path: A file of arrays (`carso_cli.data.arrays`), labels or none; `carso attack` writes such a file.
        images: The images: all of their source, or a choice of them.
        reporter: Told what was decided where the file leaves it open.

    Returns:
        float32 (M, channels, H, W) in [0, 1], an example for each image.

    Raises:
        DataError: If the file is damaged, or its examples are not one for each image, of the same shape.
    """
    found = read_arrays(path, reporter=reporter, needs_labels=False).images
    whole = int(images.indices.max()) + 1
    # As many as are attacked: made for the choice. Otherwise they are for the whole source.
    taken = found if len(found) == len(images) else found[images.indices] if len(found) >= whole else found
    if taken.shape[1] == 3 and images.images.shape[1] == 1 and bool((taken == taken[:, :1]).all()):
        taken = taken[:, :1]
    if taken.shape != images.images.shape:
        raise DataError(
            f"{path} holds examples of shape {tuple(found.shape)}; the images are "
            f"{tuple(images.images.shape)}",
            hint="an example for each image of --data is needed, in the same order and of the same size",
        )
    return taken / 255.0 if taken.dtype == torch.uint8 else taken


@torch.no_grad()
def _problem(model: Model, images: Tensor) -> str | None:
    """Return what a model says against images of a form; None where it takes them."""
    modules: dict[str, Any] = named_modules(model)
    tensor = next(
        (each for module in modules.values() for each in (*module.parameters(), *module.buffers())), images
    )
    try:
        # A copy, where there is one: a model that remembers its calls is met fresh by the audit.
        asked = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        asked(images.to(tensor.device))
    except CarsoError as error:
        return error.message
    # The code of others may fail in any way; the user needs to know on what.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
