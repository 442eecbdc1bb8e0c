"""Series for pictures, drawn from stored evaluations that differ in one setting only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from carso_cli.pictures.points import Bar, Curve, Point
from carso_cli.reports.evaluations import StoredEvaluation
from carso_cli.reports.stored import StoredRun

# Step sizes follow eps, so they differ wherever eps does.
_FOLLOW = {"eps": ("pgd_step_size", "pgd_eot_step_size"), "n_samples": ()}


def comparable(run: StoredRun, key: str) -> list[StoredEvaluation]:
    """Return the largest set of evaluations of the defence that differ in one setting only.

    Args:
        run: The run.
        key: `eps` or `n_samples`.

    Returns:
        In the order of that setting, each value once; of several such sets the longest, then the one with
        most images; empty where no two evaluations can be compared.
    """
    groups: dict[str, dict[float, StoredEvaluation]] = {}
    for one in run.evaluations:
        if "defence" not in one.worst:
            continue
        rest = {name: value for name, value in one.identity.items() if name not in (key, *_FOLLOW[key])}
        # What is attacked beside the defence does not change the defence's figures.
        rest.pop("targets")
        groups.setdefault(json.dumps(rest, sort_keys=True), {}).setdefault(float(one.identity[key]), one)
    best = max(groups.values(), key=_extent, default={})
    return [best[value] for value in sorted(best)] if len(best) > 1 else []


def _extent(group: dict[float, StoredEvaluation]) -> tuple[int, int]:
    return len(group), next(iter(group.values())).identity["n_images"]


def eps_curves(run: StoredRun) -> list[Curve]:
    """Return accuracy against eps: defence attacked, under random noise, classifier attacked if it was.

    Empty where no two evaluations can be compared.
    """
    found = comparable(run, "eps")
    if not found:
        return []
    clean = _points([(0.0, found[0].find("defence", "none"))])
    attacked = _points((one.identity["eps"], one.worst["defence"]) for one in found)
    noise = _points((one.identity["eps"], one.find("defence", "noise")) for one in found)
    bare = _points((one.identity["eps"], one.worst.get("classifier")) for one in found)
    attack = found[0].identity["attack"]
    curves = [
        Curve(f"defence, attacked ({attack})", clean + attacked),
        Curve("defence, random noise", clean + noise),
    ]
    if bare:
        start = _points([(0.0, found[0].find("classifier", "none"))])
        curves.append(Curve(f"classifier alone, attacked ({attack})", start + bare))
    return curves


def sample_curves(run: StoredRun) -> list[Curve]:
    """Return accuracy of the defence against its number of samples N: clean and attacked."""
    found = comparable(run, "n_samples")
    if not found:
        return []
    clean = _points((one.identity["n_samples"], one.find("defence", "none")) for one in found)
    attacked = _points((one.identity["n_samples"], one.worst["defence"]) for one in found)
    return [Curve("clean", clean), Curve(f"attacked ({found[0].identity['attack']})", attacked)]


def _points(rows: Iterable[tuple[float, Mapping[str, Any] | None]]) -> tuple[Point, ...]:
    return tuple(Point(float(x), row["accuracy"], *row["ci95"]) for x, row in rows if row is not None)


def caption_of(found: Sequence[StoredEvaluation]) -> str:
    """Say which evaluations a picture is drawn from."""
    first = found[0].identity
    names = ", ".join(one.path.name for one in found)
    return f"{first['n_images']} images, seed {first['seed']}, bars: 95% Wilson intervals. From {names}."


def layer_bars(run: StoredRun) -> list[tuple[str, tuple[Bar, ...]]]:
    """Return accuracy of the defence by the layers that it looks at, clean and attacked.

    From the first table of that ablation, in the order of attacks; empty where it was not run.
    """
    ablation = next(iter(run.ablations_of("layers")), None)
    if ablation is None:
        return []
    clean = tuple(_bar(row.label, row.clean) for row in ablation.rows if row.clean)
    attacked = tuple(_bar(row.label, row.attacked) for row in ablation.rows if row.attacked)
    return [("clean", clean), (f"attacked ({ablation.attack})", attacked)]


def _bar(label: str, row: Mapping[str, Any]) -> Bar:
    return Bar(label, row["accuracy"], *row["ci95"])
