"""Ablations on a few digits: what is trained, what is evaluated, and where each number comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carso_cli.ablation import run as workflow
from carso_cli.ablation import transfer
from carso_cli.ablation import variants as known
from carso_cli.ablation.preflight import plan_ablation
from carso_cli.ablation.run import ablate
from carso_cli.ablation.table import make_row
from carso_cli.build import build_classifier, classifier_fingerprint
from carso_cli.errors import InterruptedRun, RecipeError, StateError, UsageError
from carso_cli.evaluation.attack_batch import perturb
from carso_cli.io import download
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.training import purifier, purifier_step
from tests.toys import TINY

IMAGES = 6
Table = tuple[Path, dict[str, Any]]
"""Run folder of the recipe, and the table stored in it."""
pytestmark = pytest.mark.slow
FASHION = (
    *("data.name=fashion-mnist", "data.channels=1", "data.image_size=28", "data.mean=[0.5]"),
    *("data.std=[0.5]", "classifier.at={source: file, file: absent.safetensors}"),
)


OPTIONS: Any = {"attack": "pgd-eot", "limit": IMAGES, "device": "cpu"}


def run(recipe: Recipe, ablation: known.Ablation, root: Path, **options: Any) -> dict[str, Any]:
    return ablate(recipe, ablation, run=root, **{"reporter": SilentReporter(), **OPTIONS, **options})


def plan(recipe: Recipe, ablation: known.Ablation, root: Path) -> dict[str, Any]:
    return plan_ablation(recipe, ablation, run=root, reporter=SilentReporter(), options=OPTIONS)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    # Saved after every step, so that an interrupted training has something to resume from.
    return load_recipe("digits", (*TINY, "training.save_every_minutes=0"))


@pytest.fixture(scope="module")
def table(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The four combinations, run once for all tests that only read, or add to them."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    return root, run(recipe, known.first_and_second(recipe), root)


def identity(root: Path, row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = read_json(root / row["evaluation"] / "settings.json")["identity"]
    return found


def accuracy(root: Path, row: dict[str, Any], attack: str, *, target: str = "defence") -> float:
    """Count once more, straight from the records."""
    lines = read_json_lines(root / row["evaluation"] / "records.jsonl")
    shares = [
        line["correct"] / line["draws"]
        for line in lines
        if (line["attack"], line["target"]) == (attack, target)
    ]
    assert len(shares) == IMAGES
    return float(sum(shares) / len(shares))


def test_first_and_second_instance_are_the_classifiers_asked_for(recipe: Recipe, table: Table) -> None:
    root, stored = table
    weights = {kind: classifier_fingerprint(build_classifier(recipe, kind)) for kind in ("at", "clean")}
    assert weights["at"] != weights["clean"]
    assert [row["label"] for row in stored["rows"]] == ["clean/clean", "AT/clean", "clean/AT", "AT/AT"]
    for row in stored["rows"]:
        used = identity(root, row)
        assert used["classifier"] == weights[row["values"]["first"]]
        assert used["second_classifier"] == weights[row["values"]["second"]]


def test_one_purifier_is_trained_per_first_instance(table: Table) -> None:
    root, stored = table
    rows = {row["label"]: row for row in stored["rows"]}
    assert sorted(path.name for path in root.parent.iterdir()) == ["tiny", "tiny-first-clean"]
    assert {label: row["run"] for label, row in rows.items()} == {
        "clean/clean": "../tiny-first-clean",
        "AT/clean": ".",
        "clean/AT": "../tiny-first-clean",
        "AT/AT": ".",
    }
    purifiers = {label: identity(root, row)["purifier"] for label, row in rows.items()}
    assert purifiers["clean/clean"] == purifiers["clean/AT"] != purifiers["AT/AT"] == purifiers["AT/clean"]
    assert load_recipe(str(root.parent / "tiny-first-clean" / "recipe.yaml")).representation.kind == "clean"
    assert rows["AT/AT"]["training"]["epochs"] == 2


def test_every_number_is_that_of_its_records(table: Table) -> None:
    root, stored = table
    assert read_json(root / "ablations" / "first-second-pgd-eot.json") == stored
    for row in stored["rows"]:
        assert row["clean"]["accuracy"] == pytest.approx(accuracy(root, row, "none"))
        assert row["attacked"]["accuracy"] == pytest.approx(accuracy(root, row, "pgd-eot"))
    assert stored["settings"]["n_images"] == IMAGES
    assert len({row["evaluation"] for row in stored["rows"]}) == 4


def test_what_is_there_is_used_again(recipe: Recipe, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    root, stored = table

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(workflow, "train_purifier", fail)
    monkeypatch.setattr("carso_cli.evaluation.run.attack_block", fail)
    assert run(recipe, known.first_and_second(recipe), root) == stored
    one = run(recipe, known.first_and_second(recipe, [("clean", "at")]), root)
    assert one == stored, "rows of the same settings stay"


def test_other_settings_start_a_new_table(recipe: Recipe, table: Table, recorder: Any) -> None:
    root, stored = table
    chosen = known.first_and_second(recipe, [("at", "at")])
    other = run(recipe, chosen, root, seed=5, reporter=recorder)
    assert [row["label"] for row in other["rows"]] == ["AT/AT"]
    assert any("held rows of other settings" in line for line in recorder.said)
    assert run(recipe, known.first_and_second(recipe), root) == stored


def test_paper_figures_stand_beside_a_scenario(table: Table, recipe: Recipe) -> None:
    root, stored = table
    scenario = recipe.model_copy(update={"reproduces": "Table 2, scenario (a)"})
    (variant,) = known.first_and_second(scenario, [("at", "clean")]).variants
    folder = root / stored["rows"][1]["evaluation"]
    row = make_row(variant, root, folder, read_json(folder / "summary.json"))
    assert row["paper"] == {"table": "17", "clean": 0.6743, "attacked": "< 0.7070"}
    assert stored["rows"][1]["paper"] is None
    vote = known.aggregations(scenario).variants[3]
    row = make_row(vote, root, folder, read_json(folder / "summary.json"))
    assert row["paper"] == {"table": "5", "clean": 0.8691, "attacked": 0.8602}


def test_votes_are_flagged_and_attacked_with_transferred_examples(recipe: Recipe, table: Table) -> None:
    root, _ = table
    stored = run(recipe, known.aggregations(recipe), root)
    rows = {row["label"]: row for row in stored["rows"]}
    assert list(rows) == ["logit-mean", "probability-mean", "doubly-exponential", "majority-vote"]
    assert rows["majority-vote"]["unreliable_gradients"]
    # Counted on the images that are still right.
    assert 0 < rows["majority-vote"]["gradients"]["zero-gradients"] <= 1.0
    assert "zero-gradients" in rows["majority-vote"]["failed"]
    assert not any(row["unreliable_gradients"] for rule, row in rows.items() if rule != "majority-vote")
    records = read_json_lines(root / rows["majority-vote"]["transferred"]["source"] / "records.jsonl")
    assert len(records) == 4 * IMAGES
    distances = {
        rule: {line["index"]: line["distance"] for line in records if line["aggregation"] == rule}
        for rule in rows
    }
    # The same examples under every rule, moved by at least one step of 0.04 and at most eps; an attack on
    # votes could not have moved them. How far three steps come is up to rounding.
    assert all(found == distances["logit-mean"] for found in distances.values())
    assert 0.0399 < max(distances["logit-mean"].values()) <= 0.1001
    voted = read_json_lines(root / rows["majority-vote"]["evaluation"] / "records.jsonl")
    assert {line["distance"] for line in voted} == {0.0}
    for rule, row in rows.items():
        shares = [line["correct"] / line["draws"] for line in records if line["aggregation"] == rule]
        assert row["transferred"]["accuracy"] == pytest.approx(sum(shares) / IMAGES)
        own = read_json_lines(root / row["evaluation"] / "records.jsonl")
        both = [line for line in own if line["attack"] == "pgd-eot"]
        both += [line for line in records if line["aggregation"] == rule]
        assert len(both) == 2 * IMAGES
        assert all(line["correct_selection"] is not None for line in both)
        # Which of the two is worse is decided on other draws than those that are counted.
        worst = [
            min(
                (line for line in both if line["index"] == index),
                key=lambda line: (line["correct_selection"], line["margin"]),
            )
            for index in {line["index"] for line in both}
        ]
        counted = sum(line["correct"] / line["draws"] for line in worst) / IMAGES
        assert row["worst"]["accuracy"] == pytest.approx(counted)


def test_interrupted_transfers_go_on(recipe: Recipe, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = table
    original = perturb

    def stop_at_the_second_block(setting: Any, job: Any, batch: Any, block: int) -> Any:
        if block == 1:
            raise KeyboardInterrupt
        return original(setting, job, batch, block)

    whole = run(recipe, known.aggregations(recipe), root)
    first = whole["rows"][0]["transferred"]["source"]
    before = (root / first / "records.jsonl").read_bytes()
    (root / first / "summary.json").unlink()
    (root / first / "records.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "perturb", stop_at_the_second_block)
        with pytest.raises(InterruptedRun, match="complete blocks are saved"):
            run(recipe, known.aggregations(recipe), root, resume=True)
    with pytest.raises(UsageError, match="holds an unfinished run"):
        run(recipe, known.aggregations(recipe), root)
    again = run(recipe, known.aggregations(recipe), root, resume=True)
    assert sorted((root / first / "records.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())
    assert again == whole


def test_eps_gives_a_curve_with_noise_and_the_bare_classifier(recipe: Recipe, table: Table) -> None:
    root, _ = table
    stored = run(recipe, known.perturbation_sizes(recipe, [0.0, 0.02, 0.3]), root)
    assert [row["eps"] for row in stored["rows"]] == [0.0, 0.02, 0.3]
    none, small, large = stored["rows"]
    assert none["attacked"] == none["noise"] == none["clean"] == small["clean"]
    assert (
        none["classifier"]["attacked"]
        == small["classifier"]["clean"]
        == accuracy(root, small, "none", target="classifier")
    )
    assert large["classifier"]["attacked"] < small["classifier"]["attacked"]
    assert large["attacked"]["accuracy"] == pytest.approx(accuracy(root, large, "pgd-eot"))
    assert identity(root, large)["pgd_eot_step_size"] == pytest.approx(0.12)
    assert large["noise"] is not None


def test_samples_share_the_purifier_and_layers_do_not(recipe: Recipe, table: Table) -> None:
    root, _ = table
    samples = run(recipe, known.sample_counts(recipe, [1, 3]), root, attack="none")
    assert [row["n_samples"] for row in samples["rows"]] == [1, 3]
    assert {row["run"] for row in samples["rows"]} == {"."}
    layers = run(recipe, known.layer_subsets(recipe, ["all", "last"]), root, attack="none")
    assert [(row["label"], row["run"]) for row in layers["rows"]] == [
        ("all", "."),
        ("last", "../tiny-layers-last"),
    ]
    assert layers["rows"][1]["values"]["names"] == ["layer.2.block.0.conv_1"]
    assert load_recipe(str(root.parent / "tiny-layers-last" / "recipe.yaml")).representation.layers == (
        "layer.2.block.0.conv_1",
    )


def test_other_training_is_refused_and_its_section_named(
    table: Table,
) -> None:
    root, _ = table
    other = load_recipe("digits", (*TINY, "training.batch_size=12"))
    with pytest.raises(
        StateError, match=r"tiny was trained with another configuration: training\.batch_size was 24, now"
    ) as caught:
        run(other, known.first_and_second(other, [("at", "at")]), root)
    assert "--run DIR" in caught.value.hint


def test_an_interrupted_training_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    original = purifier_step.train_step

    def stop_in_the_second_epoch(
        setup: Any, state: Any, positions: Any, place: tuple[int, int], *more: Any
    ) -> Any:
        if place[0] == 1:
            raise KeyboardInterrupt
        return original(setup, state, positions, place, *more)

    stored = table[1]
    chosen = known.first_and_second(recipe, [("at", "at")])
    with monkeypatch.context() as patch:
        patch.setattr(purifier, "train_step", stop_in_the_second_epoch)
        with pytest.raises(InterruptedRun, match=r"of 2 epochs.* saved") as caught:
            run(recipe, chosen, tmp_path / "tiny")
    assert caught.value.hint == "resume with the same command and --resume"
    with pytest.raises(UsageError, match="holds an unfinished training"):
        run(recipe, chosen, tmp_path / "tiny")
    (tmp_path / "tiny" / "recipe.yaml").unlink()
    with pytest.raises(UsageError, match=r"recipe\.yaml is missing beside the state of a training"):
        run(recipe, chosen, tmp_path / "tiny")
    resumed = run(recipe, chosen, tmp_path / "tiny", resume=True)
    assert resumed["rows"][0]["attacked"] == stored["rows"][3]["attacked"]
    assert (tmp_path / "tiny" / "recipe.yaml").is_file()


def test_missing_weights_stop_it_before_anything_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    without = recipe.model_copy(update={"classifier": recipe.classifier.model_copy(update={"clean": None})})
    with pytest.raises(RecipeError, match=r"names no weights for classifier\.clean") as caught:
        run(without, known.first_and_second(without), tmp_path / "tiny")
    assert "carso train-classifier digits --kind clean" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    foreseen = plan(without, known.first_and_second(without, [("at", "clean")]), tmp_path / "tiny")
    assert foreseen["missing"] == [f"{caught.value.message} ({caught.value.hint})"]


def test_a_plan_says_what_is_left_to_do_and_does_nothing(
    recipe: Recipe, table: Table, tmp_path: Path
) -> None:
    def states(root: Path) -> list[tuple[str, str, str]]:
        foreseen = plan(recipe, known.first_and_second(recipe, [("clean", "at"), ("at", "at")]), root)
        steps = foreseen["steps"]
        assert foreseen["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))
        assert all((step["seconds"] == 0) == (step["state"] in ("trained", "stored")) for step in steps)
        return [(step["step"], Path(step["what"]).name, step["state"]) for step in steps]

    assert states(table[0]) == [
        ("train", "tiny-first-clean", "trained"),
        ("train", "tiny", "trained"),
        ("evaluate", "AT", "stored"),
        ("evaluate", "AT", "stored"),
    ]
    assert states(tmp_path / "new") == [
        ("train", "new-first-clean", "missing"),
        ("train", "new", "missing"),
        ("evaluate", "AT", "missing"),
        ("evaluate", "AT", "missing"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_training_seeds_share_images_and_attack_and_give_a_spread(recipe: Recipe, table: Table) -> None:
    root, _ = table
    found = run(recipe, known.seeds(recipe, [0, 1, 2]), root)
    used = [identity(root, row) for row in found["rows"]]
    assert len({one["purifier"] for one in used}) == 3
    for shared in ("images", "seed", "classifier"):
        assert len({one[shared] for one in used}) == 1
    attacked = [accuracy(root, row, "pgd-eot") for row in found["rows"]]
    mean = sum(attacked) / 3
    deviation = (sum((one - mean) ** 2 for one in attacked) / 2) ** 0.5
    assert found["spread"]["trainings"] == 3
    assert found["spread"]["attacked"]["mean"] == pytest.approx(mean)
    assert found["spread"]["attacked"]["deviation"] == pytest.approx(deviation)
    assert {step["state"] for step in plan(recipe, known.seeds(recipe, [0, 1, 2]), root)["steps"]} == {
        "trained",
        "stored",
    }


def test_a_mix_of_appendix_a_is_trained_in_a_folder_of_its_own(recipe: Recipe, table: Table) -> None:
    root, _ = table
    found = run(recipe, known.attack_mixes(recipe, ["pgd-only"]), root)
    assert [row["run"] for row in found["rows"]] == [".", "../tiny-mix-pgd-only"]
    stored = load_recipe(str(root.parent / "tiny-mix-pgd-only" / "recipe.yaml"))
    assert stored.training.attack_mix.attacks == ("pgd",)


@pytest.mark.parametrize("vary", [known.aggregations, lambda recipe: known.seeds(recipe, [0, 1])])
def test_a_dry_run_downloads_nothing_and_says_what_fetches_what_is_missing(
    vary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr(download, "open_url", refuse)
    recipe = load_recipe("digits", (*TINY, *FASHION))
    found = plan(recipe, vary(recipe), tmp_path / "run")
    weights, images = found["missing"]
    assert "'absent.safetensors' are missing" in weights
    assert "carso train-classifier digits --kind at" in weights
    assert images.endswith("is not on this machine (fetch it with: carso doctor digits --fetch)")
    assert found["seconds"] is None
    assert all(step["seconds"] > 0 for step in found["steps"] if step["step"] == "train")
