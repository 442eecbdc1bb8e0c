"""Import a purifier that the paper's authors publish as a run, and export a run in their format.

They publish three safetensors files, `<model>_<dataset>_<reference>_<part>.safetensors`, which hold what
inference needs and no encoder; the key map is `carso_cli.defence.release_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli import __version__
from carso_cli.build import build_classifier, build_purifier, classifier_fingerprint
from carso_cli.classifiers.weights import read_header, read_tensors
from carso_cli.defence.release_format import PUBLISHED_PARTS, from_release, to_release
from carso_cli.errors import UsageError, WeightsError, nearest
from carso_cli.io.checksum import file_digest
from carso_cli.io.json_files import ensure_folder, write_json
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runs.description import describe_environment, write_recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter

# Buffers of batch normalisation, which are not parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OWN_FOLDER = "put the three files of one published purifier into a folder of their own"


def import_release(folder: Path, recipe: Recipe, *, run: Path, reporter: Reporter) -> dict[str, Any]:
    """Import a published purifier, for the recipe's classifier, into a new run folder.

    Args:
        folder: Where the three files lie, one of each part.
        recipe: Which classifier, layers and sizes they are for.
        run: Run folder; it may hold no run yet.
        reporter: Where progress goes.

    Returns:
        `run`, `files` (part to path), `sha256` (part to checksum), `parameters` and `classifier` (checksum).

    Raises:
        UsageError: If the run folder already holds a run.
        WeightsError: If a file is missing, damaged or there more than once, if the classifier's weights
            are missing, or if a tensor is missing, unexpected or of another shape; all are listed.
    """
    target = RunFolder(run)
    # A purifier alone is no run: an import that was cut short leaves one, and may be repeated.
    if target.recipe.is_file() or target.trained_here:
        raise UsageError(f"{run} already holds a run", hint="choose another folder with --run DIR")
    files = find_release(folder)
    reporter.info(f"reading {', '.join(path.name for path in files.values())}")
    published = {part: read_tensors(path) for part, path in files.items()}
    classifier = build_classifier(recipe, recipe.representation.kind)
    checksum = classifier_fingerprint(classifier)
    _check_classifier(files, checksum)
    # Names, shapes and types are enough: on `meta` the weights take neither memory nor time.
    with torch.device("meta"):
        expected = build_purifier(recipe, classifier).state_dict()
    # Before the keys are renamed: `from_release` raises KeyError for one that it does not know.
    _check(published, expected, recipe, folder)
    tensors = {
        key: tensor.to(expected[key].dtype)
        for part in PUBLISHED_PARTS
        for key, tensor in from_release(part, published[part]).items()
    }
    checksums = {part: file_digest(path) for part, path in files.items()}
    metadata = {
        "inference_only": True,
        "recipe_name": recipe.name,
        "layers": list(recipe.representation.layers),
        "classifier": checksum,
        "imported_from": {files[part].name: checksums[part] for part in PUBLISHED_PARTS},
        "version": __version__,
    }
    ensure_folder(run)
    write_json(target.environment, describe_environment(torch.device("cpu")))
    save_tensors(target.purifier, tensors, metadata)
    # Last, since it makes the folder a run: an import that was cut short can be repeated.
    write_recipe(target, recipe)
    return {
        "run": str(run),
        "files": {part: str(path) for part, path in files.items()},
        "sha256": checksums,
        "parameters": sum(t.numel() for key, t in tensors.items() if not key.endswith(_STATISTICS)),
        "classifier": checksum,
    }


def export_release(run: Path, out: Path, *, name: str) -> dict[str, Path]:
    """Write a trained run's purifier in the authors' format, without its encoder.

    Args:
        run: Run folder of `carso train-purifier`.
        out: Folder to write to; it is made.
        name: `<model>_<dataset>_<reference>`, the common beginning of the file names.

    Returns:
        Part to file.

    Raises:
        StateError: If the run holds no purifier, or a damaged one.
        UsageError: If a fraction of the input is mixed in, which that format cannot express.
        CarsoError: If the files cannot be written.
    """
    purifier = RunFolder(run).require_purifier(f"carso train-purifier RECIPE --run {run}")
    share = load_recipe(str(RunFolder(run).recipe.resolve())).purifier.input_share
    if share:
        raise UsageError(
            f"{run} mixes {share:g} of the input into what it classifies; the published format cannot say so"
        )
    state, metadata = load_tensors(purifier)
    ensure_folder(out)
    files = {part: out / f"{name}_{part}.safetensors" for part in PUBLISHED_PARTS}
    for part, path in files.items():
        save_tensors(path, to_release(part, state), {"part": part, "classifier": metadata["classifier"]})
    return files


def find_release(folder: Path) -> dict[str, Path]:
    """Find the three files of one published purifier by the ends of their names.

    Returns:
        Part to file, in the order of `PUBLISHED_PARTS`.

    Raises:
        WeightsError: If the folder is absent, holds no or more than one file of a part, or files of
            different purifiers.
    """
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise WeightsError(f"{folder} is no folder", hint=nearest(folder.name, siblings))
    found = {part: sorted(folder.glob(f"*_{part}.safetensors")) for part in PUBLISHED_PARTS}
    problems = [
        f"_{part}.safetensors: "
        + (f"{len(paths)} files, {', '.join(path.name for path in paths)}" if paths else "none")
        for part, paths in found.items()
        if len(paths) != 1
    ]
    if problems:
        raise WeightsError(
            f"{folder} must hold exactly one file for each ending; it does not for\n" + "\n".join(problems),
            hint=_OWN_FOLDER,
        )
    files = {part: paths[0] for part, paths in found.items()}
    names = sorted({path.name.removesuffix(f"_{part}.safetensors") for part, path in files.items()})
    if len(names) > 1:
        message = f"{folder} holds files of different purifiers: {', '.join(names)}"
        raise WeightsError(message, hint=_OWN_FOLDER)
    return files


def _check_classifier(files: Mapping[str, Path], checksum: str) -> None:
    for path in files.values():
        # Only files of `export_release` name their classifier; the authors' name none.
        stated = read_header(path).get("classifier", checksum)
        if stated != checksum:
            raise WeightsError(
                f"{path} is for a classifier with checksum {stated[:12]}; the recipe's has {checksum[:12]}",
                hint="put the weights back that the purifier was trained with",
            )


def _check(
    published: Mapping[str, Mapping[str, Tensor]],
    expected: Mapping[str, Tensor],
    recipe: Recipe,
    folder: Path,
) -> None:
    """Compare names and shapes part by part, under the names that the files use."""
    problems: list[str] = []
    for part, tensors in published.items():
        wanted = to_release(part, expected)
        faults = {
            "missing": [key for key in wanted if key not in tensors],
            "unexpected": [key for key in tensors if key not in wanted],
            "of another shape": [
                f"{key} is {tuple(tensors[key].shape)}, not {tuple(wanted[key].shape)}"
                for key in wanted
                if key in tensors and tensors[key].shape != wanted[key].shape
            ],
        }
        problems += [
            f"{part}: {len(keys)} {fault}: {', '.join(keys)}" for fault, keys in faults.items() if keys
        ]
    if problems:
        raise WeightsError(
            f"the files in {folder} do not fit recipe '{recipe.name}':\n" + "\n".join(problems),
            hint=_explain(published, recipe),
        )


def _explain(published: Mapping[str, Mapping[str, Tensor]], recipe: Recipe) -> str:
    """Say which sizes the files have where they differ from the recipe's, as far as the tensors show them."""
    compressors, compressor, decoder = (published[part] for part in PUBLISHED_PARTS)
    layers = len({key.partition(".")[0] for key in compressors})
    # Linear weights are (out, in): the compressor's rows are the features of the condition.
    features = _length(compressor, "1.0.weight", 0)
    # The decoder's first layer takes latents and condition side by side.
    inputs = _length(decoder, "0.1.weight", 1)
    latents = inputs - features if inputs is not None and features is not None else None
    # Weights of a transposed convolution are (in, out, height, width).
    channels = _length(decoder, "5.weight", 1)
    sizes = (
        ("representation.layers", layers, len(recipe.representation.layers)),
        ("purifier.condition_features", features, recipe.purifier.condition_features),
        ("purifier.latent_features", latents, recipe.purifier.latent_features),
        ("data.channels", channels, recipe.data.channels),
    )
    differing = [
        f"{key}: {theirs} in the files, {ours} in the recipe"
        for key, theirs, ours in sizes
        if theirs not in (None, ours)
    ]
    return "; ".join(differing) or "use the recipe of the classifier and data set that the file names state"


def _length(tensors: Mapping[str, Tensor], key: str, axis: int) -> int | None:
    """Return a tensor's length along an axis; None if it or the axis is not there."""
    return tensors[key].shape[axis] if key in tensors and tensors[key].ndim > axis else None
