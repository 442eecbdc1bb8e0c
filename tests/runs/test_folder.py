from __future__ import annotations

from pathlib import Path

import pytest

from carso_cli.errors import CarsoError, StateError, UsageError
from carso_cli.io.json_files import append_json_lines, write_atomically
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import SilentReporter


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("untouched")
    (tmp_path / "run").mkdir()
    return tmp_path / "outside"


@pytest.mark.parametrize("name", ["evaluation", "ablations"])
def test_folders_that_lead_out_of_the_run_are_refused(outside: Path, name: str) -> None:
    (outside.parent / "run" / name).symlink_to(outside)
    with pytest.raises(StateError, match=f"{name} is a link; what a run writes stays in its folder"):
        getattr(RunFolder(outside.parent / "run"), name)


def test_a_run_that_is_itself_a_link_is_used(outside: Path) -> None:
    (outside.parent / "link").symlink_to(outside)
    assert RunFolder(outside.parent / "link").evaluation == outside.parent / "link" / "evaluation"


def test_files_that_lead_out_of_the_run_are_replaced_or_refused(outside: Path) -> None:
    target = outside.parent / "run" / "metrics.jsonl"
    target.symlink_to(outside / "precious")
    with pytest.raises(CarsoError, match="cannot write"):
        append_json_lines(target, [{"epoch": 0}])
    write_atomically(target, "new")
    assert not target.is_symlink()
    assert (outside / "precious").read_text() == "untouched"


def test_a_state_without_its_recipe_is_no_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="already holds a run"):
        RunFolder(tmp_path).check(resume=False)
    RunFolder(tmp_path).check(resume=True)


def test_a_purifier_without_its_recipe_is_not_trained_over(tmp_path: Path) -> None:
    (tmp_path / "purifier.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="already holds a run"):
        RunFolder(tmp_path).check(resume=False)
    with pytest.raises(StateError, match="a purifier without the state of its training"):
        RunFolder(tmp_path).check(resume=True)


def test_a_claimed_run_is_refused_to_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    quiet = SilentReporter()
    with (
        folder.claimed(resume=False, reporter=quiet),
        pytest.raises(StateError, match="in use by another process"),
        folder.claimed(resume=False, reporter=quiet),
    ):
        pass
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_log_that_has_lost_epochs_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics(2) == []
    append_json_lines(folder.metrics, [{"epoch": 0}])
    folder.state.write_bytes(b"")
    assert folder.read_metrics(2) == [{"epoch": 0}]
    folder.purifier.write_bytes(b"")
    with pytest.raises(StateError, match=r"metrics\.jsonl holds 1 of the 2 epochs that were trained"):
        folder.read_metrics(2)
    append_json_lines(folder.metrics, [{"epoch": 1}])
    assert len(folder.read_metrics(2)) == 2
