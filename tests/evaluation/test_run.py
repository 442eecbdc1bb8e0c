from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.pgd import PGD
from carso_cli.errors import InterruptedRun, NumericsError, StateError, UsageError
from carso_cli.evaluation import rerun_checks, setup
from carso_cli.evaluation.models import run_recipe
from carso_cli.evaluation.protocols import Job
from carso_cli.evaluation.run import evaluate
from carso_cli.evaluation.setup import prepare_evaluation
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import SilentReporter

MINIMUM = {"schema", "recipe", "run", "n_images", "classifier", "results", "headline", "checks"}
ROW = {"target", "attack", "view", "aggregation", "n_samples", "eps"}
ROW |= {"accuracy", "ci95", "worst_of_draws", "n_images"}


class Breaking(SilentReporter):
    """Interrupts after some number of blocks."""

    def __init__(self, blocks: int, signal_number: int | None = None) -> None:
        self.left = blocks
        self.signal_number = signal_number

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[Breaking]:
        yield self

    def advance(self, steps: int = 1, **figures: float) -> None:
        self.left -= 1
        if self.left < 0 and self.signal_number is not None:
            os.kill(os.getpid(), self.signal_number)
        if self.left < 0:
            raise KeyboardInterrupt


def run(
    toys: ModuleType, folder: Path, defence: Any, images: Any, *overrides: str, **options: Any
) -> dict[str, Any]:
    options = {"defence": defence, "images": images, "device": "cpu", **options}
    return evaluate(toys.small_recipe(*overrides), run=folder, **options)


def records_file(folder: Path) -> Path:
    (path,) = folder.glob("evaluation/*/records.jsonl")
    return path


def records_of(folder: Path) -> bytes:
    return records_file(folder).read_bytes()


def lasting(summary: dict[str, Any]) -> str:
    """A summary without the times that it took."""
    kept = {key: value for key, value in summary.items() if key not in ("seconds", "run")}
    kept["results"] = [{k: v for k, v in row.items() if k != "seconds"} for row in summary["results"]]
    return json.dumps(kept, sort_keys=True)


