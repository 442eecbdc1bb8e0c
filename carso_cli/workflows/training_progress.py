"""How far a training has come: counted, saved with its tensors, and brought back for the same run only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from carso_cli.errors import StateError
from carso_cli.reporter import Reporter
from carso_cli.runs.checkpoints import load_state, save_state
from carso_cli.runs.files import read_json_lines, write_json_lines
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.records import short


class TrainingProgress:
    """Whole epochs done, and the identity of the run.

    Args:
        identity: What the stored state belongs to; resuming refuses any other.
        save_every: Epochs between two saved states.
    """

    def __init__(self, identity: Mapping[str, Any], save_every: int = 1) -> None:
        self.identity = dict(identity)
        self.save_every = save_every
        self.metrics: list[dict[str, Any]] = []
        """Of every whole epoch, in order."""
        self.saved_epochs = 0

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs."""
        return len(self.metrics)

    @property
    def seconds(self) -> float:
        """Time of all whole epochs."""
        return sum(float(line["seconds"]) for line in self.metrics)

    @property
    def last_metrics(self) -> dict[str, Any]:
        """Metrics of the last whole epoch."""
        return self.metrics[-1]

    def finish_epoch(self, metrics: dict[str, Any]) -> None:
        """Count one whole epoch."""
        self.metrics.append(metrics)

    def write(self, folder: RunFolder, tensors: Mapping[str, Tensor], **details: Any) -> None:  # noqa: ANN401
        """Store a state; the one before it is kept.

        Args:
            folder: The run.
            tensors: What is trained.
            details: Further JSON-serialisable values of the file's header.

        Raises:
            CarsoError: If it cannot be written.
        """
        save_state(folder.state, tensors, {"identity": self.identity, "metrics": self.metrics, **details})
        self.saved_epochs = self.epochs_done

    def read(self, folder: RunFolder, reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Bring back the newest whole state, and make the log of metrics agree with it.

        Returns:
            Tensors and header; None where training was interrupted before its first
            state, which is said.

        Raises:
            StateError: If the state belongs to another configuration, is damaged, or is lost.
        """
        found = load_state(folder.state, reporter)
        if found is None:
            self._check_nothing_is_lost(folder)
            reporter.say(f"{folder.path} holds no state yet: starting from the first epoch")
        else:
            self._check_identity(folder, found[1]["identity"])
            self.metrics = list(found[1]["metrics"])
            self.saved_epochs = self.epochs_done
            reporter.say(f"going on after {self.epochs_done} whole epochs")
        # The state is the truth: epochs logged after it will be run again, a damaged log is made whole.
        write_json_lines(folder.metrics, self.metrics)
        return found

    def _check_identity(self, folder: RunFolder, stored: Mapping[str, Any]) -> None:
        for key, value in self.identity.items():
            if stored.get(key) != value:
                raise StateError(
                    f"{folder.state} belongs to another run: its {key} is {short(stored.get(key))}, "
                    f"not {short(value)}",
                    hint="resume with the first start's options, or choose another folder with --run DIR",
                )

    def _check_nothing_is_lost(self, folder: RunFolder) -> None:
        # Epochs are logged before they are saved, so a kill explains as many as lie between two states.
        logged = len(read_json_lines(folder.metrics))
        if logged > self.save_every:
            raise StateError(
                f"{folder.state} is missing, though {logged} epochs were trained and logged",
                hint="restore it from a copy, or train again into another folder with --run DIR",
            )


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
