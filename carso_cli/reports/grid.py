"""Reconstructions of stored adversarial examples, for a report's picture grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from carso_cli.build import load_defence
from carso_cli.defence.answer import classify
from carso_cli.pictures.grids import decision_caption
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder

_IMAGES = 6
_SAMPLES = 8
_PREFERRED = ("pgd-eot", "apgd-ce", "pgd")


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows of a picture grid.

    Args:
        rows: Heading and images (B, channels, H, W) in [0, 1].
        captions: One per column.
        caption: What it was drawn from.
    """

    rows: list[tuple[str, Tensor]]
    captions: list[str]
    caption: str


def reconstruction_grid(run: Path, device: str) -> Grid | None:
    """Return inputs, perturbed inputs, samples and their mean for examples that `carso attack` stored.

    Returns:
        None where the run has no trained purifier, or no examples against its defence.

    Raises:
        CarsoError: If the examples or the run's models cannot be loaded.
    """
    folder = RunFolder(run)
    stored = sorted((run / "attacks").glob("*-defence.safetensors"), key=_preference)
    if not stored or not folder.purifier.is_file():
        return None
    tensors, metadata = load_tensors(stored[0])
    recipe = load_recipe(str(folder.recipe.resolve()))
    names = class_names(folder, recipe)
    defence = load_defence(run, device=device, n_samples=_SAMPLES)
    images, perturbed = tensors["images"][:_IMAGES], tensors["adversarial"][:_IMAGES]
    seed = int(metadata["seed"])
    before, after = classify(defence, images, seed), classify(defence, perturbed, seed)
    rows = [("input", images), ("perturbed", perturbed)]
    rows += [(f"sample {number + 1}", after.reconstructions[:, number]) for number in range(_SAMPLES)]
    rows.append(("mean", after.reconstructions.mean(dim=1)))
    rows.append(("mean,\nunperturbed", before.reconstructions.mean(dim=1)))
    captions = [
        decision_caption(names[label], names[said])
        for label, said in zip(tensors["labels"][:_IMAGES].tolist(), after.decision.tolist(), strict=True)
    ]
    caption = (
        f"Above each column: label > decision of the defence on the perturbed image, N = {_SAMPLES}. "
        f"From {stored[0]}: {metadata['attack']}, eps {metadata['eps']:.4g} under {metadata['norm']}, "
        f"seed {seed}. The samples are those of the perturbed image."
    )
    return Grid(rows, captions, caption)


def _preference(path: Path) -> tuple[int, str]:
    name = path.name.removesuffix("-defence.safetensors")
    return (_PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)), name
