"""`carso ablate`: which ablation a command line means, what it prints, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from carso_cli.ablation import preflight as ablation_cost
from carso_cli.ablation import run as workflow
from carso_cli.cli.ablation_tables import ablation_parts
from carso_cli.io.json_files import read_json

TINY = (
    *("representation.layers=[layer.2.block.0.conv_1]", "data.train_limit=24", "data.holdout=0"),
    *("training.epochs=1", "training.attack_mix.pgd_steps=1", "training.beta_increase.first_epoch=0"),
    *("training.beta_increase.last_epoch=0", "training.learning_rate.warmup_epochs=1"),
    *("training.learning_rate.plateau_epochs=0", "training.learning_rate.annealing_epochs=0"),
    *("purifier.condition_features=8", "purifier.latent_features=2", "purifier.layer_convolutions=1"),
    *("evaluation.n_samples=2", "evaluation.scoring_draws=2"),
    *("evaluation.eot_draws=1", "evaluation.pgd_eot_steps=2"),
)
SET = [word for override in TINY for word in ("--set", override)]


def figures(accuracy: float) -> dict[str, Any]:
    low, high = max(accuracy - 0.05, 0.0), min(accuracy + 0.05, 1.0)
    return {"accuracy": accuracy, "ci95": [low, high], "worst_of_draws": accuracy, "majority": accuracy}


def row(label: str, clean: float, attacked: float, **changes: Any) -> dict[str, Any]:
    unset = ("noise", "classifier", "transferred", "worst", "paper")
    return {
        **{"label": label, "values": {}, "run": ".", "evaluation": "evaluation/x", "n_images": 50},
        **{"eps": 0.031, "norm": "linf", "n_samples": 8, "aggregation": "doubly-exponential"},
        **{"clean": figures(clean), "attacked": figures(attacked), "failed": [], **dict.fromkeys(unset)},
        "gradients": {"nan-gradients": 0.0, "zero-gradients": 0.0, "saturated-outputs": 0.02},
        "unreliable_gradients": False,
        "training": {"seconds": 61.0, "epochs": 12, "images": 1413},
        "seconds": 30.0,
        **changes,
    }


def stored(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        **{"schema": 1, "title": "Table 17: kinds", "varies": "first/second", "recipe": "digits"},
        **{"attack": "pgd-eot", "note": "", "rows": list(rows)},
        "settings": {"view": "exact", "norm": "linf", "n_images": 50, "draws": 20},
        **changes,
    }


def printed(table: dict[str, Any], wanted: tuple[str, ...] = ()) -> str:
    """Show a table on 80 columns, where nothing may be cut: wider, it has the same words."""
    shown = []
    for width in (80, 300):
        console = Console(width=width, highlight=False)
        with console.capture() as capture:
            for part in ablation_parts(table, wanted):
                console.print(part)
        shown.append(capture.get())
    assert shown[0].split() == shown[1].split()
    return shown[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run nothing: remember the ablations and options that a command line means."""
    seen: list[Any] = []

    def remember(recipe: Any, ablation: Any, **options: Any) -> dict[str, Any]:
        seen.append((recipe, ablation, options))
        return stored(row("AT/AT", 0.9, 0.5), note=options["note"])

    monkeypatch.setattr(workflow, "ablate", remember)
    return seen


# The table


def test_the_papers_figures_stand_beside_ours() -> None:
    text = printed(
        stored(
            row("AT/clean", 0.7, 0.61, paper={"table": "17", "clean": 0.6743, "attacked": "< 0.7070"}),
            row("clean/AT", 0.88, 0.12, paper={"table": "17", "clean": 0.8892, "attacked": 0.7975}),
        )
    )
    lines = [line.split() for line in text.splitlines()]
    at = lines.index(["AT/clean", "0.700", "[0.65,", "0.75]", "0.610", "[0.56,", "0.66]", "upper", "bound"])
    assert lines[at + 1] == ["paper", "0.6743", "<", "0.7070"]
    assert lines[at + 2][:2] == ["clean/AT", "0.880"]
    assert lines[at + 3] == ["paper", "0.8892", "0.7975"]
    assert "released view" in text
    assert "pgd-eot on the exact view, eps 0.031 under linf, 50 images, 20" in " ".join(text.split())
    assert "purifiers: 1, trained in 1 min 01 s; evaluated in 1 min 00 s" in text


