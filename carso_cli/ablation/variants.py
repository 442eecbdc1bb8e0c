"""Which ablations there are: each is a list of variants of one recipe, and becomes one table.

- `first_and_second`: training of the two classifier instances (Appendix D, Table 17);
- `aggregations`: the four rules (Appendix B.2, Tables 4 and 5);
- `sample_counts`: N, reconstructions per image;
- `layer_subsets`: layers of the internal representation;
- `adversarial_fractions`: perturbed share of the training batches;
- `attack_mixes`: attacks and strengths in the training batches (Appendix A);
- `seeds`: seeds of the training, for the spread between trainings;
- `perturbation_sizes`: eps, with the noise baseline.

A variant is the recipe with overrides, as `--set` takes them. One that changes what training depends on has a
run folder of its own beside the recipe's; all others are evaluated on the recipe's own run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carso_cli.errors import UsageError, nearest
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.load import dump_recipe, load_recipe_text
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.section import too_large

PAIRS = (("clean", "clean"), ("at", "clean"), ("clean", "at"), ("at", "at"))
"""Training of the first and of the second instance, in the order of Table 17."""
RULES = ("logit-mean", "probability-mean", "doubly-exponential", "majority-vote")
"""Aggregation rules in the order of Tables 4 and 5."""
MIXES: dict[str, dict[str, object]] = {
    "balanced": {},
    "pgd-only": {"attacks": ["pgd"], "strengths": [1.0], "adversarial_fraction": 1.0},
    "homogeneous": {"homogeneous": True},
    **{attack: {"attacks": [attack]} for attack in ("fgsm", "pgd")},
    **{name: {"strengths": [share]} for name, share in (("half", 0.5), ("full", 1.0))},
    **{
        f"{attack}-{name}": {"attacks": [attack], "strengths": [share]}
        for attack in ("fgsm", "pgd")
        for name, share in (("half", 0.5), ("full", 1.0))
    },
}
"""Appendix A: what a mix changes of the balanced one."""
_SUBSETS = tuple(name for name in MIXES if name not in ("balanced", "pgd-only", "homogeneous"))
_KINDS = {"at": "AT", "clean": "clean"}
_GROUP = re.compile(r".*?\d+")
_SMALL = {"digits": ("pgd-eot", 50)}
"""Data sets whose ablations take minutes by default: one attack, so many test images."""


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Args:
        label: What the row is called.
        values: What was chosen, by the names in the ablation's `varies`.
        recipe: The recipe that it is evaluated with; its purifier is trained with the same but `evaluation`.
        suffix: What its run folder's name adds to that of the recipe's own run; empty for that run itself.
        eps: Perturbation size in pixel units; the recipe's when None, and 0 for no perturbation.
        paper: Table of the paper and entry in it, if there is one.
    """

    label: str
    values: Mapping[str, Any]
    recipe: Recipe
    suffix: str = ""
    eps: float | None = None
    paper: tuple[str, str] | None = None

    def run_folder(self, root: Path) -> Path:
        """Return its run folder, given that of the recipe's own run."""
        return root.with_name(root.name + self.suffix)

    @property
    def kinds(self) -> set[str]:
        """Kinds of training of the classifiers that it needs."""
        return {self.recipe.representation.kind, self.recipe.evaluation.second_kind}


@dataclass(frozen=True)
class Ablation:
    """One table.

    Args:
        name: Name of its file in the run folder's `ablations`.
        title: Line above the table.
        varies: Heading of the rows.
        tables: Tables of the paper that it fills.
        variants: Its rows, in order.
        with_baselines: Whether the bare classifier is attacked too, and noise is scored.
        with_transfers: Whether examples made against the doubly-exponential rule are scored under each rule.
    """

    name: str
    title: str
    varies: str
    variants: tuple[Variant, ...]
    tables: tuple[str, ...] = ()
    with_baselines: bool = False
    with_transfers: bool = False
    by_training_alone: bool = False
    """Whether all rows are evaluated on the recipe's own images and by its own attack seed."""

    @property
    def kinds(self) -> list[str]:
        """Kinds of training of the classifiers that its variants need."""
        return sorted(set().union(*(variant.kinds for variant in self.variants)))


def first_and_second(recipe: Recipe, pairs: Sequence[tuple[str | None, str | None]] = PAIRS) -> Ablation:
    """Vary the training of the two classifier instances.

    Args:
        recipe: The recipe.
        pairs: Kinds, `clean` or `at`, of the first instance, which yields the internal representation, and
            of the second, which classifies; the recipe's own where None.
    """
    chosen = [
        (first or recipe.representation.kind, second or recipe.evaluation.second_kind)
        for first, second in pairs
    ]
    variants = []
    # In the table's order, whatever order the pairs are asked for in.
    for first, second in PAIRS:
        if (first, second) in chosen:
            label, values = f"{_KINDS[first]}/{_KINDS[second]}", {"first": first, "second": second}
            changes = (f"representation.kind={first}", f"evaluation.second_kind={second}")
            # Only the first instance matters in training, so pairs of one first instance share a run.
            varied = _vary(recipe, label, values, changes, f"-first-{first}", paper=("17", label))
            variants.append(varied)
    title = "Table 17: training of the first and of the second classifier instance"
    return Ablation("first-second", title, "first/second", tuple(variants), ("17",))