@pytest.fixture(scope="module")
def whole(toys: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, toys.run_toy(folder, SilentReporter())


def test_planted_examples_are_found_and_no_others(toys: ModuleType, tmp_path: Path) -> None:
    # Only points within 4% of one corner of the ball fool the second image; nothing fools the third.
    defence = toys.LinearDefence(noise=0.0)
    images = toys.images_with_margins(defence, [0.5, 0.96, 1.06, 1.5])
    summary = run(toys, tmp_path, defence, images, attack="adaptive")
    by_image = {
        line["index"]: line["correct"] / line["draws"]
        for line in read_json_lines(records_file(tmp_path))
        if line["job"] == "defence/rand-aa/exact"
    }
    assert by_image == {100: 0.0, 101: 0.0, 102: 1.0, 103: 1.0}
    assert summary["headline"]["accuracy"] == 0.5
    assert summary["classifier"]["clean"] == 1.0
    assert summary["classifier"]["attacked"] == 0.5
    assert summary["failed"] == []


@pytest.mark.slow
def test_summary_holds_what_was_promised(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    assert set(summary) >= MINIMUM
    assert all(set(row) >= ROW for row in summary["results"])
    assert all(
        set(check) == {"name", "value", "threshold", "passed", "meaning", "bound"}
        for check in summary["checks"]
    )
    assert summary["n_images"] == 11
    assert {row["target"] for row in summary["results"]} == {"classifier", "defence"}
    assert len(records_of(folder).splitlines()) == 11 * len(summary["results"])
    assert {**read_json(next(folder.glob("evaluation/*/summary.json"))), "exact": None} == summary
    assert (summary["trusted"], summary["verdict"]) == (True, "trusted")
    broken = sum(row["images"] for row in summary["broken_by"])
    assert 0 < broken <= 11 * (1 - summary["headline"]["accuracy"]) + 1e-9
    low, high = summary["headline"]["ci95"]
    assert low < summary["headline"]["accuracy"] < high
    # The worst case is no more than any attack.
    rows = [row["accuracy"] for row in summary["results"] if row["target"] == "defence"]
    assert summary["headline"]["accuracy"] <= min(rows) + 1e-9


@pytest.mark.slow
def test_broken_images_leave_the_queue(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    lines = read_json_lines(records_file(folder))
    of_image = {line["job"]: line for line in lines if line["index"] == 109}
    assert of_image["defence/none"]["certain"]
    skipped = [line for job, line in of_image.items() if job.startswith("defence/") and job != "defence/none"]
    assert all(line["settled"] and line["settled_by"] == "defence/none" for line in skipped)
    last = {line["index"]: line for line in lines if line["job"] == "defence/square/exact"}
    first = {line["index"]: line for line in lines if line["job"] == "defence/rand-aa/exact"}
    assert any(line["settled_by"] == "defence/rand-aa/exact" for line in last.values())
    # Baselines do not settle: they are compared with each other on the same images.
    assert sum(line["settled"] for line in first.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_interrupting_anywhere_gives_the_same_records(
    toys: ModuleType, whole: tuple[Path, dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    source = random.Random(seed)
    finished = None
    for attempt in range(20):
        try:
            reporter = Breaking(8 * attempt + source.randint(0, 15))
            finished = toys.run_toy(tmp_path, reporter, resume=attempt > 0)
            break
        except InterruptedRun:
            records = next(tmp_path.glob("evaluation/*")) / "records.jsonl"
            if records.is_file() and source.random() < 0.5:
                # As if the process had died while writing.
                content = records.read_bytes()
                records.write_bytes(content[: len(content) - source.randint(0, min(900, len(content)))])
    assert finished is not None
    assert attempt > 2
    assert records_of(tmp_path) == records_of(whole[0])
    assert lasting(finished) == lasting(whole[1])


@pytest.mark.slow
def test_a_killed_process_is_resumed(
    toys: ModuleType, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    program = (
        "import importlib.util, pathlib, sys, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "def load(name, path):\n"
        "    found = importlib.util.spec_from_file_location(name, path)\n"
        "    module = sys.modules[name] = importlib.util.module_from_spec(found)\n"
        "    found.loader.exec_module(module)\n"
        "    return module\n"
        f"toys = load('toys', {str(Path(toys.__file__ or ''))!r}); here = load('here', {__file__!r})\n"
        f"toys.run_toy(pathlib.Path({str(tmp_path)!r}), here.Breaking(17, {int(signal.SIGKILL)}))\n"
    )
    died = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    summary = toys.run_toy(tmp_path, SilentReporter(), resume=True)
    assert records_of(tmp_path) == records_of(whole[0])
    assert lasting(summary) == lasting(whole[1])


@pytest.mark.slow
def test_a_rerun_for_a_sanity_check_is_kept_as_it_finishes(
    toys: ModuleType,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = 3 * len(whole[1]["results"])
    with pytest.raises(InterruptedRun):
        toys.run_toy(tmp_path, Breaking(blocks + 2))
    (stored,) = tmp_path.glob("evaluation/*/checks.jsonl")
    kept = stored.read_bytes()
    ran: list[str] = []
    values = rerun_checks.Rerun.values

    def counted(rerun: rerun_checks.Rerun) -> list[float]:
        ran.append(rerun.name)
        return values(rerun)

    monkeypatch.setattr(rerun_checks.Rerun, "values", counted)
    summary = toys.run_toy(tmp_path, SilentReporter(), resume=True)
    assert ran == ["large-eps-attack", "large-eps-noise"]
    assert stored.read_bytes().startswith(kept)
    assert lasting(summary) == lasting(whole[1])
    times = [line["seconds"] for line in read_json_lines(stored)]
    assert len(times) == 5
    assert summary["seconds"] >= sum(times)


def test_a_stored_result_is_shown_and_never_overwritten_unasked(toys: ModuleType, tmp_path: Path) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.5])
    first = run(toys, tmp_path, defence, images, attack="pgd")
    with pytest.raises(UsageError, match="holds the result of this very evaluation") as refused:
        run(toys, tmp_path, defence, images, attack="pgd")
    assert "--resume" in refused.value.hint
    assert "--force" in refused.value.hint
    before = records_file(tmp_path).stat().st_mtime_ns
    assert run(toys, tmp_path, defence, images, attack="pgd", resume=True) == first
    assert records_file(tmp_path).stat().st_mtime_ns == before
    again = run(toys, tmp_path, defence, images, attack="pgd", force=True)
    assert records_file(tmp_path).stat().st_mtime_ns > before
    assert lasting(again) == lasting(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.2}, r"eps was 0\.1, now 0\.2"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"attack": "apgd-ce"}, "attack was pgd, now apgd-ce"),
        ({"n_samples": 5}, "n_samples was 3, now 5"),
        ({"aggregation": "logit-mean"}, "aggregation was doubly-exponential, now logit-mean"),
        ({"view": "released"}, "view was exact, now released"),
        ({"norm": "l2", "eps": 0.1}, "norm was linf, now l2"),
    ],
)
def test_state_of_another_evaluation_is_refused(
    toys: ModuleType, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.5])
    run(toys, tmp_path, defence, images, attack="pgd")
    with pytest.raises(StateError, match=message):
        run(toys, tmp_path, defence, images, resume=True, **{"attack": "pgd", **options})


def test_other_weights_and_other_images_are_refused(toys: ModuleType, tmp_path: Path) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.5])
    run(toys, tmp_path, defence, images, attack="pgd")
    others = toys.images_with_margins(defence, [0.5, 1.6])
    with pytest.raises(StateError, match=r"configuration: other images$"):
        run(toys, tmp_path, defence, others, attack="pgd", resume=True)
    with pytest.raises(StateError, match=r"purifier.latent_features was \d+, now 7$"):
        run(toys, tmp_path, defence, images, "purifier.latent_features=7", attack="pgd", resume=True)
    with pytest.raises(StateError, match="pgd_steps was 6, now 7"):
        run(toys, tmp_path, defence, images, "evaluation.pgd_steps=7", attack="pgd", resume=True)

    linear = torch.nn.Linear(16, 4)
    module = torch.nn.Sequential(torch.nn.Flatten(), linear)
    folder, options = tmp_path / "module", {"classifier": module, "attack": "pgd"}
    run(toys, folder, None, images, **options)
    with torch.no_grad():
        linear.weight[0, 0] += 1
    with pytest.raises(StateError, match="other weights of the classifier"):
        run(toys, folder, None, images, **options, resume=True)