def test_without_a_scenario_there_is_no_column_of_the_paper() -> None:
    text = printed(stored(row("AT/AT", 0.9, 0.5), row("clean/AT", 0.8, 0.4)), ("AT/AT",))
    assert "paper" not in text
    assert "AT/AT" in text
    assert "clean/AT" not in text


def test_unusable_gradients_are_flagged_wherever_the_number_stands() -> None:
    best = row("doubly-exponential", 1.0, 0.1, transferred=figures(0.1), worst=figures(0.1))
    vote = row(
        "majority-vote",
        0.9,
        0.88,
        failed=["zero-gradients", "examples-moved"],
        gradients={"nan-gradients": 0.0, "zero-gradients": 0.99, "saturated-outputs": None},
        unreliable_gradients=True,
        transferred=figures(0.2),
        worst=figures(0.19),
    )
    text = printed(stored(best, vote, varies="aggregation"))
    own, transferred = [line for line in text.splitlines() if line.startswith("majority-vote  ")]
    assert "0.93]†" in own
    assert own.endswith("NOT trusted")
    assert "majority-vote: sanity checks failed: zero-gradients, examples-moved" in text
    assert transferred.split() == [
        "majority-vote", "0.200", "[0.15,", "0.25]", "0.190", "[0.14,", "0.24]", "0.99", "†"
    ]  # fmt: skip
    assert "no usable gradients: this accuracy is not robustness" in " ".join(text.split())


def test_baselines_stand_in_a_table_of_their_own() -> None:
    alone = {"clean": 0.95, "clean_ci95": [0.9, 1.0], "attacked": 0.61, "attacked_ci95": [0.5, 0.7]}
    text = printed(stored(row("0.1", 0.9, 0.5, noise=figures(0.85), classifier=alone), varies="eps"))
    assert "0.500" in text
    _, baselines = [line.split() for line in text.splitlines() if line.startswith("0.1")]
    assert baselines == ["0.1", "0.500", "0.850", "0.610"]


# The command line


def test_all_means_the_four_combinations(carso: Any, calls: list[Any], tmp_path: Path) -> None:
    shown = carso("ablate", "--all", "--run", tmp_path / "digits").out
    ((recipe, ablation, options),) = calls
    assert recipe.name == "digits"
    labels = [variant.label for variant in ablation.variants]
    assert labels == ["clean/clean", "AT/clean", "clean/AT", "AT/AT"]
    assert (options["attack"], options["limit"], options["resume"]) == ("pgd-eot", 50, False)
    assert "pgd-eot on 50 test images" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["--first", "clean", "--second", "at"], ["clean/AT"]),
        (["--second", "clean"], ["AT/clean"]),
        (["--all", "--first", "clean"], ["clean/clean", "clean/AT"]),
        (["--n-samples", "4, 1"], ["N = 1", "N = 4"]),
        (["--layers", "last,layer.1"], ["last", "layer.1"]),
        (["--adversarial-fraction", "1/4,0"], ["0", "0.25"]),
        (["--eps", "0,2/255"], ["0.007843", "0"]),
        (["--aggregations"], ["logit-mean", "probability-mean", "doubly-exponential", "majority-vote"]),
    ],
)
def test_what_is_varied(carso: Any, arguments: list[str], labels: list[str], calls: list[Any]) -> None:
    carso("ablate", "digits", *arguments, "--attack", "quick", "--limit", "9", "--resume")
    ((_, ablation, options),) = calls
    assert [variant.label for variant in ablation.variants] == labels
    assert (options["attack"], options["limit"], options["resume"], options["note"]) == ("quick", 9, True, "")


