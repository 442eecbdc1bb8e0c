from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from carso_cli import __version__
from carso_cli.attacks.registry import ATTACKS
from carso_cli.build import build_classifier, build_purifier, classifier_fingerprint
from carso_cli.cli.evaluation_tables import evaluation_tables
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.paper import paper_figures, paper_row

SMALL = (
    *("purifier.condition_features=8", "purifier.latent_features=4", "evaluation.n_samples=2"),
    *("evaluation.scoring_draws=3", "evaluation.eot_draws=2", "evaluation.square_queries=3"),
    *("evaluation.pgd_steps=2", "evaluation.apgd_steps=2", "evaluation.pgd_eot_steps=2"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of digits as training leaves it, its purifier's weights random."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "digits")
    folder.path.mkdir()
    recipe = load_recipe("digits", SMALL)
    classifier = build_classifier(recipe, "at")
    torch.manual_seed(0)
    purifier = build_purifier(recipe, classifier)
    folder.recipe.write_text(dump_recipe(recipe))
    metadata = {
        "recipe": recipe_hash(recipe, TRAINING_SECTIONS),
        "classifier": classifier_fingerprint(classifier),
        "layers": list(recipe.representation.layers),
        "version": __version__,
    }
    save_tensors(folder.purifier, purifier.state_dict(), metadata)
    return folder.path


def test_a_single_attack(trained: Path, carso: Any) -> None:
    command = ("evaluate", "--run", trained, "--attack", "pgd", "--limit", 10, "--n-samples", 3)
    printed = carso(*command, "--json").json
    measured = [f"{row['target']} {row['attack']}" for row in printed["results"]]
    assert measured == ["classifier none", "classifier pgd", "defence none", "defence pgd"]
    assert printed["results"][-1]["n_samples"] == 3
    assert printed["n_images"] == 10
    assert printed["classifier"]["clean"] > 0.7
    # Again: refused, then shown from disk, then at another eps refused.
    carso(*command, code=2, err="--resume completes it and shows its result")
    assert carso(*command, "--resume", "--json").json == printed
    carso(*command, "--resume", "--eps", "8/255", code=5, err="eps was 0.1, now 0.031372")
    shown = carso(*command, "--resume")
    first, *rest = shown.out.splitlines()
    # One attack bounds the robust accuracy from above: no check makes the number trusted.
    counts = "upper bound: no check failed, "
    assert printed["failed"] or (printed["trusted"] is None and printed["verdict"].startswith(counts))
    number = printed["headline"]["accuracy"]
    assert first.startswith(f"attacked accuracy {number:.3f} [")
    assert first.endswith(f"on 10 images: {printed['verdict']}")
    assert rest[-1].startswith(f"checks: {len(printed['failed'])} failed, ")
    assert "rule-agreement" not in shown.out
    assert "rule-agreement" in carso(*command, "--resume", "-v").out
    assert "Table 2" in carso(*command, "--resume", "--table").out


def test_strict_fails_after_the_result_is_stored(trained: Path, carso: Any) -> None:
    # Majority vote has no gradient: nothing that an attack on it does can be trusted.
    command = ("evaluate", "--run", trained, "--attack", "pgd-eot", "--limit", 12, "--target", "defence")
    captured = carso(*command, "--aggregation", "majority-vote", "--strict", "--json", code=4)
    assert "zero-gradients" in json.loads(captured.out)["failed"]
    assert "not trusted: gradients are zero" in captured.err
    assert list(trained.glob("evaluation/pgd-eot-*/summary.json"))


def test_a_run_that_is_not_there(tmp_path: Path, carso: Any) -> None:
    run = tmp_path / "none"
    shown = carso("evaluate", "--run", run, "--limit", 2, code=5).err
    assert f"carso train-purifier digits --run {run}" in shown
    assert not run.exists()
    carso("evaluate", "--run", run, "--limit", 2, "--target", "classifier", "--attack", "fgsm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attack", "pgd-eto"), "did you mean 'pgd-eot'"),
        (
            ("--view", "exakt"),
            "use exact, log-probability or released; did you mean 'exact'",
        ),
        (
            ("--aggregation", "mean"),
            "'--aggregation': 'mean' is not allowed; use doubly-exponential,",
        ),
        (
            ("--target", "defense"),
            "'defense' is not allowed; use classifier or defence; did you mean",
        ),
        (("--norm", "l1"), "'--norm': 'l1' is not allowed; use linf or l2"),
        (("--attack", "aa", "--target", "defence"), "does not fit the target 'defence'"),
        (("--set", "evaluation.n_sample=3"), "n_samples"),
        (("--eps", "8"), "--eps: eps 8 is more than the whole range of pixels, [0, 1]; did you mean 8/255?"),
        (("--set", "threat.eps=8"), "did you mean 8/255?"),
        (("--set", "threat.eps=256"), "eps 256 is more than the whole range of pixels, [0, 1]"),
    ],
)
def test_wrong_input(trained: Path, carso: Any, options: tuple[str, ...], message: str) -> None:
    assert message in carso("evaluate", "--run", trained, *options, code=2).err


