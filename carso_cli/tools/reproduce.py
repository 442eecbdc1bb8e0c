"""Reproduce a row of the paper from the files that its authors publish: fetch, import, evaluate.

    plan = plan_reproduction("cifar10")
    reproduce(plan, reporter=reporter)

Data, classifier and purifier are downloaded where they are missing, each held to the checksum of its first
download; the purifier becomes a run; the run is evaluated by the authors' procedure and by ours. Every stage
takes up what an earlier call has left.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.build import build_purifier, channels_last, device_for, untrained_classifier
from carso_cli.classifiers.registry import RELEASES, Release
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.release_format import PUBLISHED_PARTS, to_release
from carso_cli.errors import StateError, UsageError, WeightsError, nearest
from carso_cli.evaluation.preflight import estimate_cost
from carso_cli.evaluation.run import run_evaluation
from carso_cli.evaluation.setup import prepare_evaluation
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.tools.assets import DAMAGED, fetch_missing, purifier_files, take_stock
from carso_cli.tools.import_release import import_release

ATTACKS = ("authors", "adaptive")
"""The protocols: the authors' procedure, then ours."""
_DATA_BYTES = {"cifar10": 170_498_071, "cifar100": 169_001_437, "tinyimagenet200": 248_100_043}
_TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Reproduction:
    """A row of the paper to reproduce.

    Args:
        recipe: The recipe, with the authors' classifiers.
        release: Their files for the first classifier instance.
        run: Run folder.
        overrides: What the recipe was read with.
        table: The paper's table, such as `2`.
    """

    recipe: Recipe
    release: Release
    run: Path
    overrides: tuple[str, ...]
    table: str


def plan_reproduction(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    first: str = "at",
    second: str = "at",
    run: Path | None = None,
) -> Reproduction:
    """Resolve what is to be reproduced.

    Args:
        reference: A recipe of a row of Table 2 or 18.
        overrides: `KEY=VALUE` each, as for `load_recipe`.
        first: Training of the first classifier instance, `at` or `clean`; with `second`, a row of Table 17.
        second: The same of the second instance.
        run: Run folder; `runs/NAME-authors` when None, with the kinds where they are not the paper's own.

    Raises:
        RecipeError: If the recipe does not exist or does not load.
        UsageError: If the authors publish nothing for it.
    """
    name = load_recipe(reference, overrides).name
    own = (first, second) == ("at", "at")
    kinds = (f"representation.kind={first}", f"evaluation.second_kind={second}")
    chosen = [*kinds] * (not own)
    for kind in dict.fromkeys((first, second)):
        if (name, kind) not in RELEASES:
            known = sorted({known for known, other in RELEASES if other == kind})
            parts = (f"the authors publish no {kind} classifier for recipe '{name}'", nearest(name, known))
            raise UsageError("; ".join(filter(None, parts)), hint=f"use {', '.join(known)}")
        chosen.append(f"classifier.{kind}={{source: file, file: {RELEASES[name, kind].classifier}}}")
    everything = (*chosen, *overrides)
    recipe = load_recipe(reference, everything)
    folder = f"{name}-authors" if own else f"{name}-authors-{first}-{second}"
    table = recipe.reproduces.removeprefix("Table ").partition(",")[0] if own else "17"
    return Reproduction(recipe, RELEASES[name, first], run or Path("runs") / folder, everything, table)