def test_auto_layers_are_varied_by_name_before_any_training(
    carso: Any, calls: list[Any], tmp_path: Path
) -> None:
    auto = ("--set", "representation.layers=auto", "--run", tmp_path / "run")
    carso("ablate", "digits", *auto, "--layers", "all,first")
    carso("ablate", "digits", "--layers", "all,first")
    (recipe, ablation, _), (_, named, _) = calls
    assert recipe.representation.layers == named.variants[0].recipe.representation.layers
    assert [one.values["names"] for one in ablation.variants] == [
        one.values["names"] for one in named.variants
    ]


def test_several_ablations_are_several_tables(carso: Any, calls: list[Any]) -> None:
    shown = carso("ablate", "cifar10", "--n-samples", "1", "--eps", "8/255", "--json")
    assert [call[1].name for call in calls] == ["n-samples", "eps"]
    assert (calls[0][2]["attack"], calls[0][2]["limit"]) == ("adaptive", None)
    assert len(shown.json["ablations"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to vary is chosen"),
        (["--first", "cleen"], "'--first': 'cleen' is not allowed; use clean or at; did you mean 'clean'"),
        (["--n-samples", "1,two"], "'--n-samples': 1,two: 'two' is not allowed; use whole numbers"),
        (["--n-samples", "0"], "--n-samples 0 is not allowed"),
        (["--eps", "8/255,x"], "'--eps': 8/255,x: 'x' is not allowed; use numbers"),
        (["--layers", "all,"], "'--layers': all,: '' is not allowed"),
        (["--all", "--attack", "pgd-eott"], "unknown attack or protocol 'pgd-eott'; did you mean 'pgd-eot'"),
    ],
)
def test_what_cannot_be_varied(arguments: list[str], message: str, calls: list[Any], carso: Any) -> None:
    assert message in carso("ablate", *arguments, code=2).err
    assert calls == []


def test_a_dry_run_shows_what_would_be_done(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], tmp_path: Path, carso: Any
) -> None:
    steps = [
        {"step": "train", "what": "runs/x-first-clean", "state": "missing", "seconds": 130.0},
        {"step": "evaluate", "what": "clean/AT", "state": "missing", "seconds": None},
    ]
    plan = {"title": "Table 17", "steps": steps, "seconds": None, "missing": ["no weights"]}
    monkeypatch.setattr(ablation_cost, "plan_ablation", lambda *_, **__: plan)
    text = carso("ablate", "--all", "--dry-run", "--run", tmp_path / "x").out
    assert "2 min 10 s" in text
    assert "missing: no weights" in text
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_combination_from_nothing_to_a_stored_table(tmp_path: Path, carso: Any) -> None:
    root = tmp_path / "tiny"
    arguments = ["ablate", "digits", *SET, "--run", root, "--device", "cpu", "--limit", "4"]
    (table,) = carso(*arguments, "--first", "clean", "--second", "at", "--json").json["ablations"]
    assert read_json(root / "ablations" / "first-second-pgd-eot.json") == table
    assert [one["label"] for one in table["rows"]] == ["clean/AT"]
    assert (root / table["rows"][0]["evaluation"] / "records.jsonl").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny-first-clean"]
    carso(
        *arguments,
        "--first",
        "clean",
        "--set",
        "training.batch_size=9",
        code=5,
        err="training.batch_size was 64, now 9",
    )


def test_a_spread_over_trainings_is_printed_below_the_table() -> None:
    spread = {"clean": {"mean": 0.9, "deviation": 0.0123}, "attacked": {"mean": 0.5, "deviation": None}}
    table = stored(row("seed 0", 0.9, 0.5), spread={"trainings": 2, **spread})
    text = " ".join(printed(table).split())
    assert "over 2 trainings, mean ± standard deviation: clean 0.9000 ± 0.0123, attacked 0.5000" in text
