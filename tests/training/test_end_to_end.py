"""Objectives beyond the paper: the purifier trained through the whole defence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.build import (
    build_classifier,
    build_purifier,
    build_second_classifier,
    channels_last,
    load_defence,
    load_images,
)
from carso_cli.data.augmentation import augment
from carso_cli.data.image_set import epoch_batches, split_holdout
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import ENCODER_PARTS
from carso_cli.distributed.world import World
from carso_cli.errors import NumericsError, RecipeError, StateError, WeightsError
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.training import end_to_end, purifier_step
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.end_to_end import EndToEnd, adversarial_terms, perturbed
from carso_cli.training.optim import Lookahead, kl_weight, learning_rate

PLACE = (1, 2)


@pytest.fixture(scope="module")
def through(small: Any, elbo_run: Path) -> Callable[..., Recipe]:
    """Loads a recipe that trains through the defence, from the purifier of a run."""

    def through(*overrides: str, start: Path = elbo_run) -> Recipe:
        initial = f"training.initial={start / 'purifier.safetensors'}"
        rates = (f"training.learning_rate.{name}=0.005" for name in ("plateau", "final"))
        recipe: Recipe = small("training.objective=adversarial", initial, *rates, *overrides)
        return recipe

    return through


@pytest.fixture(scope="module")
def adversarial_run(through: Any, train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through the defence; not to be changed."""
    run = tmp_path_factory.mktemp("adversarial") / "run"
    train(through(), run, limit=48)
    return run


@pytest.mark.parametrize("objective", ["adversarial", "both"])
def test_gradients_are_those_of_the_written_out_loss_in_float64(through: Any, objective: str) -> None:
    chosen = through(
        *(f"training.objective={objective}", "training.adversarial.elbo_weight=0.01"),
        *("training.adversarial.adversarial_fraction=0.6", "training.adversarial.n_samples=3"),
    )
    classifier = build_classifier(chosen, "at")
    with seeded(0, "test"):
        purifier = build_purifier(chosen, classifier)
    trained = EndToEnd(chosen, classifier, purifier.eval(), None)
    images = load_images(chosen, "train", limit=5).pixels(slice(None))
    labels = load_images(chosen, "train", limit=5).labels
    terms = adversarial_terms(trained, trained, images, labels, PLACE, 0.5, World(torch.device("cpu")))
    torch.autograd.backward(terms["loss"])
    gradients = {name: one.grad for name, one in purifier.named_parameters() if one.grad is not None}

    # The same in float64 from the parts: three of the five images are perturbed, the noise is given.
    seed = derive_seed(0, "attack on the defence", *PLACE, 0)
    attacked = perturbed(chosen, trained.defence, images[:3], labels[:3], seed)
    inputs = torch.cat((attacked, images[3:]))
    latents = torch.randn(5, 3, 4, generator=generator(0, "prior", *PLACE)).double()
    noise = torch.randn(5, 4, generator=generator(0, "posterior", *PLACE)).double()
    wide = copy.deepcopy(trained.defence).double()

    def log_p(batch: Tensor, drawn: Tensor) -> Tensor:
        samples = wide.sample_logits(wide.condition(batch), drawn)
        return samples.logsumexp(dim=1).log_softmax(dim=1)

    expected = -log_p(inputs.double(), latents).gather(1, labels[:, None]).sum()
    if objective == "both":
        condition, target = wide.condition(inputs.double()), images.double()
        mean, log_variance = wide.purifier.encode(inputs.double(), condition)
        decoded = wide.purifier.decode(mean + noise * (0.5 * log_variance).exp(), condition)
        bce = -(target * decoded.log() + (1 - target) * (1 - decoded).log()).sum()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        expected = expected + 0.01 * (bce + 0.5 * kl)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.autograd.backward(expected)
    for name, parameter in wide.purifier.named_parameters():
        if objective == "adversarial" and name.startswith(ENCODER_PARTS):
            assert name not in gradients
        else:
            reference = parameter.grad
            assert reference is not None
            error = (gradients[name].double() - reference).abs().max() / reference.abs().max()
            assert error < 1e-3, name