def reproduce(
    plan: Reproduction,
    *,
    reporter: Reporter,
    attacks: Sequence[str] = ATTACKS,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Fetch, import and evaluate; what an earlier call has finished is not done again.

    Returns:
        `recipe`, `run`, `table`, `files` (name to SHA-256) and `evaluations` (attack to summary).

    Raises:
        MissingError: If a file cannot be downloaded, or is not that of the first download.
        WeightsError: If a file has changed on this machine, or does not fit the recipe.
        StateError: If the run folder holds another purifier.
        CarsoError: As `evaluate` does.
    """
    files = _fetch(plan, reporter)
    checksums = {path.name: file_digest(path) for path in files}
    target = RunFolder(plan.run)
    if target.recipe.is_file():
        _, metadata = load_tensors(target.require_purifier(f"carso reproduce {plan.recipe.reference}"))
        if metadata.get("imported_from") != checksums:
            raise StateError(
                f"{plan.run} holds another purifier than the authors' {plan.release.purifier}",
                hint="choose another folder with --run DIR",
            )
    else:
        import_release(files[0].parent, plan.recipe, run=plan.run, reporter=reporter)
    evaluations = {}
    for attack in attacks:
        evaluation = prepare_evaluation(
            plan.recipe, run=plan.run, reporter=reporter, attack=attack, limit=limit, device=device
        )
        begun = evaluation.folder.exists
        evaluations[attack] = run_evaluation(evaluation, reporter=reporter, resume=begun)
    named = {"recipe": plan.recipe.name, "run": str(plan.run), "table": plan.table}
    return {**named, "files": checksums, "evaluations": evaluations}


def _fetch(plan: Reproduction, reporter: Reporter) -> list[Path]:
    """Download what is missing; return the purifier's files."""
    for item in take_stock(plan.recipe):
        if item.state == DAMAGED and (item.required or item.role == "purifier"):
            raise WeightsError(f"{item.what}: {item.note}", hint=f"remove what is damaged: {item.place}")
    fetch_missing(plan.recipe, reporter)
    files = purifier_files(plan.release)
    for url, path in files.items():
        if not path.is_file():
            fetch(url, path, name=path.name, reporter=reporter)
    return [*files.values()]


def describe(
    plan: Reproduction,
    *,
    reporter: Reporter,
    attacks: Sequence[str] = ATTACKS,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Say what `reproduce` would download, run and take; nothing is downloaded or written.

    Times are measured on this device with untrained models of the same architecture.

    Returns:
        `files` (each `what`, `state`, `url`, `bytes`), `evaluations` (each `attack`, `seconds`), `commands`
        that do the same one by one, `n_images`, and `bytes` still to download.
    """
    recipe = plan.recipe
    with torch.device("meta"):
        classifier = untrained_classifier(recipe)
        state = build_purifier(recipe, classifier).state_dict()
    purifier = sum(_bytes(to_release(part, state)) for part in PUBLISHED_PARTS)
    sizes = {"data": _DATA_BYTES.get(recipe.data.name), "purifier": purifier}
    files: list[dict[str, Any]] = [
        {
            "what": item.what,
            "state": item.state,
            "url": item.download or item.source,
            "bytes": sizes.get(item.role, _bytes(classifier.state_dict())),
        }
        for item in take_stock(recipe)
        if item.required or item.role == "purifier"
    ]
    missing = sum(size for file in files if file["state"] != "present" and (size := file["bytes"]))
    count = limit or recipe.evaluation.images or _TEST_IMAGES
    reporter.info("measuring a step of an untrained model of the same size on this device")
    defence, images = _untrained(recipe, count, device)
    times = []
    for attack in attacks:
        models: Any = {"defence": defence, "images": images, "device": device}
        evaluation = prepare_evaluation(recipe, run=plan.run, reporter=reporter, attack=attack, **models)
        on_cpu = evaluation.setting.models.device.type == "cpu"
        # A CPU is as fast with one draw as with many, and a wide network takes seconds for each.
        draws = 1 if on_cpu else None
        times.append({"attack": attack, "seconds": estimate_cost(evaluation, draws=draws)["seconds"]})
    return {
        "recipe": recipe.name,
        "run": str(plan.run),
        "listed": plan.release.listed,
        "files": files,
        "bytes": missing,
        "evaluations": times,
        "n_images": count,
        "commands": _commands(plan, attacks, limit),
    }


def _untrained(recipe: Recipe, count: int, device: str) -> tuple[Defence, ImageSet]:
    """Return a defence of the recipe's architecture, and as many images as will be attacked."""
    where, data = device_for(recipe, device), recipe.data
    classifier: nn.Module = channels_last(untrained_classifier(recipe).to(where))
    classifier.eval().requires_grad_(False)
    defence = Defence(
        classifier,
        build_purifier(recipe, classifier).to(where),
        recipe.representation.layers,
        n_samples=recipe.evaluation.n_samples,
        aggregation=recipe.evaluation.aggregation,
    )
    pixels = torch.zeros(count, data.channels, data.image_size, data.image_size, dtype=torch.uint8)
    names = tuple(map(str, range(data.classes)))
    return defence, ImageSet(pixels, torch.zeros(count, dtype=torch.int64), torch.arange(count), names)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _commands(plan: Reproduction, attacks: Sequence[str], limit: int | None) -> list[str]:
    """Return the command lines that do the same, one stage at a time."""
    recipe = plan.recipe.reference
    options = " ".join(f"--set {shlex.quote(text)}" for text in plan.overrides)
    files = purifier_files(plan.release)
    folder = next(iter(files.values())).parent
    images = "" if limit is None else f" --limit {limit}"
    return [
        f"carso doctor {recipe} --fetch {options}",
        *(f"curl --create-dirs -o {shlex.quote(str(path))} {url}" for url, path in files.items()),
        f"carso import-release {shlex.quote(str(folder))} --recipe {recipe} --run {plan.run} {options}",
        *(f"carso evaluate --run {plan.run} --attack {attack}{images}" for attack in attacks),
        f"carso report {plan.run} --table {plan.table}",
    ]
