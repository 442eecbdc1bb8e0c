"""Scenes that faults are planted in, and what must hold after each fault.

A scene is a command line in a folder; its outcome is everything that it leaves on disk but times. A
`Workshop` runs scenes in a server of forked processes (`server.py`), each once without a fault first.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from carso_cli.errors import StateError
from carso_cli.io.checksum import fingerprint
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.runs.checkpoints import load_tensors
from tests.toys import TINY

_SETTINGS = (
    *TINY,
    "training.epochs=3",
    "training.save_every_minutes=0",
    "training.learning_rate.annealing_epochs=1",
    "training.batch_size=10",
    "data.train_limit=40",
    "classifier.training.epochs=3",
    "classifier.training.batch_size=10",
)
_FOLDER_OF_IMAGES = ("data.name=image-folder", "data.root=images", "data.train=train", "data.test=test")
_TIMES = {"seconds", "seconds_total", "images_per_second", "peak_memory_bytes", "working_folder"}
NOTHING_YET = re.compile(r"holds no (run|evaluation) to resume")


@dataclass(frozen=True)
class Scene:
    """A command with its options, and the scene in whose folder it starts."""

    name: str
    options: tuple[str, ...]
    before: str | None = None
    resumable: bool = True

    @property
    def argv(self) -> list[str]:
        return [self.name, *self.options]


def _set(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in ("--set", value))


_TRAIN = ("digits", "--run", "run", *_set(_SETTINGS))
_IN_RUN = ("--run", "run", "--attack")
SCENES = (
    Scene("train-purifier", _TRAIN),
    Scene("evaluate", (*_IN_RUN, "pgd", "--limit", "8"), "train-purifier"),
    Scene("attack", (*_IN_RUN, "pgd", "--limit", "6"), "train-purifier", resumable=False),
    Scene("ablate", (*_IN_RUN, "fgsm", "--limit", "4", "--adversarial-fraction", "0,0.5"), "train-purifier"),
    Scene("train-classifier", (*_TRAIN, *_set(_FOLDER_OF_IMAGES))),
)


@dataclass(frozen=True)
class Run:
    """How a process ended: its exit code or minus the signal, processor seconds, what it printed."""

    status: int
    cpu: float
    stdout: str
    stderr: str


class Workshop:
    """Runs scenes, whole and with faults.

    Args:
        folder: Where their folders are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}
        self.scenes = {scene.name: scene for scene in SCENES}
        self.whole: dict[str, Run] = {}
        self.outcomes: dict[str, Any] = {}
        self.reports: dict[str, Any] = {}

    def close(self) -> None:
        """End the server."""
        self._server.communicate(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        found: dict[str, Any] = json.loads(self._server.stdout.readline())
        return found

    def run(self, work: Path, argv: Sequence[str], **fault: Any) -> Run:
        """Run one command line in `work`, with a fault planted."""
        request = {"argv": list(argv), "cwd": str(work), "home": str(self.folder / "home"), "fault": fault}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Run(**self._answer())

    def reference(self, scene: Scene) -> Any:
        """Return a scene's outcome without a fault."""
        if scene.name not in self.outcomes:
            work = self.prepare(scene, self.folder / "whole" / scene.name)
            run = self.whole[scene.name] = self.run(work, scene.argv)
            assert run.status == 0, run.stderr
            self.outcomes[scene.name] = self.outcome(work)
            self.reports[scene.name] = self.tables(self.report(work))
        return self.outcomes[scene.name]

    def report(self, work: Path) -> Run:
        """Draw every table from what lies in a work folder."""
        return self.run(work, ["report", "run", "--format", "json"])

    def prepare(self, scene: Scene, work: Path) -> Path:
        """Make the folder that a scene starts in."""
        if scene.before is None:
            _make_images(work / "images")
        else:
            self.reference(self.scenes[scene.before])
            shutil.copytree(self.folder / "whole" / scene.before, work)
        return work

    @staticmethod
    def stored_epochs(work: Path) -> int:
        """Return the whole epochs in a run's newest state, 0 if there is none."""
        try:
            return len(load_tensors(work / "run" / "state.safetensors")[1]["metrics"])
        except StateError:
            return 0

    def finish(self, scene: Scene, work: Path) -> Run:
        """Go on as the messages say: `--resume`, or from the start where nothing was stored yet."""
        argv = scene.argv
        if not scene.resumable:
            return self.run(work, argv)
        epochs = self.stored_epochs(work)
        run = self.run(work, [*argv, "--resume"])
        if run.status == StateError.exit_code and NOTHING_YET.search(run.stderr):
            run = self.run(work, argv)
        elif run.status == 0 and epochs and scene.name.startswith("train"):
            assert f"resuming after {epochs} whole epochs" in run.stderr, run.stderr
        return run

    @staticmethod
    def outcome(work: Path) -> dict[str, Any]:
        """Return everything that commands leave in `work`, by file; times and pictures left out."""
        found: dict[str, Any] = {}
        for path in sorted(work.glob("run*/**/*")):
            name = str(path.relative_to(work))
            if path.name in ("purifier.safetensors", "classifier.safetensors") or "attacks" in path.parts:
                if path.suffix == ".safetensors":
                    tensors, metadata = load_tensors(path)
                    found[name] = fingerprint(tensors), metadata
            elif path.suffix == ".jsonl":
                found[name] = sorted(json.dumps(_timeless(line)) for line in read_json_lines(path))
            elif path.suffix == ".json":
                found[name] = _timeless(read_json(path))
            elif path.suffix == ".yaml":
                found[name] = path.read_text()
        return found

    @staticmethod
    def tables(report: Run) -> Any:
        """Return the tables of a report without the times in them."""

        def timeless(cell: Any) -> Any:
            return None if isinstance(cell, dict) and cell["unit"] == "minutes" else cell

        found = json.loads(report.stdout)["tables"]
        return [[[timeless(cell) for cell in row["cells"]] for row in table["rows"]] for table in found]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _make_images(folder: Path) -> None:
    """Write ten classes of a few grey squares each, so that reading them takes no time."""
    for split, count in (("train", 4), ("test", 2)):
        for label in range(10):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for number in range(count):
                shade = (25 * label + 3 * number, 128, 255 - 20 * label)
                Image.new("RGB", (32, 32), shade).save(place / f"{number}.png")