@pytest.mark.slow
def test_the_elbo_is_trained_on_as_written_out_step_by_step(small: Any, elbo_run: Path) -> None:
    found, header = load_tensors(elbo_run / "purifier.safetensors")
    assert header["objective"] == "elbo"
    for name, tensor in _naive_elbo(small(), 80).items():
        assert torch.equal(found[name], tensor), name


def _naive_elbo(chosen: Recipe, limit: int) -> dict[str, Tensor]:
    """The paper's training without anything that other objectives need."""
    classifier, section = build_classifier(chosen, "at"), chosen.training
    with seeded(chosen.seed, "purifier weights"):
        purifier = build_purifier(chosen, classifier)
    channels_last(purifier)
    images, _ = split_holdout(load_images(chosen, "train", limit=limit), chosen.data.holdout, chosen.seed)
    perturb = BalancedBatch(chosen, classifier)
    optimiser = torch.optim.RAdam(purifier.parameters())
    lookahead = Lookahead(dict(purifier.named_parameters()), steps=6, decay=0.8)
    for epoch in range(section.epochs):
        optimiser.param_groups[0]["lr"] = learning_rate(epoch, **section.learning_rate.model_dump())
        beta = kl_weight(epoch, **section.beta_increase.model_dump())
        for number, batch in enumerate(epoch_batches(len(images), section.batch_size, chosen.seed, epoch)):
            clean, labels = images.pixels(batch), images.labels[batch]
            inputs = perturb(clean, labels, derive_seed(chosen.seed, "perturbation", epoch, number))
            representation = extract_representation(classifier, inputs, chosen.representation.layers)
            noise = torch.randn(len(batch), 4, generator=generator(chosen.seed, "posterior", epoch, number))
            decoded, mean, log_variance = purifier(inputs, representation, noise)
            kl = -0.5 * (1.0 + log_variance - mean.square() - log_variance.exp()).sum()
            optimiser.zero_grad()
            torch.autograd.backward(F.binary_cross_entropy(decoded, clean, reduction="sum") + beta * kl)
            optimiser.step()
            lookahead.step()
    with torch.no_grad():
        for name, parameter in purifier.named_parameters():
            parameter.copy_(lookahead.slow[name])
    return dict(purifier.state_dict())


