"""From a recipe's classifier section, as plain arguments, to a frozen classifier.

Every classifier takes (B, channels, H, W) images in [0, 1], standardises them itself, and returns (B, C)
logits. Weights are looked for where the recipe says, then in CARSO_HOME's `weights` folder; RobustBench's
in the layout in which RobustBench caches them, `<folder>/<dataset>/Linf/<name>.pt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from torch import nn

from carso_cli.classifiers.registry import ROBUSTBENCH, SHIPPED, SHIPPED_FOLDER, ClassifierRecord, find_record
from carso_cli.classifiers.weights import load_strict, read_state_dict
from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.errors import RecipeError, WeightsError, nearest
from carso_cli.home import weights_home

ENTRY_POINT_GROUP = "carso.classifiers"
_DRIVE = "https://drive.google.com/file/d/"


def load_classifier(
    *,
    family: str,
    depth: int,
    width: int,
    activation: str,
    classes: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    source: str,
    name: str | None,
    file: str | None,
    dataset: str,
    training_command: str,
) -> nn.Module:
    """Load a classifier, frozen and in evaluation mode.

    Args:
        family: `wide-resnet`, or `external` for a module that an entry point builds.
        depth: Depth of the WideResNet.
        width: Width of the WideResNet.
        activation: `relu` or `silu`.
        classes: C.
        channels: 1 or 3.
        mean: Per-channel mean of the data set.
        std: Per-channel standard deviation of the data set.
        source: `shipped`, `robustbench`, `file` or `entry-point`.
        name: Name of a shipped, RobustBench or entry-point classifier.
        file: Weights file, for source `file`.
        dataset: Name of the data set.
        training_command: The command that trains these weights, for the message when they are missing.

    Raises:
        RecipeError: If the name is unknown, or the architecture is not the named one's.
        WeightsError: If the weights are missing, damaged or of another architecture.
    """
    if source == "entry-point" or family == "external":
        return _frozen(_from_entry_point(name or "", family, source))
    if source == "file":
        path = find_weights(file or "", training_command)
    else:
        record = find_record(SHIPPED if source == "shipped" else ROBUSTBENCH, name or "", dataset)
        _check_architecture(record, depth, width, activation)
        path = _shipped(record) if source == "shipped" else _robustbench(record)
    classifier = WideResNet(
        depth=depth,
        width=width,
        classes=classes,
        activation=activation,
        mean=mean,
        std=std,
        channels=channels,
    )
    load_strict(classifier, read_state_dict(path), path)
    return _frozen(classifier)


def find_weights(file: str, training_command: str) -> Path:
    """Find a weights file: as given, then in CARSO_HOME's weights.

    Raises:
        WeightsError: Saying where it was looked for and how to get it.
    """
    places = [Path(file).expanduser(), weights_home() / file]
    return _first_existing(
        places, f"the classifier's weights '{file}' are missing", f"train them with: {training_command}"
    )


def _first_existing(places: Iterable[Path], problem: str, hint: str) -> Path:
    tried = list(places)
    for path in tried:
        if path.is_file():
            return path
    raise WeightsError(f"{problem}; looked for {' and '.join(str(path) for path in tried)}", hint=hint)


def _shipped(record: ClassifierRecord) -> Path:
    path = SHIPPED_FOLDER / f"{record.name}.safetensors"
    return _first_existing(
        [path], f"the shipped classifier '{record.name}' is missing", "install carso again"
    )


def _robustbench(record: ClassifierRecord) -> Path:
    relative = Path(record.dataset) / "Linf" / f"{record.name}.pt"
    places = [weights_home() / relative, Path("models") / relative]
    return _first_existing(
        places,
        f"the weights of RobustBench's '{record.name}' for {record.dataset} are missing",
        f"download {_DRIVE}{record.gdrive_id} and save it as {places[0]}",
    )


def _check_architecture(record: ClassifierRecord, depth: int, width: int, activation: str) -> None:
    seen = (depth, width, activation)
    if seen != (record.depth, record.width, record.activation):
        raise RecipeError(
            f"'{record.name}' is a WideResNet-{record.depth}-{record.width} with {record.activation}; "
            f"the recipe says depth {depth}, width {width}, {activation}",
            hint="give classifier.depth, classifier.width and classifier.activation these values",
        )


def _from_entry_point(name: str, family: str, source: str) -> nn.Module:
    if family != "external" or source != "entry-point":
        raise RecipeError("classifier.family 'external' and source 'entry-point' go together")
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        raise RecipeError(
            f"no installed package offers a classifier '{name}' as an entry point of {ENTRY_POINT_GROUP}. "
            f"{nearest(name, points) or 'Offered are: ' + (', '.join(points) or 'none')}",
            hint="install the package that defines it into this environment",
        )
    built = points[name].load()()
    if not isinstance(built, nn.Module):
        raise WeightsError(f"entry point '{name}' returned {type(built).__name__}, not a torch module")
    return built


def _frozen(classifier: nn.Module) -> nn.Module:
    return classifier.eval().requires_grad_(False)
