"""The moving parts of classifier training, and how they are saved and brought back.

`state.safetensors` holds the weights and the optimiser's momentum; its header holds the number of whole
epochs and the identity of the run.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.errors import StateError
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runs.files import read_json_lines, write_atomically
from carso_cli.runs.folder import RunFolder

_WEIGHTS, _MOMENTUM = "weights.", "momentum."
_BUFFER = "momentum_buffer"


class ClassifierState:
    """Classifier, optimiser and progress.

    Args:
        classifier: The module being trained.
        optimiser: SGD with momentum over its parameters.
        identity: What the state belongs to; resuming refuses any other.
    """

    def __init__(self, classifier: nn.Module, optimiser: torch.optim.SGD, identity: dict[str, Any]) -> None:
        self.classifier = classifier
        self.optimiser = optimiser
        self.identity = identity
        self.epochs_done = 0
        self.saved_epochs = 0
        self.seconds = 0.0
        self.last_metrics: dict[str, Any] = {}

    def finish_epoch(self, metrics: dict[str, Any]) -> None:
        """Count one whole epoch."""
        self.epochs_done += 1
        self.seconds += float(metrics["seconds"])
        self.last_metrics = metrics

    def save(self, folder: RunFolder) -> None:
        """Write the state atomically; the earlier one stays until the new one is complete."""
        tensors = {_WEIGHTS + name: tensor for name, tensor in self.classifier.state_dict().items()}
        for name, parameter in self.classifier.named_parameters():
            momentum: Tensor | None = self.optimiser.state[parameter].get(_BUFFER)
            if momentum is not None:
                tensors[_MOMENTUM + name] = momentum
        metadata = {
            "identity": self.identity,
            "epochs_done": self.epochs_done,
            "seconds": self.seconds,
            "last_metrics": self.last_metrics,
        }
        save_tensors(folder.state, tensors, metadata)
        self.saved_epochs = self.epochs_done

    def load(self, folder: RunFolder) -> None:
        """Bring back the saved state of a run; without one, training starts from the beginning.

        Epochs logged after the saved state are taken out of the log: they will be run again.

        Raises:
            StateError: If the state belongs to another configuration, or is damaged.
        """
        if folder.state.is_file():
            tensors, metadata = load_tensors(folder.state)
            self._check_identity(folder, metadata.get("identity", {}))
            self._load_tensors(tensors)
            self.epochs_done = self.saved_epochs = metadata["epochs_done"]
            self.seconds = metadata["seconds"]
            self.last_metrics = metadata["last_metrics"]
        kept = [line for line in read_json_lines(folder.metrics) if line["epoch"] < self.epochs_done]
        write_atomically(folder.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def _check_identity(self, folder: RunFolder, stored: dict[str, Any]) -> None:
        for key, value in self.identity.items():
            if stored.get(key) != value:
                raise StateError(
                    f"{folder.state} belongs to another run: its {key} is {stored.get(key)}, not {value}",
                    hint="resume with the options of the first start, or choose another folder by --run DIR",
                )

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.classifier.load_state_dict(
            {
                name.removeprefix(_WEIGHTS): value
                for name, value in tensors.items()
                if name.startswith(_WEIGHTS)
            }
        )
        for name, parameter in self.classifier.named_parameters():
            momentum = tensors.get(_MOMENTUM + name)
            if momentum is not None:
                self.optimiser.state[parameter][_BUFFER] = momentum.to(parameter.device)