@pytest.mark.slow
def test_training_goes_down_the_loss_and_moves_only_what_it_should(
    elbo_run: Path, adversarial_run: Path
) -> None:
    # The warm-up, at a rate of next to nothing, sees the defence as it was.
    first, *_, last = read_json_lines(adversarial_run / "metrics.jsonl")
    assert last["loss"] < 0.8 * first["loss"]
    assert 0.0 <= last["accuracy"] <= 1.0
    assert "bce" not in last
    assert 0.0 <= last["defence_attacked_accuracy"] <= last["defence_clean_accuracy"] <= 1.0
    # Batch normalisation keeps its statistics, and the posterior's encoder its weights.
    earlier, later = (load_tensors(run / "purifier.safetensors") for run in (elbo_run, adversarial_run))
    kept = [name for name in earlier[0] if "running" in name or name.startswith(ENCODER_PARTS)]
    assert len(kept) > 20
    assert all(torch.equal(earlier[0][name], later[0][name]) for name in kept)
    assert later[1]["objective"] == "adversarial"


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
def test_images_are_shifted_and_mirrored_as_for_the_classifier(through: Any, flip: bool) -> None:
    more = "training.adversarial.augment=true", f"classifier.training.flip={str(flip).lower()}"
    images = load_images(through(), "train", limit=20)
    moved = augment(images.pixels(slice(None)), flip=flip, generator=generator(0, "augmentation", *PLACE))

    def setup(chosen: Recipe) -> purifier_step.TrainingSetup:
        classifier = build_classifier(chosen, "at")
        perturb, cache = BalancedBatch(chosen, classifier), AdversarialCache(reuse=1)
        return purifier_step.TrainingSetup(
            chosen, classifier, images, images, perturb, cache, torch.device("cpu"), SILENT
        )

    losses = []
    for chosen in (through(*more), through()):
        whole = setup(chosen)
        state = purifier_step.initial_state(whole)
        sums = purifier_step.train_step(whole, state, torch.arange(20), PLACE, 1.0)
        losses.append(sums[0].item())
    fresh = purifier_step.initial_state(setup(through())).trained
    assert isinstance(fresh, EndToEnd)
    terms = adversarial_terms(fresh, fresh, moved, images.labels, PLACE, 1.0, World(torch.device("cpu")))
    assert losses[0] == pytest.approx(terms["loss"].item(), rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_resuming_from_another_start_or_for_another_aggregation_is_refused(
    through: Any, train: Any, elbo_run: Path, adversarial_run: Path, tmp_path: Path
) -> None:
    other = through("evaluation.aggregation=logit-mean")
    with pytest.raises(StateError, match="its aggregation is doubly-exponential, not logit-mean"):
        train(other, adversarial_run, limit=48, resume=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tensors, header = load_tensors(elbo_run / "purifier.safetensors")
    tensors["decoder.last.bias"] += 1.0
    save_tensors(elsewhere / "purifier.safetensors", tensors, header)
    with pytest.raises(StateError, match="belongs to another run: its initial is"):
        train(
            through(start=elsewhere),
            adversarial_run,
            limit=48,
            resume=True,
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["representation.layers=[layer.2.block.0.conv_1]"], r"was trained on layers \['layer\.0"),
        (["purifier.latent_features=5"], "does not fit the architecture"),
        (["representation.kind=clean"], "was trained for a classifier with checksum"),
        (["training.initial=none.safetensors"], r"the purifier to start from, none\.safetensors, is missing"),
    ],
)
def test_what_training_starts_from_is_checked(
    through: Any, train: Any, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        train(through(*overrides), tmp_path / "run")
    if "layers" in message:
        assert "training.initial takes" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_reconstruction_that_is_not_finite_stops_training(
    through: Any, train: Any, elbo_run: Path, tmp_path: Path
) -> None:
    tensors, header = load_tensors(elbo_run / "purifier.safetensors")
    # The standard deviation overflows; what is trained through the defence draws from the prior and does not.
    tensors["to_log_variance.bias"] += 1e3
    save_tensors(tmp_path / "purifier.safetensors", tensors, header)
    with pytest.raises(NumericsError, match=r"became .* in epoch 1, batch 1"):
        train(through("training.objective=both", start=tmp_path), tmp_path / "run")


@pytest.mark.slow
def test_every_epoch_draws_its_own_batches_whatever_is_reused(
    through: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []
    original = AdversarialCache.batches

    def batches(self: AdversarialCache, *arguments: Any) -> Any:
        found = [*original(self, *arguments)]
        drawn.append([int(index) for batch, _ in found for index in batch])
        return found

    monkeypatch.setattr(AdversarialCache, "batches", batches)
    train(through("training.attack_mix.reuse=3"), tmp_path / "run", limit=24)
    assert len(drawn) == 3
    assert sorted(drawn[0]) == sorted(drawn[1])
    assert drawn[0] != drawn[1]


def test_an_objective_without_a_start_or_a_rule_without_gradients_is_refused(
    small: Any, through: Any
) -> None:
    with pytest.raises(RecipeError, match="objective 'both' starts from a purifier trained on the ELBO"):
        small("training.objective=both")
    with pytest.raises(RecipeError, match=r"'adversarial' needs an evaluation\.aggregation with gradients"):
        through("evaluation.aggregation=majority-vote")


def test_images_are_perturbed_within_the_ball_to_raise_the_loss(through: Any, elbo_run: Path) -> None:
    chosen, defence = through(), load_defence(elbo_run, device="cpu")
    images = load_images(chosen, "train", limit=8)
    pixels, labels = images.pixels(slice(None)), images.labels
    attacked = perturbed(chosen, defence, pixels, labels, seed=4)
    distance = (attacked - pixels).abs().flatten(1).amax(1)
    assert bool((distance > 0.05).all())
    assert bool((distance <= 0.1 + 1e-6).all())
    latents = defence.draw_latents(8, generator=torch.Generator().manual_seed(2))
    before, after = (
        F.cross_entropy(defence(seen, latents=latents, view="exact"), labels) for seen in (pixels, attacked)
    )
    assert after > before + 0.1
    assert torch.equal(attacked, perturbed(chosen, defence, pixels, labels, seed=4))
    assert not torch.equal(attacked, perturbed(chosen, defence, pixels, labels, seed=5))


@pytest.mark.slow
def test_training_by_one_step_is_validated_by_an_attack_of_more(
    through: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, float]] = []

    def noted(threat: Any, *, steps: int, step_size: float, **options: Any) -> PGDEoT:
        made.append((steps, step_size / threat.eps))
        return PGDEoT(threat, steps=steps, step_size=step_size, **options)

    monkeypatch.setattr(end_to_end, "PGDEoT", noted)
    train(through("training.adversarial.steps=1"), tmp_path / "run", limit=24)
    # Wong et al. (2020) for the single step, Madry et al. (2018) for ten.
    assert set(made) == {(1, 1.25), (10, 0.25)}


def test_a_second_classifier_is_trained_through(through: Any, elbo_run: Path) -> None:
    defence, first = load_defence(elbo_run, device="cpu"), {}
    for kind in ("at", "clean"):
        chosen = through(f"evaluation.second_kind={kind}")
        second = build_second_classifier(chosen)
        trained = EndToEnd(chosen, defence.classifier, defence.purifier, second)
        images = load_images(chosen, "train", limit=4).pixels(slice(None))
        latents = trained.defence.draw_latents(4, generator=torch.Generator().manual_seed(3))
        reconstructions = trained.defence.purify(images, latents=latents).flatten(0, 1)
        samples = build_classifier(chosen, kind)(reconstructions).reshape(4, 2, -1)
        (first[kind],) = trained(images, latents)
        torch.testing.assert_close(first[kind], samples.logsumexp(dim=1))
    assert not torch.equal(first["at"], first["clean"])


def test_it_runs_in_the_recipes_precision(through: Any, elbo_run: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        chosen = through(f"precision={precision}", "training.objective=both")
        defence = load_defence(elbo_run, device="cpu")
        trained = EndToEnd(chosen, defence.classifier, defence.purifier, None)
        images = load_images(chosen, "train", limit=4)
        world = World(torch.device("cpu"))
        terms = adversarial_terms(
            trained, trained, images.pixels(slice(None)), images.labels, PLACE, 0.5, world
        )
        torch.autograd.backward(terms["loss"])
        assert all(term.dtype == torch.float32 for name, term in terms.items() if name != "accuracy")
        losses[precision] = terms["loss"].item()
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_what_two_processes_make_of_a_batch_adds_up_to_the_whole(
    through: Any, elbo_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Attacks draw other latents in each process; this one draws nothing.
    monkeypatch.setattr(end_to_end, "perturbed", lambda _, __, images, *___: 0.9 * images)
    chosen = through("training.objective=both", "training.adversarial.adversarial_fraction=0.6")
    defence = load_defence(elbo_run, device="cpu")
    trained = EndToEnd(chosen, defence.classifier, defence.purifier, None)
    images = load_images(chosen, "train", limit=5)
    pixels, labels = images.pixels(slice(None)), images.labels

    def terms(rank: int, size: int) -> dict[str, Tensor]:
        world = World(torch.device("cpu"), rank, size)
        return adversarial_terms(trained, trained, pixels, labels, PLACE, 0.5, world)

    whole, first, second = terms(0, 1), terms(0, 2), terms(1, 2)
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + second[name], value)
