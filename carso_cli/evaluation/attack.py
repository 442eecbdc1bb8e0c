"""Make adversarial examples and save them: tensors with metadata, and a picture.

    attack(recipe, run=Path("runs/digits"), reporter=reporter, name="pgd-eot", target="defence", limit=64)

writes `runs/digits/attacks/pgd-eot-defence.safetensors` and `.png`. Image files have no labels: the target's
decision on the unperturbed image takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from carso_cli import __version__
from carso_cli.attacks.registry import PROTOCOLS
from carso_cli.data.decode import read_images
from carso_cli.data.image_set import ImageSet
from carso_cli.distributed.world import World, join
from carso_cli.errors import UsageError
from carso_cli.evaluation.attack_batch import AttackResult, Setting, perturb, run_blocks, select_worst
from carso_cli.evaluation.protocols import Job
from carso_cli.evaluation.scoring import REPORT, SELECTION, Score
from carso_cli.evaluation.setup import Evaluation, EvaluationOptions, prepare_evaluation
from carso_cli.io.json_files import ensure_folder
from carso_cli.pictures.grids import Row, amplified, save_grid
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import save_npz, save_tensors
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.intervals import wilson
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import generator

SHOWN = 8
"""Images in the picture."""


def attack(
    recipe: Recipe,
    *,
    run: Path,
    reporter: Reporter,
    name: str,
    out: Path | None = None,
    files: Sequence[Path] = (),
    resize: bool = False,
    **options: Unpack[EvaluationOptions],
) -> dict[str, Any]:
    """Attack a split or image files, and save what is found.

    Args:
        recipe: The resolved recipe.
        run: Run folder.
        reporter: Where progress goes.
        name: A single attack, such as `pgd-eot`.
        out: Safetensors or npz file to write, the pictures beside it; when None,
            `<run>/attacks/<attack>-<target>.safetensors`.
        files: Image files to attack instead of the recipe's test split.
        resize: Crop and resize image files to the recipe's size.
        options: As for `evaluate`; `target` is the defence when left out.

    Returns:
        `out`, `picture`, `attack`, `target`, `eps`, `norm`, `n_images`, `clean` and `accuracy` (shares of
        scoring draws in [0, 1]), `ci95`, `largest_distance`.

    Raises:
        UsageError: If a protocol is named, or the attack does not fit the target.
        DataError: If an image file cannot be used.
    """
    _check_request(name, out)
    # One target, as one file holds one set of examples; `evaluate` would take both where none is named.
    options["attack"], options["target"] = name, options.get("target") or "defence"
    if files:
        options["images"] = _unlabelled(recipe, files, resize)
    evaluation = prepare_evaluation(recipe, run=run, reporter=reporter, **options)
    job = next(job for job in evaluation.plan.jobs if job.attack == name)
    # `prepare_evaluation` has joined already; joining twice changes nothing.
    world = join(evaluation.setting.models.device)
    path = out or RunFolder(run).inside("attacks") / f"{name}-{job.target}.safetensors"
    # Each file has its own picture, so that `a.npz` and `a.safetensors` do not share one.
    picture = path.with_suffix(".png") if path.suffix == ".safetensors" else Path(f"{path}.png")
    world.on_main(lambda: ensure_folder(path.parent))
    if files:
        # On every process, and before any is attacked: an attack needs a label to move away from.
        evaluation = _with_predicted_labels(evaluation, job)
    clean, tensors = _make_examples(evaluation, job, world, world.reporter(reporter))
    label_source, source = ("prediction", [str(file) for file in files]) if files else ("data", "test")
    about = {"target": job.target, "label_source": label_source, "source": source, "version": __version__}
    save = save_npz if path.suffix == ".npz" else save_tensors
    world.on_main(lambda: save(path, tensors, {**evaluation.identity, **about}))
    decided = torch.cat([score.predicted for score in clean])[:SHOWN]
    world.on_main(lambda: _draw(picture, evaluation.setting, job, tensors, decided))
    where = {"out": str(path), "picture": str(picture)}
    return {**where, "attack": name, "target": job.target, **_figures(evaluation.setting, clean, tensors)}


def _check_request(name: str, out: Path | None) -> None:
    if out is not None and out.suffix not in (".safetensors", ".npz"):
        raise UsageError(
            f"--out {out}: examples are written as .safetensors or .npz, not '{out.suffix}'",
            hint=f"--out {out.with_suffix('.safetensors')}",
        )
    if name in PROTOCOLS:
        raise UsageError(
            f"'{name}' is a protocol, a set of attacks; examples are made by one",
            hint=f"use one of its attacks, such as {PROTOCOLS[name].defence[0]}",
        )


def _make_examples(
    evaluation: Evaluation, job: Job, world: World, reporter: Reporter
) -> tuple[list[Score], dict[str, Tensor]]:
    """Return the scores of the unperturbed images, per block, and what is saved of M images."""
    setting, blocks = evaluation.setting, evaluation.blocks()

    def attack_block(number: int) -> tuple[Score, AttackResult]:
        batch = setting.batch(blocks[number])
        # A set of two attacks, such as rand-aa, offers several examples: the worst is what is saved.
        result = select_worst(setting, job, perturb(setting, job, batch, number), batch)
        # On the same report draws as the examples, so that the two accuracies differ by the attack alone.
        clean = setting.scorer(job)(*batch, REPORT)
        # Results go to all processes by pickle, where a tensor of a GPU would claim that GPU.
        return clean, replace(result, examples=result.examples.cpu())

    sizes = {number: len(block) for number, block in enumerate(blocks)}
    done = run_blocks(sizes, attack_block, world, reporter, f"{job.target}: {job.attack}").values()
    images, results = setting.images, [result for _, result in done]
    return [clean for clean, _ in done], {
        "images": images.pixels(slice(0, len(images))),
        "labels": images.labels,
        "indices": images.indices,
        "adversarial": torch.cat([result.examples for result in results]),
        "predictions": torch.cat([result.report.predicted for result in results]),
        "correct": torch.cat([result.report.correct for result in results]),
        "distances": torch.cat([result.distances for result in results]),
    }


def _figures(setting: Setting, clean: Sequence[Score], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    count, draws = len(tensors["labels"]), clean[0].draws
    # `correct` counts draws of R per image; divided by R it is a number of images.
    survived = float(tensors["correct"].sum()) / draws
    return {
        "eps": float(setting.threat.eps),
        "norm": setting.threat.norm,
        "n_images": count,
        "clean": sum(float(score.correct.sum()) for score in clean) / (draws * count),
        "accuracy": survived / count,
        "ci95": list(wilson(survived, count)),
        "largest_distance": float(tensors["distances"].max()),
    }


def _unlabelled(recipe: Recipe, files: Sequence[Path], resize: bool) -> ImageSet:
    """Read image files as an image set whose labels are still to be found."""
    data = recipe.data
    pixels = read_images(list(files), channels=data.channels, image_size=data.image_size, resize=resize)
    count = len(pixels)
    classes = tuple(str(label) for label in range(data.classes))
    unknown = torch.zeros(count, dtype=torch.int64)
    # Back to 8 bits, which these pixels come from; a cropped and resized image is rounded here.
    return ImageSet((pixels * 255.0).round().to(torch.uint8), unknown, torch.arange(count), classes)


def _with_predicted_labels(evaluation: Evaluation, job: Job) -> Evaluation:
    """Return the evaluation with the target's own decision on each image as its label."""
    setting = evaluation.setting
    scorer = setting.scorer(job)
    # By the selection draws: labels set on the report draws would make clean accuracy too high.
    labels = torch.cat([scorer(*setting.batch(block), SELECTION).predicted for block in evaluation.blocks()])
    return replace(evaluation, setting=replace(setting, images=replace(setting.images, labels=labels)))