def aggregations(recipe: Recipe) -> Ablation:
    """Vary the aggregation rule over all four."""
    tables = {"majority-vote": "5"}
    variants = tuple(
        _vary(
            recipe,
            rule,
            {"aggregation": rule},
            [f"evaluation.aggregation={rule}"],
            paper=(tables.get(rule, "4"), rule),
        )
        for rule in RULES
    )
    title = "Tables 4 and 5: aggregation rules"
    return Ablation("aggregations", title, "aggregation", variants, ("4", "5"), with_transfers=True)


def sample_counts(recipe: Recipe, counts: Sequence[int]) -> Ablation:
    """Vary N, the number of reconstructions per image.

    Raises:
        UsageError: If a number is below 1.
    """
    if min(counts) < 1:
        raise UsageError(f"--n-samples {min(counts)} is not allowed; use whole numbers from 1")
    variants = tuple(
        _vary(recipe, f"N = {count}", {"n_samples": count}, [f"evaluation.n_samples={count}"])
        for count in sorted(set(counts))
    )
    return Ablation("n-samples", "Accuracy by reconstructions per image", "samples", variants)


def layer_subsets(recipe: Recipe, wanted: Sequence[str]) -> Ablation:
    """Vary the layers of the internal representation.

    Args:
        recipe: The recipe, whose layers are the whole.
        wanted: `all`, `first`, `last`, `groups` (every group of layers, one by one), a group such as
            `layer.1` (a layer's name up to its first number), or the name of one layer.

    Raises:
        UsageError: If a subset is unknown.
    """
    known = _known_subsets(recipe.representation.layers)
    groups = [name for name in known if name not in ("all", "first", "last")]
    labels = [label for word in wanted for label in (groups if word == "groups" else [word])]
    variants = []
    # A group may be asked for by name and by `groups`; a table has one row of a label.
    for label in dict.fromkeys(labels):
        layers = known.get(label) or [layer for layer in recipe.representation.layers if layer == label]
        if not layers:
            suggestion = nearest(label, [*known, "groups", *recipe.representation.layers])
            raise UsageError(
                f"unknown layers '{label}'; {suggestion}".rstrip("; "),
                hint=f"use all, first, last, groups, {', '.join(groups)}, or the name of one layer",
            )
        changes = [f"representation.layers={json.dumps(layers)}"]
        values = {"layers": label, "names": list(layers)}
        variants.append(_vary(recipe, label, values, changes, f"-layers-{label}"))
    return Ablation("layers", "Accuracy by layers of the representation", "layers", tuple(variants))


