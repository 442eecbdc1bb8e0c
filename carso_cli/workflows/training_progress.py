"""How far a training has come: counted, saved with its tensors, and brought back for the same run only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from carso_cli.errors import StateError
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runs.files import read_json_lines, write_json_lines
from carso_cli.runs.folder import RunFolder


class TrainingProgress:
    """Whole epochs done, and the identity of the run.

    Args:
        identity: What the saved state belongs to; resuming refuses any other.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
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

    def write(self, folder: RunFolder, tensors: Mapping[str, Tensor], **details: Any) -> None:  # noqa: ANN401
        """Write tensors and progress atomically; the earlier state stays until the new one is complete.

        Args:
            folder: The run.
            tensors: What is trained.
            details: Further values of the file's header.
        """
        metadata = {
            "identity": self.identity,
            "epochs_done": self.epochs_done,
            "seconds": self.seconds,
            "last_metrics": self.last_metrics,
            **details,
        }
        save_tensors(folder.state, tensors, metadata)
        self.saved_epochs = self.epochs_done

    def read(self, folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Bring back the progress of a run; without a saved state, training starts from the beginning.

        Epochs logged after the saved state are taken out of the log: they will be run again.

        Returns:
            Tensors and header; None without a saved state.

        Raises:
            StateError: If the state belongs to another configuration, or is damaged.
        """
        found = None
        if folder.state.is_file():
            found = _, metadata = load_tensors(folder.state)
            self._check_identity(folder, metadata.get("identity", {}))
            self.epochs_done = self.saved_epochs = metadata["epochs_done"]
            self.seconds = metadata["seconds"]
            self.last_metrics = metadata["last_metrics"]
        lines = read_json_lines(folder.metrics)
        write_json_lines(folder.metrics, [line for line in lines if line["epoch"] < self.epochs_done])
        return found

    def _check_identity(self, folder: RunFolder, stored: Mapping[str, Any]) -> None:
        for key, value in self.identity.items():
            if stored.get(key) != value:
                raise StateError(
                    f"{folder.state} belongs to another run: its {key} is {stored.get(key)}, not {value}",
                    hint="resume with the first start's options, or choose another folder with --run DIR",
                )


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