def test_a_run_of_another_recipe_is_refused(trained: Path, carso: Any) -> None:
    message = "was trained with recipe 'digits', not 'cifar10': data.name was \"digits\", now \"cifar10\""
    carso("evaluate", "cifar10", "--run", trained, code=5, err=message)


@pytest.mark.slow
def test_a_recipe_that_the_runs_own_extends_may_be_named(trained: Path, carso: Any, tmp_path: Path) -> None:
    # Trained as `digits`; this one has the same data and classifier, and other values of training.
    (tmp_path / "mine.yaml").write_text(
        "extends: digits\nname: mine\ndescription: mine\npurifier: {latent_features: 7}\nthreat: {eps: 0.2}\n"
    )
    options = ("--attack", "none", "--limit", "3", "--device", "cpu", "--json", "--force")
    told = f"warning: {trained} was trained with other values than those of recipe 'mine', and its own"
    shown = carso("evaluate", tmp_path / "mine.yaml", "--run", trained, *options, err=told)
    assert "purifier.latent_features was 4, now 7" in shown.err
    assert shown.json["settings"]["identity"]["eps"] == 0.2
    alone = carso("evaluate", "--run", trained, *options)
    assert "was trained with other values" not in alone.err
    assert alone.json["headline"]["accuracy"] == shown.json["headline"]["accuracy"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("purifier.input_share=0.5", "trained with purifier.input_share 0.0; --set purifier.input_share=0.5"),
        ("classifier.at={source: file, file: no.pt}", 'trained with classifier.at {"source": "shipped"'),
        ("classifier.at.name=digits-clean", 'trained with classifier.at.name "digits-at"'),
        ("training.epochs=20", "trained with training.epochs 12"),
        ("seed=7", "use --seed"),
    ],
)
def test_what_a_trained_run_cannot_follow_is_refused(
    trained: Path, carso: Any, override: str, message: str
) -> None:
    commands = (("evaluate",), ("attack", "--out", "x.safetensors"), ("ablate", "--n-samples", "1,2"))
    for command in commands:
        assert message in carso(*command, "--run", trained, "--set", override, code=5).err


def test_under_l2_a_perturbation_may_be_longer_than_the_range_of_a_pixel(carso: Any, trained: Path) -> None:
    command = ("evaluate", "--run", trained, "--attack", "pgd", "--limit", 4, "--dry-run")
    carso(*command, "--norm", "l2", "--eps", "2")


def test_what_a_trained_run_may_be_given_afresh(trained: Path, carso: Any) -> None:
    fresh = ("data.root=/nowhere", "precision=bf16", "threat.eps=0.2", "evaluation.pgd_steps=3")
    stored = ("purifier.latent_features=4", "training.epochs=12", "seed=0")
    options = [part for text in fresh + stored for part in ("--set", text)]
    command = ("evaluate", "--run", trained, "--attack", "pgd", "--limit", 4)
    settings = carso(*command, *options, "--dry-run", "--json").json["settings"]
    assert (settings["eps"], settings["pgd_steps"]) == (0.2, 3)