def _known_subsets(layers: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for layer in layers:
        found = _GROUP.match(layer)
        groups.setdefault(found.group() if found else layer, []).append(layer)
    # Last, so that a layer called `first` cannot take the word's place.
    return {**groups, "all": list(layers), "first": [layers[0]], "last": [layers[-1]]}


def adversarial_fractions(recipe: Recipe, fractions: Sequence[float]) -> Ablation:
    """Vary the share of every training batch that is perturbed.

    Raises:
        RecipeError: If a share is not in [0, 1].
    """
    section = "attack_mix" if recipe.training.objective == "elbo" else "adversarial"
    variants = tuple(
        _vary(
            recipe,
            f"{fraction:g}",
            {"adversarial_fraction": fraction},
            # `repr` gives every digit; `:g` is for names.
            [f"training.{section}.adversarial_fraction={fraction!r}"],
            f"-adversarial-{fraction:g}",
        )
        for fraction in sorted(set(fractions))
    )
    title = "Accuracy by perturbed share of the training batches"
    return Ablation("adversarial-fraction", title, "perturbed share", variants)


def attack_mixes(recipe: Recipe, wanted: Sequence[str]) -> Ablation:
    """Vary which attacks perturb the training batches (Appendix A), beside the balanced batches.

    Args:
        recipe: The recipe.
        wanted: Keys of `MIXES`, or `subsets` for every smaller set of attacks and strengths.

    Raises:
        UsageError: If a mix is unknown, or the recipe trains through the defence, without these attacks.
    """
    if (objective := recipe.training.objective) != "elbo":
        raise UsageError(f"recipe '{recipe.name}' trains with objective '{objective}', without an attack mix")
    names = [name for word in wanted for name in (_SUBSETS if word == "subsets" else [word])]
    for name in names:
        if name not in MIXES:
            suggestion = nearest(name, [*MIXES, "subsets"])
            raise UsageError(
                f"unknown attack mix '{name}'; {suggestion}".rstrip("; "),
                hint=f"use subsets, {', '.join(MIXES)}",
            )
    whole = {"attacks": ["fgsm", "pgd"], "strengths": [0.5, 1.0], "homogeneous": False}
    variants = []
    for name in (name for name in MIXES if name in ("balanced", *names)):
        changes = [
            f"training.attack_mix.{key}={json.dumps(value)}" for key, value in (whole | MIXES[name]).items()
        ]
        variants.append(_vary(recipe, name, {"attack_mix": name}, changes, f"-mix-{name}"))
    title = "Appendix A: attacks in the training batches"
    return Ablation("attack-mix", title, "attack mix", tuple(variants))


def seeds(recipe: Recipe, numbers: Sequence[int]) -> Ablation:
    """Vary the seed of the purifier's training; images and attacks of the evaluations stay.

    Raises:
        UsageError: If a seed is negative.
    """
    if min(numbers) < 0:
        raise UsageError(f"--seeds {min(numbers)} is not allowed; use whole numbers from 0")
    variants = tuple(
        _vary(recipe, f"seed {number}", {"seed": number}, [f"seed={number}"], f"-seed-{number}")
        for number in sorted(set(numbers))
    )
    title = "Accuracy by seed of the purifier's training"
    return Ablation("seeds", title, "training seed", variants, by_training_alone=True)


def perturbation_sizes(recipe: Recipe, sizes: Sequence[float]) -> Ablation:
    """Vary eps, in pixel units; 0 stands for the unperturbed images.

    Raises:
        UsageError: If no size is above 0, one is negative or, under linf, above 1.
    """
    if problem := too_large(max(sizes, default=0.0), recipe.threat.norm):
        raise UsageError(f"--eps: {problem}")
    if not any(size > 0 for size in sizes) or any(size < 0 for size in sizes):
        raise UsageError(
            f"--eps needs at least one size above 0 and none below; got {', '.join(map(str, sizes))}",
            hint="for example --eps 0,2/255,4/255,8/255",
        )
    # The row of 0 is drawn from an attacked evaluation, so it comes after one of these.
    ordered = sorted(set(sizes), key=lambda size: (size == 0, size))
    variants = tuple(Variant(f"{size:.4g}", {"eps": size}, recipe, eps=size) for size in ordered)
    return Ablation("eps", "Accuracy by eps", "eps", variants, with_baselines=True)


def row_order(row: Mapping[str, Any]) -> tuple[float, str]:
    """Return the sort key of a stored row within its table: the paper's order, or by size."""
    values = row["values"]
    if "first" in values:
        return PAIRS.index((values["first"], values["second"])), ""
    if "aggregation" in values:
        return RULES.index(values["aggregation"]), ""
    if "attack_mix" in values:
        return list(MIXES).index(values["attack_mix"]), ""
    if "layers" in values:
        whole = ("all", "first", "last")
        return (whole.index(row["label"]) if row["label"] in whole else len(whole)), row["label"]
    (number,) = values.values()
    return float(number), ""


def choose_budget(recipe: Recipe, attack: str | None, limit: int | None) -> tuple[str, int | None, str]:
    """Return attack, number of test images (the recipe's when None) and what must be said of them.

    None stands for the adaptive protocol on the recipe's images, as in `carso evaluate`; on digits, for one
    attack on a few images.
    """
    usual, few = _SMALL.get(recipe.data.name, ("adaptive", None))
    if few is not None:
        # A recipe that asks for fewer images than the default keeps its own number.
        few = min(few, recipe.evaluation.images or few)
    chosen = (attack or usual, limit or few)
    if few is None or (attack and limit):
        return (*chosen, "")
    note = (
        f"On {recipe.data.name} the default is {usual} on {few} test images, to take minutes: an upper bound "
        "with wide intervals. --attack adaptive and --limit measure more."
    )
    return (*chosen, note)


def _vary(
    recipe: Recipe,
    label: str,
    values: Mapping[str, Any],
    changes: Sequence[str],
    suffix: str = "",
    paper: tuple[str, str] | None = None,
) -> Variant:
    """Return a variant by overrides of the recipe, in a run of its own if they change its training."""
    # Through text, so that a variant passes the very checks that --set does.
    varied = load_recipe_text(dump_recipe(recipe), source=f"recipe '{recipe.name}'", overrides=changes)
    start = recipe.training.initial
    if start is not None and varied.representation != recipe.representation:
        raise UsageError(
            f"'{label}' cannot start from {start}: it belongs to the recipe's own classifier and layers",
            hint="ablate the recipe that was trained from fresh weights",
        )
    # By the hash, so that the variant equal to the recipe uses the run that is trained already.
    same = recipe_hash(varied, TRAINING_SECTIONS) == recipe_hash(recipe, TRAINING_SECTIONS)
    return Variant(label, values, varied, "" if same else suffix, paper=paper)
