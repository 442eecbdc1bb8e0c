"""The moving parts of classifier training, and how they are saved and brought back.

`state.safetensors` holds the weights and the optimiser's momentum; its header holds the number of whole
epochs and the identity of the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.distributed.world import World
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.training.checkpoint import TrainingProgress, under

_WEIGHTS, _MOMENTUM = "weights.", "momentum."
_BUFFER = "momentum_buffer"


class ClassifierState(TrainingProgress):
    """Classifier, optimiser and progress.

    Args:
        classifier: The module being trained.
        optimiser: SGD with momentum over its parameters.
        world: The processes that share the training.
        identity: What the state belongs to; resuming refuses any other.
    """

    def __init__(
        self,
        classifier: nn.Module,
        optimiser: torch.optim.SGD,
        world: World,
        identity: dict[str, Any],
    ) -> None:
        super().__init__(identity, world)
        self.classifier = classifier
        self.replica = world.data_parallel(classifier)
        self.optimiser = optimiser

    def save(self, folder: RunFolder) -> None:
        """Write the state; the one before it is kept."""
        tensors = {_WEIGHTS + name: tensor for name, tensor in self.classifier.state_dict().items()}
        for name, parameter in self.classifier.named_parameters():
            momentum: Tensor | None = self.optimiser.state[parameter].get(_BUFFER)
            if momentum is not None:
                tensors[_MOMENTUM + name] = momentum
        self.write(folder, tensors)

    def load(self, folder: RunFolder, reporter: Reporter) -> None:
        """Bring back the saved state of a run; see `TrainingProgress.read`.

        Raises:
            StateError: If the state belongs to another configuration, is damaged, or is lost.
        """
        found = self.read(folder, reporter)
        if found is None:
            return
        tensors, _ = found
        self.classifier.load_state_dict(under(_WEIGHTS, tensors))
        momenta = under(_MOMENTUM, tensors)
        for name, parameter in self.classifier.named_parameters():
            if name in momenta:
                self.optimiser.state[parameter][_BUFFER] = momenta[name].to(parameter.device)
