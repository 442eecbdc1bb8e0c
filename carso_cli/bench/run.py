"""How fast carso is on a device: each kind of work, beside a naive baseline of the same.

    result = bench(recipe, reporter=reporter, batch_size=16)
    for case in result["cases"]:
        case["name"], case["images_per_second"], case["share_of_peak"], case["ratio_to_straightforward"]

`straightforward` in a stored key is the naive baseline: the name is kept so that old results can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from carso_cli.bench.cases import CASES, Bench, set_up
from carso_cli.bench.profiling import (
    Work,
    alternating_seconds,
    counted_operations,
    matrix_product,
    peak_bytes,
)
from carso_cli.build import device_for
from carso_cli.errors import DataError, UsageError, nearest
from carso_cli.io.json_files import read_plain_json
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.description import describe_environment
from carso_cli.runtime.memory import is_out_of_memory
from carso_cli.runtime.reporter import Reporter

SCHEMA = 1

_MOST_HALVINGS = 10
_PATIENCE = 60.0
"""Seconds after which a case is timed no further, once three rounds are made."""


def bench(
    recipe: Recipe,
    *,
    reporter: Reporter,
    device: str = "auto",
    batch_size: int | None = None,
    cases: Sequence[str] = (),
    overrides: Sequence[str] = (),
    rounds: int = 7,
) -> dict[str, Any]:
    """Time the recipe's work with random weights on random images.

    In every round carso's work, the naive baseline's and a matrix product of known size run once each;
    figures are medians over rounds, and a ratio is the median of each round's.

    Args:
        recipe: The recipe; neither its data nor its weights are needed.
        reporter: Where progress goes.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        batch_size: Images of every case; when None the recipe's, or as many of them as memory holds, at most
            16 (training: 64) on a CPU.
        cases: Names in `carso_cli.bench.cases.CASES`; all when empty.
        overrides: What was changed in the recipe, to name it in the result.
        rounds: Most rounds of a case.

    Returns:
        `schema`, `device`, `recipe`, `peak_flops` (operations per second of the matrix product) and `cases`,
        each with `name`, `images` of a call, `images_per_second`, `seconds`, `peak_memory_bytes` (of tensors,
        on top of weights and images), `flops` (operations of one call), `share_of_peak`,
        `ratio_to_straightforward`.

    Raises:
        UsageError: If a case is unknown, or the training step is asked for and not on the paper's objective.
    """
    chosen = _chosen(recipe, cases, reporter)
    target = device_for(recipe, device)
    models = set_up(recipe, target, batch_size, reporter)
    # In the precision of the work: bfloat16 has a peak of its own.
    product, operations = matrix_product(recipe.precision, target)
    found: list[dict[str, Any]] = []
    products: list[float] = []
    with reporter.progress("timing", len(chosen), unit="cases") as progress:
        for name in chosen:
            timed = _time_in_memory(models, name, product, rounds)
            # What is found already stays where one case is too large.
            if timed is not None:
                found.append(timed[0])
                products += timed[1]
            progress.advance()
    peak = operations / statistics.median(products) if products else None
    for figures in found:
        # Only now: the peak is the median over the products of all cases.
        figures["share_of_peak"] = figures["flops"] / figures["seconds"] / peak
    return {
        "schema": SCHEMA,
        "device": _describe(target),
        # With its overrides, since `compare` tells recipes apart by this text.
        "recipe": " ".join((recipe.name, *(f"--set {text}" for text in overrides))),
        "peak_flops": peak,
        "cases": found,
    }


def _chosen(recipe: Recipe, cases: Sequence[str], reporter: Reporter) -> list[str]:
    for name in cases:
        if name not in CASES:
            raise UsageError(
                "; ".join(filter(None, (f"there is no case '{name}'", nearest(name, CASES)))),
                hint=f"cases: {', '.join(CASES)}",
            )
    # In the table's order, so that two results line up.
    chosen = [name for name in CASES if name in cases or not cases]
    objective = recipe.training.objective
    if objective != "elbo" and "training-step" in chosen:
        reason = f"the training step is timed on the paper's objective, and the recipe's is {objective}"
        if cases:
            raise UsageError(reason, hint="bench the recipe that it extends, or name other cases with --case")
        reporter.warning(f"{reason}: left out")
        chosen.remove("training-step")
    return chosen


def _time_in_memory(
    models: Bench, name: str, product: Work, rounds: int
) -> tuple[dict[str, Any], list[float]] | None:
    """Time a case on as many images as memory holds; None if it holds none.

    A size that the user asked for is not changed.
    """
    while True:
        try:
            return _time_case(models, name, product, rounds)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # Ten halvings take 5,120 images to 5.
        if models.batch_size is not None or models.halved == _MOST_HALVINGS:
            models.reporter.warning(f"memory does not hold {name}: left out")
            return None
        models = replace(models, halved=models.halved + 1)


def _time_case(models: Bench, name: str, product: Work, rounds: int) -> tuple[dict[str, Any], list[float]]:
    """Return the figures of a case, `share_of_peak` to be filled in, and the seconds of the products."""
    case, device = CASES[name](models), models.device
    operations, memory = counted_operations(case.ours), peak_bytes(case.ours, device)
    # Each runs once before it is timed, so that nothing is set up meanwhile.
    case.naive()
    product()
    ours, naive, products = alternating_seconds(
        (case.ours, case.naive, product), device, rounds=rounds, patience=_PATIENCE
    )
    seconds = statistics.median(ours)
    figures = {
        "name": name,
        "images": case.images,
        "images_per_second": case.images / seconds,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "flops": operations,
        "share_of_peak": 0.0,
        # Within a round both met the same load; medians of different rounds need not have.
        "ratio_to_straightforward": statistics.median(
            slow / fast for fast, slow in zip(ours, naive, strict=True)
        ),
    }
    return figures, products


def _describe(device: torch.device) -> str:
    environment = describe_environment(device)
    threads = environment["threads"]
    counted = f", {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else ""
    return f"{device}: {environment['device_name']}{counted}"


def read_bench(path: Path) -> dict[str, Any]:
    """Read a stored result.

    Raises:
        DataError: If there is no file, or it was not written by `carso bench --json`.
    """
    hint = "write one with: carso bench --json > FILE"
    if not path.is_file():
        raise DataError(f"there is no file {path}", hint=hint)
    stored = read_plain_json(path)
    if stored.get("schema") != SCHEMA or "cases" not in stored:
        raise DataError(f"{path} holds no result of carso bench with schema {SCHEMA}", hint=hint)
    return stored


def compare(result: Mapping[str, Any], earlier: Mapping[str, Any], reporter: Reporter) -> dict[str, float]:
    """Return, case by case, images per second over those of an earlier result.

    Warns where device or recipe differ: the ratio then says nothing about the code.
    """
    for key in ("device", "recipe"):
        if result[key] != earlier[key]:
            reporter.warning(f"the {key} was '{earlier[key]}' then and is '{result[key]}' now")
    before = {case["name"]: case["images_per_second"] for case in earlier["cases"]}
    return {
        case["name"]: case["images_per_second"] / before[case["name"]]
        for case in result["cases"]
        if case["name"] in before
    }
