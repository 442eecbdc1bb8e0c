"""A run folder: the files in it, and what may be done with a folder that is already there.

recipe.yaml            the resolved recipe
environment.json       versions, device, threads, checksums of the weights used
metrics.jsonl          one line per epoch
state.safetensors      everything needed to go on with training
previous-state.…       the state before it, for when it is damaged
purifier.safetensors   the trained purifier (slow weights), written when training is complete
evaluation/            records and summaries of `carso evaluate`
ablations/             tables of `carso ablate`, and the examples that it made for them
attacks/               examples of `carso attack`
.lock                  who is training here, if anyone
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carso_cli.errors import StateError, UsageError
from carso_cli.io.json_files import ensure_folder, read_json_lines
from carso_cli.runs.lock import locked
from carso_cli.runtime.reporter import Reporter

ABLATION_SCHEMA = 1
"""Version of an ablation's table; raised when a field changes its meaning."""


def previous_state(state: Path) -> Path:
    """Return where the state before the newest is kept."""
    return state.with_name(f"previous-{state.name}")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Where the run ran."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        """Everything needed to go on with training."""
        return self.path / "state.safetensors"

    @property
    def purifier(self) -> Path:
        """The trained purifier."""
        return self.path / "purifier.safetensors"

    @property
    def evaluation(self) -> Path:
        """Folder of evaluation records and summaries."""
        return self.inside("evaluation")

    def inside(self, *parts: str) -> Path:
        """Return a path in this folder to write to.

        Raises:
            StateError: If a part of it is a link, which might lead out of the run; the run itself may be one.
        """
        path = self.path
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise StateError(
                    f"{path} is a link; what a run writes stays in its folder",
                    hint="put a folder in its place, or choose another run with --run DIR",
                )
        return path

    @contextmanager
    def claimed(self, *, resume: bool, reporter: Reporter) -> Iterator[None]:
        """Create the folder and hold it for a training, other processes kept out; see `check` and `locked`.

        Raises:
            UsageError: If the folder already holds a run and `resume` is not asked for.
            StateError: If there is nothing to resume, or another process is at work here.
            CarsoError: If the folder cannot be written.
        """
        with locked(ensure_folder(self.path), reporter):
            # Again, since another process may have come and gone.
            self.check(resume=resume)
            yield

    @property
    def ablations(self) -> Path:
        """Folder of ablations' tables, `NAME-ATTACK.json`."""
        return self.inside("ablations")

    def check(self, *, resume: bool, restarted: bool = False) -> bool:
        """Check that training may start, or go on, in the folder; nothing is created.

        Args:
            resume: Whether it is to go on.
            restarted: Whether its processes were started anew after one of them died; then it goes on if
                they had come to begin it.

        Returns:
            Whether it goes on.

        Raises:
            UsageError: If the folder already holds a run and `resume` is not asked for.
            StateError: If `resume` is asked for and the folder holds nothing to resume, or a purifier
                without the state of its training, such as an imported one.
        """
        started = self.recipe.is_file() or self.trained_here or self.purifier.is_file()
        resume = started if restarted else resume
        if started and not resume:
            raise UsageError(
                f"{self.path} already holds a run",
                hint="go on with it with --resume, or choose another folder with --run DIR",
            )
        if resume and not started:
            raise StateError(
                f"{self.path} holds no run to resume ({self.recipe.name} is missing)",
                hint="leave out --resume to start one",
            )
        if resume and self.purifier.is_file() and not self.trained_here:
            raise StateError(
                f"{self.path} holds a purifier without the state of its training ({self.state.name} is "
                "missing): imported purifiers have no encoder and cannot be trained on",
                hint="use it as it is, or train one anew in another folder with --run DIR",
            )
        return resume

    @property
    def trained_here(self) -> bool:
        """Whether training has saved a state: not so of a run that was imported, or only evaluated."""
        return self.state.is_file() or previous_state(self.state).is_file()

    def check_recipe(self) -> None:
        """Check that a run which was trained still says how.

        Raises:
            StateError: If it has lost its recipe.
        """
        if not self.recipe.is_file() and (self.trained_here or self.purifier.is_file()):
            raise StateError(
                f"{self.recipe} is missing: how the purifier beside it was trained is not known",
                hint="restore it from a copy, or go on with its training by --resume, which writes it anew",
            )

    def read_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Return the log of training, one line per epoch; empty where nothing was trained here.

        Args:
            epochs: How many the recipe asks for: all of them must be there once training is complete.

        Raises:
            StateError: If the log is damaged, or has lost epochs.
        """
        lines = read_json_lines(self.metrics, repair=False)
        if self.trained_here and self.purifier.is_file() and len(lines) != epochs:
            raise StateError(
                f"{self.metrics} holds {len(lines)} of the {epochs} epochs that were trained",
                hint=f"carso train-purifier {self.recipe} --run {self.path} --resume writes it anew",
            )
        return lines

    def require_purifier(self, command: str) -> Path:
        """Return the path of the trained purifier.

        Raises:
            StateError: If the run does not exist, or its training is not complete.
        """
        if self.purifier.is_file():
            return self.purifier
        if self.trained_here:
            raise StateError(
                f"{self.path}: training is not complete",
                hint=f"finish it with: {command} --resume",
            )
        raise StateError(f"{self.path} holds no trained purifier", hint=f"train one with: {command}")
