"""The method as one would first write it, for `carso bench` to compare with; nothing else uses it.

Samples by `torch.vmap`, one independent full pass for every draw of Expectation over Transformation,
contiguous memory, four separate attack calls, and a whole forward pass for the internal representation.
As in the authors' release, attacks on the defence compute the gradient of the images alone; those of the
training run advertorch's plain backward pass, through a classifier whose weights require gradients too.
Given the same weights, latents and starts it computes what the rest of carso does.

Axes: B images, N samples per image, K draws, C classes, Z latent features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.vae import Purifier
from carso_cli.recipe.purifier_training import Training
from carso_cli.training.optim import Lookahead


class NaiveBaseline:
    """A defence in evaluation mode, all weights frozen.

    Args:
        classifier: Classifier, copied.
        purifier: Purifier, copied.
        layers: Layers of the internal representation.
    """

    def __init__(self, classifier: nn.Module, purifier: Purifier, layers: Sequence[str]) -> None:
        self.classifier = copy.deepcopy(classifier).eval()
        self.purifier = copy.deepcopy(purifier).eval()
        self.layers = tuple(layers)
        for module in (self.classifier, self.purifier):
            # A weight that requires no gradient costs an attack neither operations nor kept activations.
            module.requires_grad_(False)
            for tensor in (*module.parameters(), *module.buffers()):
                # The default layout, which carso's own channels-last is compared with.
                tensor.data = tensor.data.contiguous(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return the classifier's logits, (B, C)."""
        logits: Tensor = self.classifier(images)
        return logits

    @torch.no_grad()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Return layer name to output, after a forward pass to the end."""
        return self._representation(images)

    @torch.no_grad()
    def defend(self, images: Tensor, latents: Tensor) -> Tensor:
        """Return log P of the defence, (B, C), for latents (B, N, Z)."""
        # S itself, as first written: it overflows at logits where `aggregate` does not.
        return F.log_softmax(self._sample_logits(images, latents).logsumexp(dim=0).exp(), dim=1)

    def classifier_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the classifier's summed cross-entropy at the images, and no other."""
        leaf = images.clone().requires_grad_()
        loss = F.cross_entropy(self.classifier(leaf), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    def eot_step(
        self, images: Tensor, clean: Tensor, labels: Tensor, latents: Tensor, *, eps: float, step_size: float
    ) -> Tensor:
        """Take one PGD+EoT step under linf on the exact view, with latents (K, B, N, Z)."""
        gradient = torch.zeros_like(images)
        for draw in latents:
            leaf = images.clone().requires_grad_()
            logits = self._sample_logits(leaf, draw).logsumexp(dim=0)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradient += torch.autograd.grad(loss, leaf)[0] / len(latents)
        return _ascend(images, clean, gradient, eps, step_size)

    def _representation(self, images: Tensor) -> dict[str, Tensor]:
        modules, found = dict(self.classifier.named_modules()), {}
        handles = []
        for layer in self.layers:
            # The layer is bound as a default: in the loop a closure would see the last one only.
            def keep(_module: nn.Module, _inputs: object, output: Tensor, layer: str = layer) -> None:
                found[layer] = output

            handles.append(modules[layer].register_forward_hook(keep))
        self.classifier(images)
        # Or each further pass would record once more.
        for handle in handles:
            handle.remove()
        return found

    def _sample_logits(self, images: Tensor, latents: Tensor) -> Tensor:
        """Return the logits of every sample, (N, B, C), for latents (B, N, Z)."""
        condition = self.purifier.condition(self._representation(images))

        def sample(one: Tensor) -> Tensor:
            share = self.purifier.input_share
            logits: Tensor = self.classifier(
                share * images + (1 - share) * self.purifier.decode(one, condition)
            )
            return logits

        # vmap maps over the first axis: (N, B, Z).
        return torch.vmap(sample)(latents.transpose(0, 1))


class NaiveTraining:
    """Training of a purifier on the paper's objective, one step at a time.

    Args:
        classifier: Classifier, copied.
        purifier: Purifier with its first weights, copied; the copy is trained.
        layers: Layers of the internal representation.
        training: The recipe's section.
    """

    def __init__(
        self, classifier: nn.Module, purifier: Purifier, layers: Sequence[str], training: Training
    ) -> None:
        self.baseline = NaiveBaseline(classifier, purifier, layers)
        # The baseline froze both for its attacks; the release's training freezes no weight of the classifier.
        self.purifier = self.baseline.purifier.train().requires_grad_(True)
        self.baseline.classifier.requires_grad_(True)
        self.mix = training.attack_mix
        section, weights = training.optimiser, dict(self.purifier.named_parameters())
        self.optimiser = torch.optim.RAdam(
            weights.values(),
            lr=training.learning_rate.initial,
            betas=(section.beta1, section.beta2),
            eps=section.epsilon,
            weight_decay=section.weight_decay,
        )
        self.lookahead = Lookahead(weights, steps=section.lookahead_steps, decay=section.lookahead_decay)

    def step(self, clean: Tensor, labels: Tensor, starts: Tensor, noise: Tensor, *, eps: float) -> Tensor:
        """Take one step at beta 1.

        Args:
            clean: (B, channels, H, W) in [0, 1].
            labels: (B,).
            starts: Starts of both PGD calls, as shares of their radius: (2 * quarter, channels, H, W).
            noise: (B, Z) standard normal draws.
            eps: Full budget.

        Returns:
            Summed loss, BCE and KL, float64.
        """
        inputs = self._balanced(clean, labels, starts, eps)
        # Without gradients, as in carso: the classifier is frozen.
        representation = self.baseline.extract(inputs)
        reconstruction, mean, log_variance = self.purifier(inputs, representation, noise)
        terms = negative_elbo(reconstruction, clean, mean, log_variance, 1.0)
        self.optimiser.zero_grad()
        torch.autograd.backward(terms.total)
        self.optimiser.step()
        self.lookahead.step()
        return torch.stack([term.detach().double().cpu() for term in terms])

    def _balanced(self, images: Tensor, labels: Tensor, starts: Tensor, eps: float) -> Tensor:
        """Perturb a quarter each by FGSM at eps/2 and eps, and by PGD at eps/2 and eps."""
        quarter = len(starts) // 2
        clean, known = images[: 4 * quarter].tensor_split(4), labels[: 4 * quarter].tensor_split(4)
        begin, (steps, step_size) = starts.tensor_split(2), (self.mix.pgd_steps, self.mix.pgd_step_size)
        # FGSM is one step of PGD, from the image itself and as long as the radius.
        parts = (
            self._pgd(clean[0], known[0], torch.zeros_like(begin[0]), eps / 2, 1, eps / 2),
            self._pgd(clean[1], known[1], torch.zeros_like(begin[0]), eps, 1, eps),
            self._pgd(clean[2], known[2], begin[0], eps / 2, steps, step_size),
            self._pgd(clean[3], known[3], begin[1], eps, steps, step_size),
        )
        return torch.cat((*parts, images[4 * quarter :]))

    def _pgd(
        self, images: Tensor, labels: Tensor, starts: Tensor, eps: float, steps: int, step_size: float
    ) -> Tensor:
        current = (images + eps * starts).clamp(0.0, 1.0)
        for _ in range(steps):
            leaf = current.clone().requires_grad_()
            loss = F.cross_entropy(self.baseline.classifier(leaf), labels, reduction="sum")
            # To every leaf, as advertorch calls it: the weights' gradients are computed, and used by nobody.
            torch.autograd.backward(loss)
            gradient = cast(Tensor, leaf.grad)
            current = _ascend(current, images, gradient, eps, step_size)
        return current


def _ascend(images: Tensor, clean: Tensor, gradient: Tensor, eps: float, step_size: float) -> Tensor:
    """Take a signed gradient step, then project onto the linf ball around `clean` and onto [0, 1]."""
    moved = images + step_size * gradient.sign()
    # The ball first: its bounds may leave [0, 1].
    return moved.clamp(clean - eps, clean + eps).clamp(0.0, 1.0)