def _draw(path: Path, setting: Setting, job: Job, tensors: Mapping[str, Tensor], clean: Tensor) -> None:
    """Draw the first images: clean, perturbation amplified, perturbed, and one reconstruction.

    Args:
        path: The PNG.
        setting: Models, images, seed.
        job: The attack.
        tensors: What is saved.
        clean: (SHOWN,) decisions on the unperturbed images.
    """
    shown = {name: tensor[:SHOWN] for name, tensor in tensors.items()}
    change = shown["adversarial"] - shown["images"]
    # The floor serves attacks that change nothing, such as `none`.
    largest = max(float(change.abs().max()), 1e-6)
    names = setting.images.classes
    rows = [
        Row("clean", shown["images"], [names[said] for said in clean.tolist()]),
        # Around mid-grey.
        Row(f"change\n× {0.5 / largest:.3g}", amplified(change, largest)),
        Row("perturbed", shown["adversarial"], [names[said] for said in shown["predictions"].tolist()], True),
    ]
    if job.target == "defence":
        defence, source = setting.models.require_defence(), generator(setting.seed, "picture")
        with torch.no_grad():
            condition = defence.condition(shown["adversarial"].to(setting.models.device))
            drawn = defence.decode(condition, defence.draw_latents(len(condition), 1, source))
        rows.append(Row("one recon-\nstruction\nof it", drawn[:, 0].cpu(), (), True))
    save_grid(path, rows, [names[label] for label in shown["labels"].tolist()])
