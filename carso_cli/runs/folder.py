"""A run folder: the files in it, and what may be done with a folder that is already there.

recipe.yaml            the resolved recipe
environment.json       versions, device, threads, checksums of the weights used
metrics.jsonl          one line per epoch
state.safetensors      everything needed to go on with training
purifier.safetensors   the trained purifier (slow weights), written when training is complete
evaluation/            records and summaries of `carso evaluate`
ablations/             tables of `carso ablate`, and the examples that it made for them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from carso_cli.errors import StateError, UsageError

ABLATION_SCHEMA = 1
"""Version of an ablation's table; raised when a field changes its meaning."""


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
        return self.path / "evaluation"

    @property
    def ablations(self) -> Path:
        """Folder of ablations' tables, `NAME.json`."""
        return self.path / "ablations"

    def check(self, *, resume: bool) -> None:
        """Check that training may start, or go on, in the folder; nothing is created.

        Raises:
            UsageError: If the folder already holds a run and `resume` is not asked for.
            StateError: If `resume` is asked for and the folder holds nothing to resume, or a purifier
                without the state of its training, such as an imported one.
        """
        started = self.recipe.is_file()
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
        if resume and self.purifier.is_file() and not self.state.is_file():
            raise StateError(
                f"{self.path} holds a purifier without the state of its training ({self.state.name} is "
                "missing): imported purifiers have no encoder and cannot be trained on",
                hint="use it as it is, or train one anew in another folder with --run DIR",
            )

    def require_purifier(self, command: str) -> Path:
        """Return the path of the trained purifier.

        Raises:
            StateError: If the run does not exist, or its training is not complete.
        """
        if self.purifier.is_file():
            return self.purifier
        if self.state.is_file():
            raise StateError(
                f"{self.path}: training is not complete",
                hint=f"finish it with: {command} --resume",
            )
        raise StateError(f"{self.path} holds no trained purifier", hint=f"train one with: {command}")
