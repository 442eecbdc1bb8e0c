"""The state that training resumes from: how far it has come, its tensors, and the run they belong to.

`state.safetensors` holds the tensors of several parts, such as fast and slow weights and optimiser moments,
each under a prefix; its header holds the metrics of whole epochs, the sums of the one in progress, and the
identity of the run. The same file serves the purifier and the classifier.

- `Checkpoint`: counts, saves by time, and loads;
- `OptimiserTensors`: an optimiser as a part of one.
"""

from __future__ import annotations

import csv
import io
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from carso_cli.distributed.world import World
from carso_cli.errors import InterruptedRun, StateError
from carso_cli.io.json_files import (
    append_json_lines,
    read_json_lines,
    write_atomically,
    write_json_lines,
)
from carso_cli.runs.checkpoints import StateFile, load_state, load_tensors
from carso_cli.runs.folder import STOPPED, RunFolder
from carso_cli.runs.records import short
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.signals import StopRequest, stop_requests


class Part(Protocol):
    """What a checkpoint saves: a module, Lookahead, `OptimiserTensors`."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return tensors by name."""

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> object:
        """Take them back, from the CPU."""


@dataclass(frozen=True)
class OpenEpoch:
    """An epoch in progress.

    Args:
        batches: Batches done.
        sums: What the terms of their losses add up to.
        seconds: Time that they took.
    """

    batches: int = 0
    sums: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass
