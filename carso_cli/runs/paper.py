"""The paper's figures, to be set beside ours: `carso_cli/paper_figures.json`; and how a run departs from it.

- `paper_row`: the paper's row for what a recipe reproduces;
- `departures`: what a run, and an evaluation of it, do otherwise than the paper's recipe;
- `beyond_the_paper`: in what a defence is not the paper's at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from carso_cli.classifiers.registry import RELEASES
from carso_cli.io.json_files import read_plain_json
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.shipped import list_recipes

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet200": "TinyImageNet-200"}
"""The paper's data sets: our name to the paper's."""
_TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tinyimagenet200": 100_000}
_TEST_IMAGES = 10_000  # of each of the three
_BUDGET = ("n_samples", "aggregation", "apgd_steps", "eot_draws", "pgd_eot_steps", "restarts")
"""Fields of an evaluation's identity that the paper states."""
_OF_THE_SCHEDULE = re.compile(r"training\.(learning_rate\.\w+_epochs|beta_increase\.\w+)")
_OF_THE_TRAINING = re.compile(r"training\.|data\.(holdout|train_limit)$")
_NO_MATTER = re.compile(
    r"data\.(root|follow)|classifier\.(at|clean|training)(\..*)?"
    r"|training\.(initial|save_every_epochs|save_every_minutes)"
)


@cache
def paper_figures() -> dict[str, Any]:
    """Return the figures by table number, then by scenario, `(a)`, `(b)` or `(c)`."""
    return read_plain_json(Path(__file__).resolve().parents[1] / "paper_figures.json")


def paper_row(reproduces: str, table: str) -> dict[str, Any] | None:
    """Return the paper's row of a table for what a recipe reproduces.

    Args:
        reproduces: The recipe's own word, such as `Table 2, scenario (a)`; empty for none.
        table: Number of the table; Table 18 has the columns of Table 2, so its row is found under `2` too.
    """
    further = {f"Table 18, {row['dataset']}, {row['model']}": row for row in paper_figures()["18"]}
    if table in ("2", "18"):
        row = further.get(reproduces)
        if row is not None or table == "18":
            return row
    found: dict[str, Any] | None = paper_figures().get(table, {}).get(scenario_of(reproduces))
    return found


def scenario_of(reproduces: str) -> str | None:
    """Return the paper's scenario, `(a)`, `(b)` or `(c)`, that a recipe says it reproduces, if any."""
    found = re.search(r"\([abc]\)", reproduces)
    return found.group() if found else None


def dataset_of(recipe: Mapping[str, Any]) -> str | None:
    """Return the paper's name of the data set, if a recipe reproduces a row of the paper."""
    return DATASETS.get(recipe["data"]["name"]) if recipe["reproduces"] else None


def departures(
    recipe: Mapping[str, Any],
    identity: Mapping[str, Any] | None = None,
    *,
    trained: bool = True,
    trained_on: int | None = None,
    varied: Collection[str] = (),
) -> tuple[str, ...]:
    """Return what differs from the paper's recipe; empty for its own, and for one that reproduces nothing.

    Args:
        recipe: The run's resolved recipe as plain values.
        identity: Identity of an evaluation, whose budget and images are compared too.
        trained: Whether the purifier was trained by this recipe; an imported one was not.
        trained_on: Number of training images, where it is known.
        varied: Keys that a table varies itself, as its paper rows do.
    """
    paper = _paper_recipe(recipe["reproduces"])
    if paper is None:
        return ()
    found, every = [], _TRAINING_IMAGES.get(paper["data"]["name"], 0)
    ours, theirs = dict(_flat(recipe)), dict(_flat(paper))
    # The paper trains on every image.
    theirs["data.holdout"], theirs["data.train_limit"] = 0.0, None
    if not trained:
        ours |= {key: value for key, value in theirs.items() if _OF_THE_TRAINING.match(key)}
    elif trained_on is not None:
        ours |= {"data.holdout": 0.0, "data.train_limit": None}
        if trained_on < every:
            found.append(f"trained on {trained_on:,} of {every:,} images")
    release = RELEASES.get((recipe["name"], recipe["representation"]["kind"]))
    if release is not None and ours["classifier.weights"] == release.classifier:
        # The authors' file of a classifier holds the same weights as its publisher's.
        ours["classifier.weights"] = theirs["classifier.weights"]
    scaled = ours["training.epochs"] != theirs["training.epochs"]
    for key in theirs:
        # Schedules are scaled with the epochs, which says all.
        if key in varied or (scaled and _OF_THE_SCHEDULE.fullmatch(key)):
            continue
        if ours.get(key) != theirs[key]:
            found.append(_difference(key, ours.get(key), theirs[key]))
    if identity is not None:
        found += _evaluation_differences(identity, paper["evaluation"], varied)
    return tuple(found)


