"""Pictures of a run: accuracy against eps, N and the layers, reconstructions, the course of training.

Curves are drawn from stored evaluations that differ in one setting only. Reconstructions are of adversarial
examples that `carso attack` stored; for them alone the defence is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carso_cli.build import load_defence
from carso_cli.defence.answer import classify
from carso_cli.errors import CarsoError
from carso_cli.io.json_files import write_atomically
from carso_cli.pictures.curves import DARK, KINDS, LIGHT, Curve, Picture, Point, Style, render
from carso_cli.pictures.grids import Row, amplified, render_grid
from carso_cli.recipe.load import load_recipe
from carso_cli.reports.stored import StoredEvaluation, StoredRun
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter

_INTERVALS = "Lines: 95% Wilson intervals; the records of each row are named below the table of this title."
# Step sizes follow eps, so they differ wherever eps does.
_FOLLOW = {"eps": ("pgd_step_size", "pgd_eot_step_size"), "n_samples": ()}
# Few enough to be legible on a narrow page.
_GRID_IMAGES = 6
_GRID_SAMPLES = 8
# Examples of the attack that averages over the defence's randomness (EoT) come first.
_PREFERRED = ("pgd-eot", "apgd-ce", "pgd")


# Without `eq`: comparing tensors gives no single truth value.
@dataclass(frozen=True, eq=False)
class Plot:
    """Pictures that belong together: one file when saved, side by side on a page.

    Args:
        name: Stem of the file name.
        pictures: Curves.
        rows: A grid of images instead; see `carso_cli.pictures.grids.render_grid`.
        labels: Name of the class of each column of the grid.
        caption: What the grid was drawn from.
    """

    name: str
    pictures: Sequence[Picture] = ()
    rows: Sequence[Row] = ()
    labels: Sequence[str] = ()
    caption: str = ""

    def save(self, folder: Path) -> list[Path]:
        """Write `NAME.png`, `.svg` and `.pdf`, atomically; return the paths.

        Raises:
            CarsoError: If they cannot be written.
        """
        paths = []
        for kind in KINDS:
            paths.append(folder / f"{self.name}.{kind}")
            content = render(self.pictures, kind) if self.pictures else self._grid(kind, LIGHT)
            write_atomically(paths[-1], content)
        return paths

    def for_page(self) -> list[dict[str, Any]]:
        """Return the pictures in both styles, as `page.html.j2` takes them."""
        shown: list[dict[str, Any]] = []
        for picture in self.pictures:
            facts = {"title": picture.title, "caption": picture.caption, "alt": f"{picture.title}, plotted"}
            light, dark = (render([picture], "svg", style, titles=False) for style in (LIGHT, DARK))
            shown.append({**facts, "kind": "svg", "light": light, "dark": dark})
        if self.rows:
            # A PNG, since an SVG of many images is several times as large.
            facts = {"title": "Reconstructions of perturbed images", "caption": self.caption}
            facts["alt"] = "grid of inputs, perturbed inputs, samples and their mean"
            light, dark = (self._grid("png", style) for style in (LIGHT, DARK))
            shown.append({**facts, "kind": "png", "light": light, "dark": dark})
        return shown

    def _grid(self, kind: str, style: Style) -> bytes:
        return render_grid(self.rows, self.labels, kind, ink=style.ink, paper=style.paper)


def accuracy_plot(summary: Mapping[str, Any]) -> Plot:
    """Return one evaluation's accuracies with their intervals, by target and attack.

    Args:
        summary: What `evaluate` returned.
    """
    curves = []
    for target in ("classifier", "defence"):
        rows = [row for row in summary["results"] if row["target"] == target]
        # "none" is a name of the command line.
        names = ["clean" if row["attack"] == "none" else row["attack"] for row in rows]
        points = [(name, row) for name, row in zip(names, rows, strict=True)]
        if target == summary["headline"]["target"] and len(rows) > 2:
            points.append(("worst case", summary["headline"]))
        curves += [_curve(target, points)] if points else []
    identity = summary["settings"]["identity"]
    title = f"{summary['recipe']}: {summary['attack']}, {identity['norm']}, eps {identity['eps']:.4g}"
    caption = f"{summary['n_images']} images, bars: 95% Wilson intervals"
    label = f"accuracy on {summary['n_images']} images, 95% intervals"
    return Plot("accuracy", [Picture(title, curves, label, caption, "choice", limits=(-0.03, 1.03))])


def draw_plots(run: StoredRun, reporter: Reporter, device: str) -> list[Plot]:
    """Return every picture that a run's records allow, with a warning for those that fail."""
    plots = []
    by_eps, by_samples, layers = comparable(run, "eps"), comparable(run, "n_samples"), layer_curves(run)
    # A little beyond [0, 1], so that markers at either end are drawn whole.
    accuracy: dict[str, Any] = {"quantity": "accuracy", "limits": (-0.03, 1.03)}
    if by_eps:
        title, label = f"Accuracy against eps, {run.recipe['threat']['norm']}", "eps, for pixels in [0, 1]"
        picture = Picture(title, eps_curves(by_eps), label, caption_of(by_eps), **accuracy)
        plots.append(Plot("eps", [picture]))
    if by_samples:
        title, label, curves = "Accuracy against samples", "samples N per image", sample_curves(by_samples)
        picture = Picture(title, curves, label, caption_of(by_samples), "doubling", **accuracy)
        plots.append(Plot("samples", [picture]))
    if layers:
        title, label = "Accuracy by layers of the representation", "accuracy of the defence"
        plots.append(Plot("layers", [Picture(title, layers, label, _INTERVALS, "choice", **accuracy)]))
    # The one picture that loads models: their absence must not cost the others.
    try:
        grid = reconstruction_grid(run.path, device)
        plots += [] if grid is None else [grid]
    except CarsoError as error:
        reporter.warning(f"{run.path}: no picture of reconstructions: {error.message}")
    training = training_pictures(run.metrics)
    return [*plots, Plot("training", training)] if training else plots


