"""The moving parts of purifier training, and how they are saved and brought back.

`state.safetensors` holds fast weights, slow weights and optimiser moments; its header holds the progress
and the identity of the run (hash of the recipe, checksum of the classifier, number of images).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.defence.vae import Purifier
from carso_cli.distributed.world import World
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.training.checkpoint import TrainingProgress, under
from carso_cli.training.lookahead import Lookahead

_FAST, _SLOW, _OPTIMISER = "fast.", "slow.", "optimiser."


class TrainingState(TrainingProgress):
    """Purifier, optimiser, slow weights and progress.

    Args:
        purifier: The module being trained; its parameters are the fast weights.
        trained: What is called in training: the purifier, or a module around it.
        optimiser: RAdam over the purifier's parameters.
        world: The processes that share the training.
        lookahead_steps: Inner steps between two synchronisations (Table 16).
        lookahead_decay: Averaging decay (Table 16).
        identity: What the state belongs to; resuming refuses any other.
        save_every: Epochs between two saved states.
    """

    def __init__(
        self,
        purifier: Purifier,
        trained: nn.Module,
        optimiser: torch.optim.Optimizer,
        world: World,
        *,
        lookahead_steps: int,
        lookahead_decay: float,
        identity: dict[str, Any],
        save_every: int,
    ) -> None:
        super().__init__(identity, world, save_every)
        self.purifier = purifier
        self.trained = trained
        self.replica = world.data_parallel(trained)
        self.optimiser = optimiser
        self.parameters = dict(purifier.named_parameters())
        self.lookahead = Lookahead(
            list(self.parameters.values()), steps=lookahead_steps, decay=lookahead_decay
        )

    def slow_purifier(self) -> Purifier:
        """Return a copy of the purifier with the slow weights, which are the ones to use and to save."""
        purifier = copy.deepcopy(self.purifier)
        with torch.no_grad():
            for parameter, slow in zip(purifier.parameters(), self.lookahead.slow, strict=True):
                parameter.copy_(slow)
        return purifier.eval()

    def save(self, folder: RunFolder) -> None:
        """Write the state; the one before it is kept."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.purifier.state_dict().items():
            tensors[_FAST + name] = tensor
        for name, slow in zip(self.parameters, self.lookahead.slow, strict=True):
            tensors[_SLOW + name] = slow
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{_OPTIMISER}{name}.{key}"] = value
        self.write(folder, tensors, steps=self.lookahead.taken)

    def load(self, folder: RunFolder, reporter: Reporter) -> None:
        """Bring back the saved state of a run; see `TrainingProgress.read`.

        Raises:
            StateError: If the state belongs to another recipe, classifier or set of images, is damaged, or is
                lost.
        """
        found = self.read(folder, reporter)
        if found is None:
            return
        tensors, metadata = found
        self.purifier.load_state_dict(under(_FAST, tensors))
        for name, slow in zip(self.parameters, self.lookahead.slow, strict=True):
            slow.copy_(tensors[_SLOW + name])
        self._load_optimiser(under(_OPTIMISER, tensors))
        self.lookahead.taken = metadata["steps"]

    def _load_optimiser(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            moments = under(f"{name}.", tensors)
            if moments:
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in moments.items()
                }