def test_the_same_weights_under_other_code_are_another_model(toys: ModuleType, tmp_path: Path) -> None:
    class Head(torch.nn.Linear):
        temperature = 1.0

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.flatten(1)) / self.temperature

    plain, warm = Head(16, 4), Head(16, 4)
    warm.load_state_dict(plain.state_dict())
    warm.temperature = 1.1
    images = toys.images_with_margins(toys.LinearDefence(), [0.5, 1.5])
    options = {"attack": "none", "target": "classifier"}
    # As modules, and as functions, which have no weights of their own.
    for name, first, second in (("modules", plain, warm), ("functions", plain.forward, warm.forward)):
        folder = tmp_path / name
        run(toys, folder, None, images, classifier=first, **options)
        with pytest.raises(StateError, match="other answers of the classifier"):
            run(toys, folder, None, images, classifier=second, resume=True, **options)
        run(toys, folder, None, images, classifier=second, **options)
        assert len(list(folder.glob("evaluation/*/summary.json"))) == 2


@pytest.mark.parametrize("attack", ["pgd", "apgd-targeted", "aa"])
def test_without_a_gradient_path_the_next_command_is_named(
    toys: ModuleType, tmp_path: Path, attack: str
) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.5])
    with pytest.raises(UsageError, match="no gradient path leads from the model's scores") as refused:
        run(toys, tmp_path, None, images, classifier=lambda x: defence.classifier(x.detach()), attack=attack)
    assert "carso audit" in refused.value.hint


