"""Faults at random moments: after each, going on gives the same result, or a message says what is damaged.

    python -m pytest tests/faults --faults 200 --seed 7

plants 200 faults of every kind in turn. A failing trial names its number, and the seed draws it again: to
the same call where a process dies at one, as nearly as processor time allows where a signal comes.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from carso_cli.errors import StateError
from tests.faults.workshop import Run, Scene, Workshop

_FAILED = {1, 2, 3, 5}
_HARMLESS = {".lock"}
_ENDS = {int(signal.SIGKILL): {-9, 0}, int(signal.SIGINT): {130, 0}, int(signal.SIGTERM): {130, -15, 0}}


Trial = Callable[[Workshop, Scene, Path, random.Random], str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("trial", range(metafunc.config.getoption("--faults")))


def test_a_fault(
    workshop: Workshop,
    work: Path,
    trial: int,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    source = random.Random(f"{request.config.getoption('--seed')} {trial}")
    kind = list(KINDS)[trial % len(KINDS)]
    names = ["train-classifier"] if kind == "data taken away" else list(workshop.scenes)
    scene = workshop.scenes[source.choice(names)]
    workshop.reference(scene)
    workshop.prepare(scene, work)
    record_property("fault", f"{kind}: {KINDS[kind](workshop, scene, work, source)}")


def stopped_by(number: int) -> Trial:
    """A signal at a random moment."""

    def trial(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
        moment = source.uniform(0.01, workshop.whole[scene.name].cpu)
        run = workshop.run(work, scene.argv, signal=number, after=moment)
        assert run.status in _ENDS[number], run.stderr
        return must_continue(workshop, scene, work, run)

    return trial


def killed_at_a_file_call(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
    run = workshop.run(work, scene.argv, call=source.randint(1, 60))
    assert run.status in (-signal.SIGKILL, 0), run.stderr
    return must_continue(workshop, scene, work, run)


def killed_in_a_write(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
    run = workshop.run(work, scene.argv, file_limit=_size(workshop, scene, source), fatal=True)
    assert run.status in (-signal.SIGXFSZ, 0), run.stderr
    return must_continue(workshop, scene, work, run)


def full_disk_in_a_write(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
    run = workshop.run(work, scene.argv, file_limit=_size(workshop, scene, source), fatal=False)
    return must_say(workshop, scene, work, run, "cannot write")


def full_disk_at_a_file_call(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
    run = workshop.run(work, scene.argv, full_call=source.randint(1, 60))
    return must_say(workshop, scene, work, run, "cannot write")


def read_only_folder(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
    modes = {path: path.stat().st_mode for path in [work, *work.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    run = workshop.run(work, scene.argv, unprivileged=True)
    for path, mode in modes.items():
        path.chmod(mode)
    assert run.status == 1, run.stderr
    return must_say(workshop, scene, work, run, "cannot write")


def damaged(harm: Callable[[Path, random.Random], None]) -> Trial:
    """One file of a run, unfinished or finished, that is no longer as it was written."""

    def trial(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
        workshop.run(work, scene.argv, call=source.randint(1, 80))
        files = [path for path in sorted(work.glob("run*/**/*")) if path.is_file()]
        files = [path for path in files if path.stat().st_size and path.name not in _HARMLESS]
        if not files:
            return "nothing to damage yet"
        victim = source.choice(files)
        harm(victim, source)
        run = workshop.finish(scene, work)
        check_message(run)
        if run.status:
            assert victim.name in run.stderr, f"{victim} is not named: {run.stderr}"
            return "named"
        told = workshop.report(work)
        check_message(told)
        if victim.suffix == ".png" or victim.name in told.stderr + run.stderr:
            return "continued with a warning"
        assert told.status == 0, told.stderr
        assert workshop.tables(told) == workshop.reports[scene.name], f"after damage to {victim}"
        try:
            found = workshop.outcome(work)
        except StateError as error:
            # Nothing so far had asked for it.
            return "named when it is read" if str(victim) in error.message else pytest.fail(error.message)
        assert found == workshop.reference(scene), f"after damage to {victim}"
        return "continued"

    return trial


def truncate(path: Path, source: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: source.randrange(path.stat().st_size)])


def flip_a_bit(path: Path, source: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(bytes(content))


def remove(path: Path, source: random.Random) -> None:
    path.unlink()


def data_taken_away(workshop: Workshop, scene: Scene, work: Path, source: random.Random) -> str:
    moment = source.uniform(0.01, workshop.whole[scene.name].cpu)
    workshop.run(work, scene.argv, signal=int(signal.SIGKILL), after=moment)
    epochs = workshop.stored_epochs(work)
    lost = source.choice(sorted((work / "images").rglob("*")))
    away = work / "away"
    os.rename(lost, away)
    run = workshop.finish(scene, work)
    check_message(run)
    if run.status:
        # Images of a class fewer are other images, which the state of training refuses.
        assert run.status == 3 or "its images is" in run.stderr, run.stderr
    elif "train" in lost.parts:
        assert not epochs
        return "nothing stored yet"
    os.rename(away, lost)
    must_continue(workshop, scene, work, run)
    return "named" if run.status else "not needed"


def _size(workshop: Workshop, scene: Scene, source: random.Random) -> int:
    """Draw a number of bytes that some file of the scene is larger than."""
    whole = workshop.folder / "whole" / scene.name
    sizes = [path.stat().st_size for path in whole.glob("run*/**/*") if path.is_file()]
    return source.randrange(1, max(2, source.choice(sizes)))


def must_say(workshop: Workshop, scene: Scene, work: Path, run: Run, message: str) -> str:
    """Hold a run that could not write against its message; then go on."""
    check_message(run)
    if run.status:
        assert run.status == 1, run.stderr
        assert message in run.stderr, run.stderr
    return must_continue(workshop, scene, work, run)


def must_continue(workshop: Workshop, scene: Scene, work: Path, run: Run) -> str:
    """Go on, and compare with what the scene leaves without a fault."""
    check_message(run)
    again = workshop.finish(scene, work)
    assert again.status == 0, again.stderr
    assert workshop.outcome(work) == workshop.reference(scene)
    return "continued" if run.status else "came too late"


def check_message(run: Run) -> None:
    assert "Traceback" not in run.stderr, run.stderr
    assert "this is a bug" not in run.stderr, run.stderr
    assert run.status <= 0 or run.status == 130 or run.status in _FAILED, run.stderr


KINDS: dict[str, Trial] = {
    "SIGKILL": stopped_by(int(signal.SIGKILL)),
    "truncated file": damaged(truncate),
    "disk full in a write": full_disk_in_a_write,
    "SIGTERM": stopped_by(int(signal.SIGTERM)),
    "killed at a file call": killed_at_a_file_call,
    "flipped bit": damaged(flip_a_bit),
    "read-only folder": read_only_folder,
    "SIGINT": stopped_by(int(signal.SIGINT)),
    "killed in a write": killed_in_a_write,
    "lost file": damaged(remove),
    "disk full at a file call": full_disk_at_a_file_call,
    "data taken away": data_taken_away,
}
