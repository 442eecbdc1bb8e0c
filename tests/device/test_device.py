"""No mixture of devices, and how often the host waits for the device, checked where there is no GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli import load_defence
from carso_cli.ablation import variants
from carso_cli.ablation.run import ablate
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import build_classifier, load_images
from carso_cli.data.image_set import ImageSet
from carso_cli.evaluation.attack import attack
from carso_cli.evaluation.audit import audit
from carso_cli.evaluation.run import evaluate
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.third_party import prepare
from carso_cli.training import classifier as classifier_training
from carso_cli.training import purifier as purifier_training
from carso_cli.training.classifier import train_classifier
from carso_cli.training.purifier import train_purifier
from tests.device.pretended_gpu import DeviceMismatchError, Ledger, pretended_gpu
from tests.toys import TINY, DigitsRun


@pytest.fixture(autouse=True)
def _imported() -> None:
    # Their imports make tensors, which belong on no pretended device.
    prepare()
    import advertorch.attacks  # noqa: F401
    import pyautoattack  # noqa: F401


@pytest.fixture
def run(digits_run: DigitsRun, tmp_path: Path) -> Path:
    """A copy of a run that was trained on the CPU."""
    return Path(shutil.copytree(digits_run.folder, tmp_path / "run"))


def tiny(*overrides: str) -> Recipe:
    return load_recipe("digits", (*TINY, *overrides))


def right_images(recipe: Recipe, run: Path, count: int = 2) -> ImageSet:
    """Images that defence and classifier get right, so that they are attacked at all."""
    images, defence = load_images(recipe, "test", limit=200), load_defence(run, device="cpu")
    pixels = images.pixels(slice(None))
    with torch.no_grad():
        answers = [defence(pixels, view="exact") for _ in range(3)] + [defence.classifier(pixels)]
    right = torch.stack([answer.argmax(dim=1) == images.labels for answer in answers]).all(dim=0)
    assert int(right.sum()) >= count
    return images.select(right.nonzero()[:count, 0])


def steps_of(monkeypatch: pytest.MonkeyPatch, module: Any, gpu: Ledger) -> list[dict[str, int]]:
    """Count, in every training step, the places at which the host waits or copies."""
    found: list[dict[str, int]] = []
    original = module.train_step

    def step(*arguments: Any) -> Tensor:
        before = gpu.waits + gpu.copies
        answer: Tensor = original(*arguments)
        found.append(dict((gpu.waits + gpu.copies) - before))
        return answer

    monkeypatch.setattr(module, "train_step", step)
    return found


def test_it_finds_what_a_gpu_refuses() -> None:
    with pretended_gpu():
        gpu, host = torch.ones(3, device="cuda"), torch.ones(3)
        assert gpu.device == torch.device("cuda:0")
        assert gpu.is_cuda
        assert not host.is_cuda
        wrong: tuple[Callable[[], object], ...] = (
            lambda: gpu + host,
            lambda: torch.cat((gpu, host)),
            lambda: host[torch.zeros(1, dtype=torch.long, device="cuda")],
            lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
            lambda: gpu.numpy(),
            lambda: torch.nn.Linear(3, 3).to("cuda")(host),
            lambda: torch.nn.Linear(3, 3)(gpu),
            lambda: gpu.index_select(0, torch.zeros(1, dtype=torch.long)),
        )
        for mixture in wrong:
            with pytest.raises((DeviceMismatchError, TypeError)):
                mixture()
        leaf = torch.ones(3, requires_grad=True)
        torch.autograd.backward((leaf.to("cuda") * gpu).sum())
        assert leaf.grad is not None
        assert leaf.grad.device.type == "cpu"
        # What a GPU does take.
        _ = gpu[torch.zeros(1, dtype=torch.long)], gpu * torch.tensor(2.0), torch.zeros_like(gpu) + gpu


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_start_of_an_attack_is_the_same_on_every_device(norm: str) -> None:
    images = torch.rand(6, 3, 4, 4)
    pgd = PGD(ThreatModel(norm, torch.full((6,), 0.1)), steps=1, step_size=0.1, seed=3)
    expected = pgd.start(images)
    with pretended_gpu() as gpu:
        radii = torch.full((6,), 0.1, device="cuda")
        pgd = PGD(ThreatModel(norm, radii), steps=1, step_size=0.1, seed=3)
        found = pgd.start(images.to("cuda"))
        assert found.device.type == "cuda"
        assert torch.equal(found.cpu(), expected)
        # Drawn on the CPU: there and back.
        assert gpu.copies.total() <= 6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("objective", ["elbo", "adversarial", "both"])
def test_training_the_purifier(
    objective: str, precision: str, digits_run: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = f"training.initial={digits_run.folder / 'purifier.safetensors'}"
    recipe = tiny(
        *(f"training.objective={objective}", f"precision={precision}", "training.save_every_minutes=0"),
        *((start, "training.adversarial.steps=2") if objective != "elbo" else ()),
        *("training.epochs=1", "training.learning_rate.plateau_epochs=0", "training.attack_mix.pgd_steps=3"),
    )
    with pretended_gpu() as gpu:
        steps = steps_of(monkeypatch, purifier_training, gpu)
        train_purifier(recipe, run=tmp_path / "run", device="cuda")
        # Saved there, loaded there.
        defence = load_defence(tmp_path / "run", device="cuda")
        assert all(tensor.device.type == "cuda" for tensor in defence.state_dict().values())
    environment = read_json(tmp_path / "run" / "environment.json")["cuda"]
    assert environment.keys() == {"cuda", "cudnn", "nccl", "driver", "gpus"}
    assert environment["gpus"] == ["pretended GPU"]
    assert gpu.on_gpu > 1000
    for step in steps:
        # None of them grows with the steps of the attack or the layers.
        assert sum(step.values()) <= {"elbo": 24, "adversarial": 30, "both": 32}[objective], step


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["at", "clean"])
def test_training_a_classifier(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("classifier.training.epochs=1", "classifier.training.batch_size=24")
    with pretended_gpu() as gpu:
        steps = steps_of(monkeypatch, classifier_training, gpu)
        train_classifier(recipe, kind, run=tmp_path / "run", device="cuda", reporter=SILENT)
    pixels = 48 * 3 * 32 * 32
    # Images go there once, as bytes.
    assert sum(n for place, n in gpu.bytes.items() if "data/image_set" in place) <= pixels
    for step in steps:
        assert sum(step.values()) <= 14, step


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_evaluation(precision: str, run: Path) -> None:
    # Too small a radius to break an image: none may be left out as broken before it is attacked.
    recipe = tiny(f"precision={precision}", "threat.eps=1e-6")
    images = right_images(recipe, run)
    with pretended_gpu() as gpu:
        evaluate(recipe, run=run, attack="adaptive", device="cuda", images=images)
    assert gpu.on_gpu > 0.8 * gpu.ops
    records = [line for path in run.glob("evaluation/*/records.jsonl") for line in read_json_lines(path)]
    assert len(records) > 10 * len(images)
    assert not any(line["settled"] for line in records)


@pytest.mark.slow
def test_audit_attack_and_ablation(run: Path) -> None:
    recipe = tiny("threat.eps=0.02")
    images = right_images(recipe, run)
    with pretended_gpu() as gpu:
        model = build_classifier(recipe, "at", "cuda")
        report = audit(model, images, eps=0.02, budget="quick", device="cuda", reporter=SILENT)
        assert report.clean_accuracy > 0
        attack(recipe, run=run, reporter=SILENT, name="pgd", device="cuda", limit=3)
        # A run is ablated as it was trained.
        trained = tiny()
        ablate(
            trained,
            variants.sample_counts(trained, [1, 2]),
            run=run,
            reporter=SILENT,
            attack="fgsm",
            device="cuda",
            limit=3,
        )
    assert gpu.on_gpu > 0.8 * gpu.ops


@pytest.mark.slow
def test_images_of_64_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("data.image_size=64", "training.batch_size=12", "data.train_limit=24", "data.holdout=0")
    images = ImageSet(
        torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8),
        torch.arange(24) % 10,
        torch.arange(24),
        tuple("0123456789"),
    )
    for module in ("carso_cli.training.purifier", "carso_cli.evaluation.setup"):
        monkeypatch.setattr(f"{module}.load_images", lambda *_, **__: images)
    with pretended_gpu() as gpu:
        train_purifier(recipe, run=tmp_path / "run", device="cuda")
        evaluate(recipe, run=tmp_path / "run", attack="pgd", device="cuda", limit=3)
    assert gpu.on_gpu > 1000