def test_a_number_without_an_attack_by_gradients_is_not_trusted(toys: ModuleType, tmp_path: Path) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.5])
    found = run(toys, tmp_path, None, images, classifier=defence.classifier, attack="square")
    assert found["verdict"] == "not trusted: no attack followed the model's own gradients"


def test_eot_samples_are_measured_where_the_recipe_gives_none(toys: ModuleType, tmp_path: Path) -> None:
    def draws(noise: float, *overrides: str) -> int:
        defence = toys.LinearDefence(noise=noise, scale=0.5)
        images = toys.images_with_margins(defence, [0.5, 0.7, 0.9, 1.2])
        # One wrong class leads the others: among equals noise would choose the margin's gradient.
        second = ((images.labels + 1) % toys.CLASSES)[:, None] == torch.arange(16) // 4
        images = replace(images, images=images.images + 8 * second.byte().view_as(images.images))
        recipe = toys.small_recipe(*overrides)
        options = {"defence": defence, "images": images, "device": "cpu", "attack": "pgd-eot"}
        found = prepare_evaluation(recipe, run=tmp_path, reporter=SilentReporter(), **options)
        return int(found.setting.budget.eot_draws)

    measured = "evaluation.eot_draws=null"
    assert draws(0.01, measured) == 1
    assert draws(4.0, measured) > 1
    assert draws(4.0, "evaluation.eot_draws=3") == 3


class Rounding(torch.nn.Module):
    """A defence whose gradients in bfloat16 point `turn` radians away from those in float32."""

    def __init__(self, toys: ModuleType, turn: float) -> None:
        super().__init__()
        self.exact, self.turn, self.precision = toys.LinearDefence(noise=0.5, scale=0.5), turn, "fp32"
        self.classifier = self.second_classifier = self.exact.classifier

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattribute__("exact"), name)

    def condition(self, images: Tensor) -> Tensor:
        flat: Tensor = self.exact.condition(images)
        if self.precision != "bf16":
            return flat
        # Pixels by turns: those of a class share a weight, so this adds nothing to a score.
        other: Tensor = flat * torch.tensor([1.0, -1.0]).repeat(8)
        return math.cos(self.turn) * flat + math.sin(self.turn) * other


@pytest.mark.parametrize(
    ("asked", "turn", "fast", "chosen"),
    [
        ("auto", 0.1, True, "bf16"),
        ("auto", 0.2, True, None),
        ("auto", 0.1, False, None),
        ("fp32", 0.1, True, None),
        ("bf16", 0.2, False, "bf16"),
    ],
)
def test_gradients_are_in_bfloat16_where_that_is_fast_and_they_agree(
    toys: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    turn: float,
    fast: bool,
    chosen: str | None,
) -> None:
    monkeypatch.setattr(setup, "multiplies_bf16", lambda device: fast)
    defence = Rounding(toys, turn)
    images = toys.images_with_margins(defence.exact, [0.5, 0.7, 0.9, 1.2])
    options = {"defence": defence, "images": images, "device": "cpu", "attack": "pgd-eot"}
    recipe = toys.small_recipe(f"evaluation.gradient_precision={asked}")
    found = prepare_evaluation(recipe, run=tmp_path, reporter=SilentReporter(), **options)
    assert found.identity.get("gradient_precision") == chosen
    assert found.gradient_precision == (chosen or "fp32")
    if found.gradient_cosine is not None:
        assert found.gradient_cosine == pytest.approx(math.cos(turn), abs=1e-3)
    assert (found.gradient_cosine is None) == (asked == "fp32" or (asked == "auto" and not fast))
    # The choice is about the target's gradients; what scores, and the caller's defence, stay as they are.
    target = found.setting.models.target(Job("defence", "pgd-eot", "exact"), 0, 0)
    assert isinstance(target, DefenceTarget)
    assert (target.followed is None) == (chosen is None)
    assert (defence.precision, getattr(target.defence, "precision", None)) == ("fp32", "fp32")