class Checkpoint:
    """How far a training run has come, and its state file.

    Args:
        folder: The run.
        world: Its processes; the main one reads and writes.
        identity: What the state belongs to; resuming refuses any other.
        parts: What is saved, by the prefix of its tensors' names.
        epochs: Epochs of the whole training.
        command: The command that resumes the run, without `--run`.
        minutes: Time between two saved states: what a kill loses at most.
        details: Returns further JSON-serialisable values of the file's header.
        reporter: Where the metrics of whole epochs are logged too.
        metrics: Of every whole epoch, in order.
        open: The epoch after those.
    """

    folder: RunFolder
    world: World
    identity: Mapping[str, Any]
    parts: Mapping[str, Part]
    _: KW_ONLY
    epochs: int
    command: str
    minutes: float = 10.0
    details: Callable[[], dict[str, Any]] = dict
    reporter: Reporter = SILENT
    metrics: list[dict[str, Any]] = field(default_factory=list)
    open: OpenEpoch = OpenEpoch()
    _saved: tuple[int, int] = (0, 0)
    _saved_at: float = field(init=False)
    _complete: bool = False
    _stop: StopRequest = field(default_factory=StopRequest)
    _file: StateFile = field(init=False)

    def __post_init__(self) -> None:
        self._file, self._saved_at = StateFile(self.folder.state), time.monotonic()

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs."""
        return len(self.metrics)

    @property
    def ended(self) -> bool:
        """Whether training has ended, after its last epoch or for want of time."""
        return self.epochs_done >= self.epochs or any(STOPPED in line for line in self.metrics[-1:])

    @property
    def seconds(self) -> float:
        """Time of all whole epochs."""
        return sum(float(line["seconds"]) for line in self.metrics)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals stop training between two steps, where `finish_batch` saves the state.

        Raises:
            InterruptedRun: At a second signal, at once; what was saved before stays.
            CarsoError: If the state that was being written could not be.
        """
        try:
            with stop_requests() as self._stop:
                yield
        except KeyboardInterrupt:
            # Nothing is saved: the step may be half done, some weights moved and others not.
            raise self._interrupted() from None
        finally:
            # Before the lock on the folder is given up, and before a message says what is saved.
            self._file.wait()

    def finish_batch(self, batches: int, sums: Tensor, seconds: float) -> None:
        """Count the batches of the epoch in progress, and save the state where that is due.

        Args:
            batches: Batches done.
            sums: What the terms of their losses add up to, (terms,) in float64.
            seconds: Time that they took.

        Raises:
            InterruptedRun: If some process was asked to stop; the state after this batch is saved.
        """
        # JSON keeps float64 exactly, so a resumed epoch ends in the same mean to the last bit.
        self.open = OpenEpoch(batches, tuple(sums.tolist()), seconds)
        due = self.world.is_main and time.monotonic() - self._saved_at >= 60.0 * self.minutes
        # The processes agree on it: one that stopped alone would leave the others waiting for its gradients.
        stop, due = (self.world.sum(torch.tensor([bool(self._stop), due], dtype=torch.int)) > 0).tolist()
        if stop or due:
            self.save()
        if stop:
            self.world.on_main(self._file.wait)
            raise self._interrupted()

    def finish_epoch(self, metrics: dict[str, Any]) -> None:
        """Count and log a whole epoch."""
        self.world.on_main(lambda: self._log(metrics))
        self.metrics.append(metrics)
        # Each epoch has the same number of steps.
        step = self.epochs_done * self.open.batches
        figures = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self.reporter.measured({f"epoch/{name}": float(value) for name, value in figures.items()}, step)
        self.open = OpenEpoch()

    def _log(self, metrics: dict[str, Any]) -> None:
        # The log may run ahead of the state: what a kill leaves there, `_read` takes back.
        append_json_lines(self.folder.metrics, [metrics])
        # Whole, since the last epoch may bring a new column.
        lines = [*self.metrics, metrics]
        names = dict.fromkeys(name for line in lines for name in line)
        rows = [names, *([line.get(name, "") for name in names] for line in lines)]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(self.folder.metrics_table, text.getvalue())

    def finish(self, weights: Path, write: Callable[[], None]) -> None:
        """Write the trained weights, and drop the tensors of the state, which nothing resumes from any more.

        Args:
            weights: Their file; where training was complete before, it is only verified.
            write: Writes it.

        Raises:
            StateError: If training was complete before, and the file is lost or damaged.
            CarsoError: If something cannot be written.
        """

        def finish() -> None:
            if not self._complete:
                write()
                self._file.close(self._header() | {"complete": True})
                return
            try:
                load_tensors(weights)
            except StateError as error:
                raise StateError(
                    f"{error.message}; its training was complete, and no state is kept after that",
                    hint="restore it from a copy, or train again into another folder with --run DIR",
                ) from error

        self.world.on_main(finish)

    def _interrupted(self) -> InterruptedRun:
        epochs, batches = self._saved
        further = f" and {batches} batches of the next" if batches else ""
        return InterruptedRun(
            f"stopped; {epochs} of {self.epochs} epochs{further} are saved in {self.folder.path}",
            hint=f"resume with: {self.command} --run {shlex.quote(str(self.folder.path))} --resume",
        )

    def save(self) -> None:
        """Save the state, which is written in the background; the one before it is kept.

        Raises:
            CarsoError: If the state before could not be written.
        """
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, part in self.parts.items()
            for name, tensor in part.state_dict().items()
        }
        self.world.on_main(lambda: self._file.save(tensors, self._header()))
        self._saved, self._saved_at = (self.epochs_done, self.open.batches), time.monotonic()

    def _header(self) -> dict[str, Any]:
        progress = {"identity": self.identity, "metrics": self.metrics, "open": asdict(self.open)}
        return progress | self.details()

    def load(self, reporter: Reporter) -> dict[str, Any] | None:
        """Restore the newest undamaged state, and make the log of metrics agree with it.

        Returns:
            The file's header; None where training was interrupted before its first state.

        Raises:
            StateError: If the state belongs to another configuration, is damaged, or is lost.
        """
        # One process reads for all: none can take the newest state while another falls back to the older.
        found = self.world.on_main(lambda: self._read(reporter))
        if found is None:
            return None
        tensors, header = found
        self._complete = header.get("complete", False)
        # A complete training keeps none, and its weights are not touched again.
        for prefix, part in ({} if self._complete else self.parts).items():
            # In place: the optimiser and the DDP replica hold these very parameters.
            part.load_state_dict(_under(f"{prefix}.", tensors))
        self.metrics = list(header["metrics"])
        # JSON made a list of the tuple.
        self.open = OpenEpoch(**{**header["open"], "sums": tuple(header["open"]["sums"])})
        self._saved = (self.epochs_done, self.open.batches)
        batches = f" and {self.open.batches} batches" if self.open.batches else ""
        reporter.info(f"resuming after {self.epochs_done} whole epochs{batches}")
        return header

    def _read(self, reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = load_state(self.folder.state, reporter)
        if found is None:
            # Epochs are logged before they are saved: a kill explains those that lie before the first state.
            logged = read_json_lines(self.folder.metrics)
            seconds = sum(float(line["seconds"]) for line in logged)
            if len(logged) > 1 and seconds > 2 * 60.0 * self.minutes:
                raise StateError(
                    f"{self.folder.state} is missing, though {len(logged)} epochs were trained and logged",
                    hint="restore it from a copy, or train again into another folder with --run DIR",
                )
            reporter.info(f"{self.folder.path} holds no state yet: starting from the first epoch")
        else:
            self._require_identity(found[1]["identity"])
        # The state is the truth: epochs logged after it are trained again, and a damaged log is repaired.
        write_json_lines(self.folder.metrics, [] if found is None else found[1]["metrics"])
        return found

    def _require_identity(self, stored: Mapping[str, Any]) -> None:
        for key, value in self.identity.items():
            if stored.get(key) != value:
                raise StateError(
                    f"{self.folder.state} belongs to another run: its {key} is {short(stored.get(key))}, "
                    f"not {short(value)}",
                    hint="resume with the first start's options, or choose another folder with --run DIR",
                )


@dataclass(frozen=True)
class OptimiserTensors:
    """An optimiser's moments, stored as PARAMETER.MOMENT: names outlive a new order of parameters.

    Args:
        optimiser: The optimiser.
        module: Names the parameters.
        sole: Its only moment, if it has one alone; that is stored as PARAMETER.
    """

    optimiser: torch.optim.Optimizer
    module: nn.Module
    sole: str = ""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments that there are; none before the first step."""
        return {
            name if key == self.sole else f"{name}.{key}": value
            for name, parameter in self.module.named_parameters()
            # `get`, as indexing torch's defaultdict would add an empty entry.
            for key, value in self.optimiser.state.get(parameter, {}).items()
            if value is not None
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the moments, each on its parameter's device."""
        for name, parameter in self.module.named_parameters():
            moments = {self.sole: tensors[name]} if name in tensors else _under(f"{name}.", tensors)
            # A state from before the first step holds none; torch then starts them by itself.
            if moments:
                # torch keeps the counters of steps on the CPU.
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in moments.items()
                }


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
