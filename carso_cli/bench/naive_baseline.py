"""The method as one would first write it, for `carso bench` to compare with; nothing else uses it.

Samples by `torch.vmap`, one independent full pass for every draw of Expectation over Transformation, every
parameter requiring gradients, contiguous memory, four separate attack calls, and a whole forward pass for the
internal representation. Fed the same weights, latents and starts it computes what the rest of carso does.

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
    """A defence in evaluation mode.

    Args:
        classifier: Classifier, copied.
        purifier: Purifier, copied.
        layers: Layers of the internal representation.
    """

    def __init__(self, classifier: nn.Module, purifier: Purifier, layers: Sequence[str]) -> None:
        self.classifier = _plain(classifier).eval()
        self.purifier = cast(Purifier, _plain(purifier)).eval()
        self.layers = tuple(layers)

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
        return F.log_softmax(self._sample_logits(images, latents).logsumexp(dim=0).exp(), dim=1)

    def classifier_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the classifier's summed cross-entropy at the images."""
        leaf = images.clone().requires_grad_()
        torch.autograd.backward(F.cross_entropy(self.classifier(leaf), labels, reduction="sum"))
        return self._taken(leaf)

    def eot_step(
        self, images: Tensor, clean: Tensor, labels: Tensor, latents: Tensor, *, eps: float, step_size: float
    ) -> Tensor:
        """Take one PGD+EoT step under linf on the exact view, with latents (K, B, N, Z)."""
        gradient = torch.zeros_like(images)
        for draw in latents:
            leaf = images.clone().requires_grad_()
            logits = self._sample_logits(leaf, draw).logsumexp(dim=0)
            torch.autograd.backward(F.cross_entropy(logits, labels, reduction="sum"))
            gradient += self._taken(leaf) / len(latents)
        moved = images + step_size * gradient.sign()
        return moved.clamp(clean - eps, clean + eps).clamp(0.0, 1.0)

    def _representation(self, images: Tensor) -> dict[str, Tensor]:
        modules, found = dict(self.classifier.named_modules()), {}
        handles = []
        for layer in self.layers:

            def keep(_module: nn.Module, _inputs: object, output: Tensor, layer: str = layer) -> None:
                found[layer] = output

            handles.append(modules[layer].register_forward_hook(keep))
        self.classifier(images)
        for handle in handles:
            handle.remove()
        return found

    def _sample_logits(self, images: Tensor, latents: Tensor) -> Tensor:
        """Return the logits of every sample, (N, B, C), for latents (B, N, Z)."""
        condition = self.purifier.condition(self._representation(images))

        def sample(one: Tensor) -> Tensor:
            share = self.purifier.input_share
            seen = share * images + (1 - share) * self.purifier.decode(one, condition)
            logits: Tensor = self.classifier(seen)
            return logits

        return torch.vmap(sample)(latents.transpose(0, 1))

    def _taken(self, leaf: Tensor) -> Tensor:
        """Return the gradient that a backward pass has left, and forget those of the parameters."""
        self.classifier.zero_grad()
        self.purifier.zero_grad()
        assert leaf.grad is not None
        return leaf.grad


class NaiveTraining:
    """Training of a purifier, one step at a time.

    Args:
        classifier: Classifier, copied.
        purifier: Purifier with its first weights, copied.
        layers: Layers of the internal representation.
        training: The recipe's section.
    """

    def __init__(
        self, classifier: nn.Module, purifier: Purifier, layers: Sequence[str], training: Training
    ) -> None:
        self.plain = NaiveBaseline(classifier, purifier, layers)
        self.purifier = self.plain.purifier.train()
        self.mix = training.attack_mix
        section = training.optimiser
        self.optimiser = torch.optim.RAdam(
            self.purifier.parameters(),
            lr=training.learning_rate.initial,
            betas=(section.beta1, section.beta2),
            eps=section.epsilon,
            weight_decay=section.weight_decay,
        )
        weights = dict(self.purifier.named_parameters())
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
        representation = self.plain.extract(inputs)
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
        parts = [slice(quarter * place, quarter * (place + 1)) for place in range(4)]
        return torch.cat(
            (
                self._fgsm(images[parts[0]], labels[parts[0]], eps / 2),
                self._fgsm(images[parts[1]], labels[parts[1]], eps),
                self._pgd(images[parts[2]], labels[parts[2]], starts[:quarter], eps / 2),
                self._pgd(images[parts[3]], labels[parts[3]], starts[quarter:], eps),
                images[4 * quarter :],
            )
        )

    def _fgsm(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        return (images + eps * self.plain.classifier_gradient(images, labels).sign()).clamp(0.0, 1.0)

    def _pgd(self, images: Tensor, labels: Tensor, starts: Tensor, eps: float) -> Tensor:
        current = (images + eps * starts).clamp(0.0, 1.0)
        for _ in range(self.mix.pgd_steps):
            gradient = self.plain.classifier_gradient(current, labels)
            current = current + self.mix.pgd_step_size * gradient.sign()
            current = current.clamp(images - eps, images + eps).clamp(0.0, 1.0)
        return current


def _plain(module: nn.Module) -> nn.Module:
    """Return a copy in contiguous memory, every parameter of which requires gradients."""
    copied = copy.deepcopy(module).requires_grad_(True)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.data.contiguous(memory_format=torch.contiguous_format)
    return copied