def test_a_defence_without_a_precision_keeps_its_gradients(toys: ModuleType, tmp_path: Path) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.5])
    found = run(toys, tmp_path, defence, images, "evaluation.gradient_precision=bf16", attack="pgd-eot")
    assert found["settings"]["gradients"] == {"precision": "fp32", "cosine": None}


def test_scores_do_not_depend_on_batches_or_passes(toys: ModuleType, tmp_path: Path) -> None:
    defence = toys.LinearDefence(noise=1.5)
    images = toys.images_with_margins(defence, [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.02])

    def clean(name: str, *overrides: str) -> list[tuple[int, int, float]]:
        run(toys, tmp_path / name, defence, images, *overrides, attack="none", target="defence")
        lines = read_json_lines(records_file(tmp_path / name))
        return [(one["index"], one["correct"], one["margin"]) for one in lines if one["attack"] == "none"]

    first = clean("a")
    assert 0 < sum(correct for _, correct, _ in first) < 35
    for name, setting in (("b", "evaluation.batch_size=2"), ("c", "evaluation.samples_per_pass=6")):
        assert [row[:2] for row in clean(name, setting)] == [row[:2] for row in first]


def test_an_attack_that_leaves_the_ball_is_named(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheat(attack: Any, target: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"pgd": (images + 0.11).clamp(0, 1)}

    monkeypatch.setattr(PGD, "candidates", cheat)
    defence = toys.LinearDefence()
    with pytest.raises(NumericsError, match=r"attack 'pgd' .*left the ball.* 2 of 2 images: .*0\.11"):
        run(toys, tmp_path, defence, toys.images_with_margins(defence, [0.5, 1.5]), attack="pgd")


@pytest.mark.slow
def test_published_is_labelled_and_says_whether_the_exact_view_was_attacked(
    toys: ModuleType, tmp_path: Path
) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 1.2, 1.5])
    first = run(toys, tmp_path, defence, images, attack="published")
    assert first["label"].startswith("as published")
    assert {row["view"] for row in first["results"] if row["attack"] == "rand-aa"} == {"released"}
    assert first["exact"]["accuracy"] is None
    assert first["exact"]["note"].startswith("not run")
    adaptive = run(toys, tmp_path, defence, images, attack="adaptive")
    assert adaptive["exact"] is None
    # Looked up when the result is shown, and only at the same budget.
    again = run(toys, tmp_path, defence, images, attack="published", resume=True)
    assert again["exact"]["accuracy"] == adaptive["headline"]["accuracy"]
    other = run(toys, tmp_path, defence, images, "evaluation.apgd_steps=9", attack="published")
    assert other["exact"]["accuracy"] is None


def test_a_classifier_alone_needs_no_defence(toys: ModuleType, tmp_path: Path) -> None:
    defence = toys.LinearDefence()
    images = toys.images_with_margins(defence, [0.5, 0.97, 1.03, 1.5])
    summary = run(toys, tmp_path, None, images, classifier=defence.classifier, attack="pgd")
    assert {row["target"] for row in summary["results"]} == {"classifier"}
    assert summary["headline"]["accuracy"] == 0.5
    assert summary["results"][0]["draws"] == 1


def test_a_purifier_whose_recipe_is_lost_is_not_evaluated_by_another(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    assert run_recipe(recipe, RunFolder(tmp_path)) is recipe
    (tmp_path / "purifier.safetensors").write_bytes(b"")
    with pytest.raises(StateError, match=r"recipe\.yaml is missing: how the purifier beside it was trained"):
        run_recipe(recipe, RunFolder(tmp_path))