def test_a_run_in_a_recipes_place_is_named(trained: Path, carso: Any) -> None:
    carso("evaluate", trained.parent / "." / trained.name, code=2, err=f"give --run {trained}")


def test_dry_run_predicts_and_does_nothing(trained: Path, carso: Any) -> None:
    before = sorted(trained.rglob("*"))
    found = carso("evaluate", "--run", trained, "--limit", 6, "--dry-run", "--json").json
    assert found["settings"]["eot_draws"] == 2
    jobs = {job["job"]: job["seconds"] for job in found["cost"]["jobs"]}
    checks = {check["check"]: check["seconds"] for check in found["cost"]["checks"]}
    assert found["cost"]["seconds"] == pytest.approx(sum(jobs.values()) + sum(checks.values()))
    # On the same six images; APGD's gradient at the start is not doubled.
    assert 1 < checks["twice-the-steps"] / jobs["defence/rand-aa/exact"] < 2
    assert checks["large-eps-noise"] == pytest.approx(jobs["defence/noise"])
    assert checks["eot-adequacy"] > 0
    assert jobs["defence/rand-aa/exact"] > jobs["defence/pgd/exact"] > jobs["defence/noise"] > 0
    assert sorted(trained.rglob("*")) == before
    assert "in all, at most about" in carso("evaluate", "--run", trained, "--limit", 6, "--dry-run").out


@pytest.mark.slow
def test_attack_saves_examples(trained: Path, tmp_path: Path, carso: Any) -> None:
    out = tmp_path / "found" / "examples.safetensors"
    found = carso("attack", "--run", trained, "--attack", "fgsm", "--limit", 4, "--out", out, "--json").json
    assert (found["n_images"], found["target"]) == (4, "defence")
    assert out.is_file()
    assert out.with_suffix(".png").is_file()
    carso("attack", "--run", trained, "--attack", "quick", code=2, err="'quick' is a protocol")


@pytest.mark.slow
def test_tables_fit_eighty_columns(trained: Path, carso: Any) -> None:
    options = ("--attack", "published", "--limit", 10, "--json")
    summary: dict[str, Any] = carso("evaluate", "--run", trained, *options).json
    summary["settings"]["reproduces"] = "Table 2, scenario (a)"
    # The longest names that there are.
    summary["results"][-1] |= {"attack": max(ATTACKS, key=len), "view": "log-probability"}
    console = Console(width=80, record=True, file=None, highlight=False)
    with console.capture() as captured:
        first, *parts = evaluation_tables(summary, tables=True, verbose=True)
        for part in parts:
            console.print(part)
    text = captured.get()
    assert str(first).startswith("attacked accuracy ")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    # The paper's figures stand under ours, by that name.
    paper = next(line for line in text.splitlines() if line.strip().startswith("paper"))
    assert [float(word) for word in paper.split()[1:6]] == [0.922, 0.869, 0.677, 0.761, 0.769]
    assert "as published" in text
    assert "On the exact view: not run" in " ".join(text.split())
    assert "…" not in text
    for name in ("rand-aa", "released", "rule-agreement", max(ATTACKS, key=len), "log-probability", " most"):
        assert name in text


def test_paper_figures_are_found_by_what_a_recipe_reproduces() -> None:
    further = paper_row("Table 18, CIFAR-100, Rebuffi et al. (2021)", "2")
    assert further is not None
    assert (further["C/randAA"], further["dataset"]) == (0.558, "CIFAR-100")
    assert paper_row("Table 18, CIFAR-100, Rebuffi et al. (2021)", "17") is None
    row = paper_row("Table 2, scenario (b)", "2")
    assert row is not None
    columns = ("AT/Cl", "C/Cl", "AT/AA", "C/randAA", "PGD+EoT")
    assert [row[name] for name in columns] == [0.7385, 0.6806, 0.3918, 0.6665, None]
    assert paper_row("", "2") is None
    table_four = paper_figures()["4"]["(a)"]
    assert table_four["doubly-exponential"]["C/randAA"] == paper_figures()["2"]["(a)"]["C/randAA"]
    assert table_four["logit-mean"]["C/randAA"] == 0.0086