def _evaluation_differences(
    identity: Mapping[str, Any], paper: Mapping[str, Any], varied: Collection[str]
) -> Iterator[str]:
    for key in _BUDGET:
        # A bare classifier has neither samples nor rule.
        if key not in varied and identity.get(key) not in (None, paper[key]):
            yield _difference(key, identity[key], paper[key])
    if identity["n_images"] < _TEST_IMAGES:
        yield f"{identity['n_images']:,} of {_TEST_IMAGES:,} test images"


@cache
def _paper_recipe(reproduces: str) -> Mapping[str, Any] | None:
    """Return the shipped recipe that reproduces this row of the paper, as plain values."""
    line = f"\nreproduces: {reproduces}\n"
    for shipped in list_recipes() if reproduces else ():
        # The text first: reading every recipe in full would take a second.
        if line in shipped.path.read_text(encoding="utf-8"):
            return load_recipe(str(shipped.path)).model_dump(mode="json")
    return None


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything that makes a defence, evaluation and file places left out."""
    for section in ("data", "threat", "classifier", "representation", "purifier", "training"):
        yield from _leaves(section, recipe[section])
    yield "precision", recipe["precision"]
    # Only weights that are used: a recipe may name others for its ablations.
    yield "evaluation.second_kind", recipe["evaluation"]["second_kind"]
    yield "classifier.weights", _weights_of(recipe)


def _weights_of(recipe: Mapping[str, Any]) -> str | None:
    weights = recipe["classifier"][recipe["representation"]["kind"]] or {}
    found: str | None = weights.get("name") or weights.get("file")
    return found


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  (any value of a recipe)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    elif not _NO_MATTER.fullmatch(prefix):
        yield prefix, value


def _difference(key: str, ours: Any, theirs: Any) -> str:  # noqa: ANN401  (any value of a recipe)
    name = key.partition(".")[2] or key
    if isinstance(ours, list) and len(ours) != len(theirs):
        return f"number of {name} {len(ours)}, not {len(theirs)}"
    if isinstance(ours, list):
        return f"other {name}"
    return f"{name} {ours}, not {theirs}"


def beyond_the_paper(recipe: Mapping[str, Any]) -> str:
    """Return in what a recipe's defence is not the paper's, as one phrase; empty for the paper's."""
    training, purifier = recipe["training"], recipe["purifier"]
    objective, share = training["objective"], purifier["input_share"]
    through = objective != "elbo"
    trades = training["adversarial"]["trades_weight"] if through else None
    found = (
        *((objective,) if through else ()),
        # An objective through the defence always starts from another purifier: that goes without saying.
        *(("trained on from another purifier",) if training["initial"] and not through else ()),
        *((f"TRADES weight {trades:g}",) if trades is not None else ()),
        *((f"{share:g} of the input",) if share else ()),
        *(() if purifier["latent_features"] else ("no latent",)),
    )
    return f"beyond the paper ({', '.join(found)})" if found else ""