def training_pictures(metrics: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Return the course of a purifier's training: loss and BCE, KL, beta, rate, accuracy.

    Args:
        metrics: Lines of `metrics.jsonl`; empty for no pictures.
    """
    # Training through the defence logs its accuracy; its loss is then not that of the ELBO.
    whole = "whole" if metrics and "accuracy" in metrics[-1] else "BCE + beta KL"
    accuracies = {"clean": "defence_clean_accuracy", "attacked": "defence_attacked_accuracy"}
    courses = {
        "Loss per image": {whole: "loss", "BCE": "bce"},
        "KL per image, in nats": {"KL": "kl"},
        "Weight beta of the KL": {"beta": "beta"},
        "Learning rate": {"rate": "learning_rate"},
        "Accuracy of the defence, followed": accuracies,
    }
    pictures = []
    for title, keys in courses.items():
        curves = []
        for name, key in keys.items():
            # Epochs count from 0 in the log, from 1 for readers.
            # Not every epoch measures accuracy, and of some runs none does.
            points = [Point(row["epoch"] + 1, row[key]) for row in metrics if row.get(key) is not None]
            curves += [Curve(name, tuple(points))] if points else []
        if curves:
            # At least 0.87 to 1, so that small changes near the top do not fill the picture.
            least = min(0.9, *(point.y for curve in curves for point in curve.points))
            limits = (least - 0.03, 1.01) if keys is accuracies else None
            pictures.append(Picture(title, curves, "epoch", limits=limits))
    return pictures


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
    # What is attacked beside the defence does not change the defence's figures.
    ignored = {key, *_FOLLOW[key], "targets"}
    for one in run.evaluations:
        if "defence" in one.worst:
            rest = {name: value for name, value in one.identity.items() if name not in ignored}
            # As text, since a mapping cannot be a key.
            group = groups.setdefault(json.dumps(rest, sort_keys=True), {})
            group.setdefault(float(one.identity[key]), one)

    def extent(group: dict[float, StoredEvaluation]) -> tuple[int, int]:
        """Return the number of evaluations, then of images."""
        return len(group), next(iter(group.values())).identity["n_images"]

    best = max(groups.values(), key=extent, default={})
    return [best[value] for value in sorted(best)] if len(best) > 1 else []


def eps_curves(found: Sequence[StoredEvaluation]) -> list[Curve]:
    """Return accuracy against eps: defence attacked, under random noise, classifier attacked if it was.

    Args:
        found: `comparable` by `eps`.
    """
    attack = found[0].identity["attack"]
    series = {
        f"defence, attacked ({attack})": ("defence", "worst"),
        "defence, random noise": ("defence", "noise"),
        f"classifier alone, attacked ({attack})": ("classifier", "worst"),
    }
    curves = []
    for name, (target, attack) in series.items():
        rows = [(one.identity["eps"], one.find(target, attack)) for one in found]
        if any(row for _, row in rows):
            # At eps 0 nothing is perturbed.
            curves.append(_curve(name, [(0.0, found[0].find(target, "none")), *rows]))
    return curves


def sample_curves(found: Sequence[StoredEvaluation]) -> list[Curve]:
    """Return accuracy of the defence against its number of samples N: clean and attacked.

    Args:
        found: `comparable` by `n_samples`.
    """
    series = {"clean": "none", f"attacked ({found[0].identity['attack']})": "worst"}
    return [
        _curve(name, [(one.identity["n_samples"], one.find("defence", attack)) for one in found])
        for name, attack in series.items()
    ]


def layer_curves(run: StoredRun) -> list[Curve]:
    """Return accuracy of the defence by the layers of its representation, clean and attacked.

    From the first table of that ablation, in the order of attacks; empty where it was not run.
    """
    return [
        _curve(name, [(row.label, row.accuracy(attack)) for row in ablation.rows])
        for ablation in run.ablations_of("layers")[:1]
        for name, attack in {"clean": "none", f"attacked ({ablation.attack})": "worst"}.items()
    ]


def _curve(name: str, rows: Iterable[tuple[float | str, Mapping[str, Any] | None]]) -> Curve:
    return Curve(name, tuple(Point(x, row["accuracy"], *row["ci95"]) for x, row in rows if row))


def caption_of(found: Sequence[StoredEvaluation]) -> str:
    """Return which evaluations a picture is drawn from."""
    first = found[0].identity
    names = ", ".join(one.path.name for one in found)
    return f"{first['n_images']} images, seed {first['seed']}, bars: 95% Wilson intervals. From {names}."


def reconstruction_grid(run: Path, device: str) -> Plot | None:
    """Return inputs, perturbed inputs, samples and their mean for examples that `carso attack` stored.

    Returns:
        None where the run has no trained purifier, or no examples against its defence.

    Raises:
        CarsoError: If the examples or the run's models cannot be loaded.
    """
    folder = RunFolder(run)
    patterns = [f"{attack}-defence.safetensors" for attack in (*_PREFERRED, "*")]
    # `*` comes last, so a preferred attack stands before it; that it is found twice does no harm.
    stored = [file for pattern in patterns for file in sorted((run / "attacks").glob(pattern))]
    if not stored or not folder.purifier.is_file():
        return None
    tensors, metadata = load_tensors(stored[0])
    names = class_names(folder, load_recipe(str(folder.recipe.resolve())))
    defence = load_defence(run, device=device, n_samples=_GRID_SAMPLES)
    images, perturbed = tensors["images"][:_GRID_IMAGES], tensors["adversarial"][:_GRID_IMAGES]
    seed = int(metadata["seed"])
    # Latents follow from the seed and an image's pixels, so the same report draws the same picture.
    before, after = classify(defence, images, seed), classify(defence, perturbed, seed)
    change, largest = perturbed - images, max(float((perturbed - images).abs().max()), 1e-6)
    rows = [
        Row("clean", images, [names[place] for place in before.decision.tolist()]),
        Row(f"change\n× {0.5 / largest:.3g}", amplified(change, largest)),
        Row("perturbed", perturbed, [names[place] for place in after.decision.tolist()], perturbed=True),
        *(
            Row(f"sample {n + 1}\nof perturbed", after.reconstructions[:, n], perturbed=True)
            for n in range(_GRID_SAMPLES)
        ),
        Row("mean\nof perturbed", after.reconstructions.mean(dim=1), perturbed=True),
        Row("mean\nof clean", before.reconstructions.mean(dim=1)),
    ]
    labels = [names[label] for label in tensors["labels"][:_GRID_IMAGES].tolist()]
    caption = (
        f"Above each column its class, below images the decision of the defence, N = {_GRID_SAMPLES}; "
        "framed: perturbed. "
        f"From {stored[0]}: {metadata['attack']}, eps {metadata['eps']:.4g} under {metadata['norm']}, "
        f"seed {seed}. The samples are those of the perturbed image."
    )
    return Plot("reconstructions", (), rows, labels, caption)
