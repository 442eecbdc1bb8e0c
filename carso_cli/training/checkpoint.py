"""How far a training has come: counted, saved with its tensors, and brought back for the same run only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from carso_cli.distributed.world import World
from carso_cli.errors import StateError
from carso_cli.io.json_files import append_json_lines, read_json_lines, write_json_lines
from carso_cli.runs.checkpoints import load_state, save_state
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.records import short
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.signals import StopRequest


class StopTraining(Exception):  # noqa: N818  (no error: somebody asked for it)
    """Training stops between two steps, where its state can be saved."""


@dataclass(frozen=True)
class OpenEpoch:
    """An epoch that is not whole yet.

    Args:
        batches: Batches done.
        sums: What their figures add up to.
        seconds: Time that they took.
    """

    batches: int = 0
    sums: tuple[float, ...] = ()
    seconds: float = 0.0


class TrainingProgress:
    """Whole epochs done, the batches of the next, and the identity of the run.

    Args:
        identity: What the stored state belongs to; resuming refuses any other.
        world: The processes that share the training; the main one reads and writes.
        save_every: Epochs between two saved states.
    """

    def __init__(self, identity: Mapping[str, Any], world: World, save_every: int = 1) -> None:
        self.identity = dict(identity)
        self.world = world
        self.save_every = save_every
        self.metrics: list[dict[str, Any]] = []
        """Of every whole epoch, in order."""
        self.open = OpenEpoch()
        self.saved = (0, 0)
        """Whole epochs and further batches in the newest state."""

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

    def finish_epoch(self, folder: RunFolder, metrics: dict[str, Any]) -> None:
        """Count and log one whole epoch."""
        self.world.on_main(lambda: append_json_lines(folder.metrics, [metrics]))
        self.metrics.append(metrics)
        self.open = OpenEpoch()

    def finish_batch(self, batches: int, sums: Tensor, seconds: float, stop: StopRequest) -> None:
        """Count the batches of the open epoch.

        Args:
            batches: Batches done.
            sums: What their figures add up to, (figures,) in float64.
            seconds: Time that they took.
            stop: Whether somebody asked this process to stop.

        Raises:
            StopTraining: If some process was asked to stop; what is counted can be saved.
        """
        self.open = OpenEpoch(batches, tuple(sums.tolist()), seconds)
        if self.world.any(bool(stop)):
            raise StopTraining

    def write(self, folder: RunFolder, tensors: Mapping[str, Tensor], **details: Any) -> None:  # noqa: ANN401
        """Store a state; the one before it is kept.

        Args:
            folder: The run.
            tensors: What is trained.
            details: Further JSON-serialisable values of the file's header.

        Raises:
            CarsoError: If it cannot be written.
        """
        header = {"identity": self.identity, "metrics": self.metrics, "open": asdict(self.open), **details}
        self.world.on_main(lambda: save_state(folder.state, tensors, header))
        self.saved = (self.epochs_done, self.open.batches)

    def describe_saved(self, epochs: int) -> str:
        """Say how much of a training of so many epochs the newest state holds."""
        batches = f" and {self.saved[1]} batches of the next" if self.saved[1] else ""
        return f"{self.saved[0]} of {epochs} epochs{batches} are saved"

    def read(self, folder: RunFolder, reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Bring back the newest whole state, and make the log of metrics agree with it.

        Returns:
            Tensors and header; None where training was interrupted before its first
            state, which is said.

        Raises:
            StateError: If the state belongs to another configuration, is damaged, or is lost.
        """
        found = self.world.on_main(lambda: self._read(folder, reporter))
        if found is not None:
            self.metrics = list(found[1]["metrics"])
            self.open = OpenEpoch(**{**found[1]["open"], "sums": tuple(found[1]["open"]["sums"])})
            self.saved = (self.epochs_done, self.open.batches)
            batches = f" and {self.open.batches} batches" if self.open.batches else ""
            reporter.info(f"going on after {self.epochs_done} whole epochs{batches}")
        return found

    def _read(self, folder: RunFolder, reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = load_state(folder.state, reporter)
        if found is None:
            self._check_nothing_is_lost(folder)
            reporter.info(f"{folder.path} holds no state yet: starting from the first epoch")
        else:
            self._check_identity(folder, found[1]["identity"])
        # The state is the truth: epochs logged after it will be run again, a damaged log is made whole.
        write_json_lines(folder.metrics, [] if found is None else found[1]["metrics"])
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
