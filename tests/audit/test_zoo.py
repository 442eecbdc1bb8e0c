"""An audit finds the true robustness of models, or says that its number is not to be trusted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import TRUTH, ZOO, clean_accuracy, truth_of
from zoo_networks import EPS, WEIGHTS, held_out_images, load, train

SOUND = [name for name, entry in ZOO.items() if entry.sound]
MASKED = [name for name, entry in ZOO.items() if not entry.sound]
CHANGING = ("batch-statistics", "remembers", "every-fourth")
"""Models whose answer depends on more than the image: no number about them is to be trusted."""
SHORT = (
    "quantised",
    "clamped-log",
    "decoy",
    "true-at-the-start",
    "bare-ripple",
    "remembers",
    "robust",
    "noise",
)
"""What is audited without `--zoo`, at a small budget and on few images: a model of each kind of masking."""
_MASKED_IMAGES, _SOUND_IMAGES = 100, 200


def audited(name: str, count: int, budget: str = "standard") -> Any:
    from carso_cli.evaluation.audit import audit
    from carso_cli.runtime.reporter import SilentReporter

    images, labels = held_out_images(count)
    return audit(
        ZOO[name].make(),
        images,
        labels,
        eps=EPS,
        budget=budget,
        device="cpu",
        name=name,
        reporter=SilentReporter(),
    )


@pytest.fixture(autouse=True)
def _whole_zoo_on_demand(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("zoo") and not request.config.getoption("--zoo"):
        pytest.skip("the whole zoo takes an hour of a core: pytest tests/audit --zoo")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_model_of_each_kind_is_broken_or_distrusted(name: str) -> None:
    report, truth = audited(name, 60, budget="quick"), TRUTH[name][0]
    if ZOO[name].sound:
        assert report.trusted, told(name, report, truth)
    # The truth is of 100 images, these are the first 60 of them.
    assert not report.trusted or abs(report.accuracy - truth) <= 0.1, told(name, report, truth)


@pytest.fixture(scope="module")
def masked_reports() -> dict[str, Any]:
    """Reports of the masked models, each made by the test that asks first."""
    return {}


def masked_report(name: str, reports: dict[str, Any]) -> Any:
    if name not in reports:
        reports[name] = audited(name, _MASKED_IMAGES)
    return reports[name]


def told(name: str, report: Any, truth: float) -> str:
    return f"{name}: headline {report.accuracy:.3f}, truth {truth:.3f}, {report.verdict}"


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_a_masked_model_is_broken_or_distrusted(name: str, masked_reports: dict[str, Any]) -> None:
    report, truth = masked_report(name, masked_reports), TRUTH[name][0]
    assert not report.trusted or abs(report.accuracy - truth) <= 0.02, told(name, report, truth)
    if name in CHANGING:
        assert not report.trusted, told(name, report, truth)


@pytest.mark.zoo
@pytest.mark.slow
def test_the_headline_is_near_the_truth_on_three_quarters_of_the_masked_models(
    masked_reports: dict[str, Any],
) -> None:
    far = [
        told(name, masked_report(name, masked_reports), TRUTH[name][0])
        for name in MASKED
        if abs(masked_report(name, masked_reports).accuracy - TRUTH[name][0]) > 0.05
    ]
    assert len(far) <= len(MASKED) / 4, "\n".join(far)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_is_trusted_and_its_headline_is_the_truth(name: str) -> None:
    report, truth = audited(name, _SOUND_IMAGES), TRUTH[name][1]
    assert report.trusted, told(name, report, truth)
    assert abs(report.accuracy - truth) <= 0.01, told(name, report, truth)
    assert report.n_images == _SOUND_IMAGES


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["robust", "plain", "transformer"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_library_does_not_beat_the_headline(name: str) -> None:
    """Foolbox's PGD on cross-entropy and its basic iterative method, 10 restarts of 100 steps."""
    foolbox = pytest.importorskip("foolbox")
    images, labels = held_out_images(_MASKED_IMAGES)
    model = ZOO[name].make()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    withstands = torch.ones(len(images), dtype=torch.bool)
    attacks = [
        *[foolbox.attacks.LinfPGD(steps=100, rel_stepsize=0.05) for _ in range(5)],
        *[foolbox.attacks.LinfBasicIterativeAttack(steps=100, rel_stepsize=0.05) for _ in range(5)],
        foolbox.attacks.LinfDeepFoolAttack(steps=100),
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for attack in attacks:
            _, clipped, _ = attack(wrapped, images, labels, epsilons=EPS)
            assert float((clipped - images).abs().max()) <= EPS + 1e-5
            withstands &= model(clipped).argmax(dim=1) == labels
    report = audited(name, _MASKED_IMAGES)
    assert report.accuracy <= float(withstands.float().mean()) + 0.01


# The zoo itself.


def test_the_zoo_is_large_and_every_truth_is_known() -> None:
    assert len(ZOO) >= 40
    assert len(MASKED) >= 25
    assert len(SOUND) >= 15
    assert set(TRUTH) == set(ZOO)
    for name, truths in TRUTH.items():
        assert all(0 <= truth <= 1 for truth in truths), name
    assert WEIGHTS.stat().st_size < 150_000


@pytest.mark.parametrize("name", ZOO)
def test_every_model_is_right_on_clean_images(name: str) -> None:
    least = 0.5 if ZOO[name].random else 0.8
    assert clean_accuracy(ZOO[name], 100) >= least
    images, _ = held_out_images(3)
    with torch.no_grad():
        shape = ZOO[name].make()(images).shape
    assert shape == (3, {"dead-class": 11, "masked-classes": 12}.get(name, 10))


@pytest.mark.parametrize("name", ["robust", "decoy", "thermometer"])
def test_a_short_attack_finds_no_less_than_the_truth(name: str) -> None:
    assert float(truth_of(name, 100, steps=10).mean()) >= TRUTH[name][0] - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["robust", "plain", "norm", "winners", "transformer"])
def test_training_again_gives_networks_as_accurate(name: str) -> None:
    images, labels = held_out_images(200)
    stored, trained = (
        float((network(images).argmax(dim=1) == labels).float().mean())
        for network in (load(name), train(name))
    )
    assert abs(stored - trained) <= 0.02
