"""The whole method in a few minutes: train on digits, attack, look at the reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli.build import load_defence
from carso_cli.defence.defended_model import Defence
from carso_cli.evaluation.attack import attack
from carso_cli.evaluation.run import evaluate
from carso_cli.pictures.grids import Row, save_grid
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import generator
from carso_cli.training.purifier import train_purifier

# Fewer attack steps and scoring draws than the recipe's, so that all ends within three minutes.
_BUDGET = ("evaluation.pgd_steps=10", "evaluation.pgd_step_size=0.025", "evaluation.scoring_draws=5")
_IMAGES = 100
_SHOWN = 10
_SAMPLES_SHOWN = 3


def quickstart(*, run: Path, reporter: Reporter, device: str = "auto") -> dict[str, Any]:
    """Train the digits purifier, attack classifier and defence by PGD, and draw a picture.

    A purifier that is already trained in `run` is used again; an interrupted training is resumed.

    Args:
        run: Run folder.
        reporter: Where progress goes.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Returns:
        The summary of the evaluation, with `picture` and, when it was trained here, `training`.

    Raises:
        CarsoError: As `train_purifier`, `evaluate` and `attack` do.
    """
    folder = RunFolder(run)
    recipe = load_recipe("digits", _BUDGET)
    training: dict[str, Any] | None = None
    if not folder.purifier.is_file():
        reporter.info("training the purifier on digits")
        # The recipe as shipped: the smaller budget is for the evaluation and must not mark the run.
        training = train_purifier(
            load_recipe("digits"), run=run, reporter=reporter, resume=folder.recipe.is_file(), device=device
        )
    reporter.info(f"attacking classifier and defence by PGD on {_IMAGES} test images")
    # `force`: a stored result of an earlier quickstart is no reason to refuse.
    summary = evaluate(
        recipe, run=run, reporter=reporter, attack="pgd", limit=_IMAGES, device=device, force=True
    )
    found = attack(recipe, run=run, reporter=reporter, name="pgd", limit=_SHOWN, device=device)
    tensors, _ = load_tensors(Path(found["out"]))
    picture = run / "quickstart.png"
    _draw(picture, load_defence(run, device=device), tensors, class_names(folder, recipe))
    return {**summary, "picture": str(picture), "training": training}


@torch.no_grad()
def _draw(path: Path, defence: Defence, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Draw inputs and perturbed inputs with decisions, each above a few of their reconstructions."""
    images, perturbed = tensors["images"], tensors["adversarial"]
    device = defence.purifier.mean.device
    # The same latents for both inputs, so that the perturbation alone makes the difference.
    latents = defence.draw_latents(len(images), _SAMPLES_SHOWN, generator(0, "picture"))
    rows = []
    for heading, inputs, framed in (("clean", images, False), ("perturbed\n(PGD)", perturbed, True)):
        samples = defence.purify(inputs.to(device), latents=latents)
        decided = defence(inputs.to(device), latents=latents, view="exact").argmax(dim=1)
        rows.append(Row(heading, inputs, [names[place] for place in decided.tolist()], framed))
        rows += [Row(f"sample {n + 1}", samples[:, n], (), framed) for n in range(_SAMPLES_SHOWN)]
    save_grid(path, rows, [names[label] for label in tensors["labels"].tolist()])
