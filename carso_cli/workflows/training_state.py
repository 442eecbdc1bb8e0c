"""The moving parts of purifier training, and how they are saved and brought back.

`state.safetensors` holds fast weights, slow weights and optimiser moments; its header holds the progress
and the identity of the run (hash of the recipe, checksum of the classifier, number of images).
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

from carso_cli.errors import StateError
from carso_cli.purifier.lookahead import Lookahead
from carso_cli.purifier.vae import Purifier
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runs.files import read_json_lines, write_atomically
from carso_cli.runs.folder import RunFolder

_FAST, _SLOW, _OPTIMISER = "fast.", "slow.", "optimiser."


class TrainingState:
    """Purifier, optimiser, slow weights and progress.

    Args:
        purifier: The module being trained; its parameters are the fast weights.
        optimiser: RAdam over the purifier's parameters.
        lookahead_steps: Inner steps between two synchronisations (Table 16).
        lookahead_decay: Averaging decay (Table 16).
        identity: What the state belongs to; resuming refuses any other.
    """

    def __init__(
        self,
        purifier: Purifier,
        optimiser: torch.optim.Optimizer,
        *,
        lookahead_steps: int,
        lookahead_decay: float,
        identity: dict[str, Any],
    ) -> None:
        self.purifier = purifier
        self.optimiser = optimiser
        self.parameters = dict(purifier.named_parameters())
        self.lookahead = Lookahead(
            list(self.parameters.values()), steps=lookahead_steps, decay=lookahead_decay
        )
        self.identity = identity
        self.epochs_done = 0
        self.saved_epochs = 0
        self.seconds = 0.0
        self.last_metrics: dict[str, Any] = {}

    def slow_purifier(self) -> Purifier:
        """Return a copy of the purifier with the slow weights, which are the ones to use and to save."""
        purifier = copy.deepcopy(self.purifier)
        with torch.no_grad():
            for parameter, slow in zip(purifier.parameters(), self.lookahead.slow, strict=True):
                parameter.copy_(slow)
        return purifier.eval()

    def finish_epoch(self, metrics: dict[str, Any]) -> None:
        """Count one whole epoch."""
        self.epochs_done += 1
        self.seconds += float(metrics["seconds"])
        self.last_metrics = metrics

    def save(self, folder: RunFolder) -> None:
        """Write the state atomically; the earlier one stays until the new one is complete."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.purifier.state_dict().items():
            tensors[_FAST + name] = tensor
        for name, slow in zip(self.parameters, self.lookahead.slow, strict=True):
            tensors[_SLOW + name] = slow
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{_OPTIMISER}{name}.{key}"] = value
        metadata = {
            "identity": self.identity,
            "epochs_done": self.epochs_done,
            "steps": self.lookahead.taken,
            "seconds": self.seconds,
            "last_metrics": self.last_metrics,
        }
        save_tensors(folder.state, tensors, metadata)
        self.saved_epochs = self.epochs_done

    def load(self, folder: RunFolder) -> None:
        """Bring back the saved state of a run; without one, training starts from the beginning.

        Epochs logged after the saved state are taken out of the log: they will be run again.

        Raises:
            StateError: If the state belongs to another recipe, classifier or number of images, or is damaged.
        """
        if not folder.state.is_file():
            self._forget_metrics(folder)
            return
        tensors, metadata = load_tensors(folder.state)
        for key, value in self.identity.items():
            if metadata["identity"].get(key) != value:
                raise StateError(
                    f"{folder.state} belongs to another run: its {key} is "
                    f"{metadata['identity'].get(key)}, here it is {value}",
                    hint="resume with the first start's options, or choose another folder with --run DIR",
                )
        self.purifier.load_state_dict(_under(_FAST, tensors))
        for name, slow in zip(self.parameters, self.lookahead.slow, strict=True):
            slow.copy_(tensors[_SLOW + name])
        self._load_optimiser(_under(_OPTIMISER, tensors))
        self.lookahead.taken = metadata["steps"]
        self.epochs_done = self.saved_epochs = metadata["epochs_done"]
        self.seconds = metadata["seconds"]
        self.last_metrics = metadata["last_metrics"]
        self._forget_metrics(folder)

    def _load_optimiser(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            moments = _under(f"{name}.", tensors)
            if moments:
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in moments.items()
                }

    def _forget_metrics(self, folder: RunFolder) -> None:
        kept = [line for line in read_json_lines(folder.metrics) if line["epoch"] < self.epochs_done]
        write_atomically(folder.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
