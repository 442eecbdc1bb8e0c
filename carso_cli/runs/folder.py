"""A run folder: the files in it, and what may be done with a folder that already exists.

recipe.yaml            the resolved recipe
environment.json       versions, device, threads, checksums of the weights used
metrics.jsonl          one line per epoch
metrics.csv            the same as a table, for other programs; never read here
state.safetensors      everything needed to resume training; once that is complete, how it went
previous-state.…       the state before it, for when it is damaged; until training is complete
purifier.safetensors   the trained purifier (slow weights), written when training is complete
evaluation/            records and summaries of `carso evaluate`
ablations/             tables of `carso ablate`, NAME-ATTACK.json, and the examples that it made for them
attacks/               examples of `carso attack`
.lock                  which process is training here, if any
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carso_cli.errors import StateError, UsageError
from carso_cli.io.json_files import ensure_folder, read_json_lines
from carso_cli.runs.lock import locked
from carso_cli.runtime.reporter import Reporter

STOPPED = "stopped"
"""Key of the last line of metrics of a training that ended early, for want of time."""
ABLATION_SCHEMA = 1
"""Version of an ablation's table; raised when a field changes its meaning."""


def previous_state(state: Path) -> Path:
    """Return where the state before the newest is kept."""
    return state.with_name(f"previous-{state.name}")


class RunFolder:
    """Paths inside one run folder, named as in the list above.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.metrics_table = path / "metrics.csv"
        self.state = path / "state.safetensors"
        self.purifier = path / "purifier.safetensors"

    @property
    def evaluation(self) -> Path:
        """Folder of evaluation records and summaries; may raise as `inside`."""
        return self.inside("evaluation")

    @property
    def ablations(self) -> Path:
        """Folder of ablations' tables; may raise as `inside`."""
        return self.inside("ablations")

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
        """Create the folder and lock it for a training; raises as `check`, `locked` and `ensure_folder`."""
        with locked(ensure_folder(self.path), reporter):
            # Again, since another process may have trained here between the first check and the lock.
            self.check(resume=resume)
            yield

    @property
    def trained_here(self) -> bool:
        """Whether training has saved a state: not so of a run that was imported, or only evaluated."""
        return self.state.is_file() or previous_state(self.state).is_file()

    def check(self, *, resume: bool, restarted: bool = False) -> bool:
        """Check that training may start or resume in the folder; nothing is created.

        Args:
            resume: Whether it is to resume.
            restarted: Whether torchrun restarted its processes after one of them died; then it resumes if
                the run was begun.

        Returns:
            Whether it resumes.

        Raises:
            UsageError: If the folder already holds a run and `resume` is not asked for.
            StateError: If `resume` is asked for and the folder holds nothing to resume, or a purifier
                without the state of its training, such as an imported one.
        """
        # Any one of them will do: a run that has lost its recipe must not be trained over.
        started = self.recipe.is_file() or self.trained_here or self.purifier.is_file()
        # torchrun repeats the command line of the first start, which may lack --resume.
        resume = started if restarted else resume
        if started and not resume:
            raise UsageError(
                f"{self.path} already holds a run",
                hint="resume it with --resume, or choose another folder with --run DIR",
            )
        if resume and not started:
            raise StateError(
                f"{self.path} holds no run to resume ({self.recipe.name} is missing)",
                hint="leave out --resume to start one",
            )
        # A training that was killed between its purifier and its last state has a log.
        if resume and self.purifier.is_file() and not (self.trained_here or self.metrics.is_file()):
            raise StateError(
                f"{self.path} holds a purifier without the state of its training ({self.state.name} is "
                "missing): imported purifiers have no encoder and cannot be trained on",
                hint="use it as it is, or train another one in another folder with --run DIR",
            )
        return resume

    def check_recipe(self) -> None:
        """Check that a trained run has its recipe.

        Raises:
            StateError: If the recipe is missing.
        """
        # Without one it would be evaluated by a default recipe, which is not how it was trained.
        if not self.recipe.is_file() and (self.trained_here or self.purifier.is_file()):
            raise StateError(
                f"{self.recipe} is missing: how the purifier beside it was trained is not known",
                hint="restore it from a copy, or resume its training with --resume, which writes it again",
            )

    def resume_command(self, name: str = "train-purifier", *options: str) -> str:
        """Return the command that resumes the training, to be pasted into a shell.

        With the run's own recipe, which holds every `--set`; its `--limit` is stored too.

        Args:
            name: The command.
            options: Options of it.
        """
        return shlex.join(["carso", name, str(self.recipe), *options, "--run", str(self.path), "--resume"])

    def read_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Return the log of training, one line per epoch; empty where nothing was trained here.

        Args:
            epochs: How many the recipe asks for: all of them must be there once training is complete.

        Raises:
            StateError: If the log is damaged, or has lost epochs.
        """
        # A training may be appending to it.
        lines = read_json_lines(self.metrics, repair=False)
        # Before the purifier is written, fewer lines are no fault: training is under way.
        early = any(STOPPED in line for line in lines[-1:])
        if self.trained_here and self.purifier.is_file() and len(lines) != epochs and not early:
            raise StateError(
                f"{self.metrics} holds {len(lines)} of the {epochs} epochs that were trained",
                hint=f"{self.resume_command()} writes it again",
            )
        return lines

    def require_purifier(self, command: str) -> Path:
        """Return the path of the trained purifier.

        Raises:
            StateError: If the run does not exist, or its training is not complete; the hint says `command`.
        """
        if self.purifier.is_file():
            return self.purifier
        if self.trained_here:
            finish = self.resume_command("train-purifier") if self.recipe.is_file() else f"{command} --resume"
            raise StateError(f"{self.path}: training is not complete", hint=f"finish it with: {finish}")
        raise StateError(f"{self.path} holds no trained purifier", hint=f"train one with: {command}")
