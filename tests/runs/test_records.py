from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carso_cli.errors import StateError
from carso_cli.io.json_files import append_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.records import EvaluationFolder, Record, evaluation_id, find_to_resume
from carso_cli.runtime.reporter import SilentReporter

Make = Callable[..., Record]


def health(block: int, job: str = "defence/pgd") -> dict[str, Any]:
    return {"job": job, "block": block, "seconds": 1.0, "steps": [], "messages": []}


SIZES = {("defence/pgd", 0): 2, ("defence/pgd", 1): 2}


@pytest.fixture
def folder(tmp_path: Path, record: Make) -> EvaluationFolder:
    folder = EvaluationFolder(tmp_path / "pgd-1234")
    folder.start({"identity": {"attack": "pgd", "eps": 0.1}})
    folder.append_block([record(0), record(1)], health(0))
    folder.append_block([record(2, block=1), record(3, block=1)], health(1))
    return folder


def test_blocks_come_back(folder: EvaluationFolder, record: Make) -> None:
    blocks = folder.read_blocks(SIZES, SilentReporter())
    assert blocks["defence/pgd", 0] == [record(0), record(1)]
    assert [line["block"] for line in folder.read_health()] == [0, 1]


def test_a_number_that_is_not_finite_is_stored_as_null(folder: EvaluationFolder, record: Make) -> None:
    assert record(0, margin=float("nan"), loss=float("inf")).as_dict()["margin"] is None
    assert json.dumps(record(0, loss=float("inf")).as_dict(), allow_nan=False)


def test_every_cut_leaves_whole_blocks(folder: EvaluationFolder) -> None:
    content, gradients = folder.records.read_bytes(), folder.gradients.read_bytes()
    first_block = content[: content.index(b'"block": 1') - len('{"job": "defence/pgd", ')]
    for cut in range(0, len(content), 37):
        folder.records.write_bytes(content[:cut])
        folder.gradients.write_bytes(gradients)
        blocks = folder.read_blocks(SIZES, SilentReporter())
        assert set(blocks) == ({("defence/pgd", 0)} if cut >= len(first_block) else set())
        # Disk agrees with what was returned, gradients included.
        assert folder.records.read_bytes() == (first_block if blocks else b"")
        assert {line["block"] for line in folder.read_health()} == {place[1] for place in blocks}


def test_an_image_counted_twice_is_refused(folder: EvaluationFolder, record: Make) -> None:
    folder.append_block([record(2, block=1)], health(1))
    with pytest.raises(StateError, match="block 1 of 'defence/pgd' counts images twice"):
        folder.read_blocks(SIZES, SilentReporter())


def test_an_unplanned_job_is_refused(folder: EvaluationFolder) -> None:
    with pytest.raises(StateError, match="holds block 1 of 'defence/pgd', not planned"):
        folder.read_blocks({("defence/pgd", 0): 2}, SilentReporter())


def test_a_field_of_another_version_is_refused(folder: EvaluationFolder, record: Make) -> None:
    append_json_lines(folder.records, [{**record(0).as_dict(), "colour": "red"}])
    with pytest.raises(StateError, match="'colour'"):
        folder.read_blocks(SIZES, SilentReporter())


def test_resuming_names_what_differs(tmp_path: Path) -> None:
    stored = {"attack": "pgd", "eps": 0.1, "purifier": "a" * 64}
    folder = EvaluationFolder(tmp_path / evaluation_id(stored))
    with pytest.raises(StateError, match="holds no evaluation to resume"):
        find_to_resume(tmp_path, stored)
    folder.start({"identity": stored})
    assert find_to_resume(tmp_path, stored).path == folder.path
    with pytest.raises(StateError, match=r"eps was 0\.1, now 0\.2"):
        find_to_resume(tmp_path, {**stored, "eps": 0.2})
    with pytest.raises(StateError, match=r": other weights of the purifier$"):
        find_to_resume(tmp_path, {**stored, "purifier": "b" * 64})
    # Stored before there was a choice: float32.
    assert find_to_resume(tmp_path, stored).path == folder.path
    with pytest.raises(StateError, match=r"evaluation\.gradient_precision was fp32, now bf16$"):
        find_to_resume(tmp_path, {**stored, "gradient_precision": "bf16"})
    # A field that only the stored one has is a difference too.
    with pytest.raises(StateError, match=r": purifier was|: other weights of the purifier$"):
        find_to_resume(tmp_path, {"attack": "pgd", "eps": 0.1})


def test_resuming_names_values_and_options_in_place_of_hashes(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    stored = {"attack": "pgd", "recipe": "a" * 64, "n_images": 5, "images": "c" * 64}
    EvaluationFolder(tmp_path / evaluation_id(stored)).start(
        {"identity": stored, "values": recipe.model_dump(mode="json")}
    )
    changed = load_recipe("digits", ["data.holdout=0.1", "purifier.latent_features=7"])
    wanted = {"attack": "pgd", "recipe": "b" * 64, "n_images": 3, "images": "d" * 64}
    with pytest.raises(StateError) as raised:
        find_to_resume(tmp_path, wanted, changed)
    assert raised.value.message.endswith(
        "configuration: data.holdout was 0.02, now 0.1; purifier.latent_features was 32, now 7; "
        "--limit was 5, now 3"
    )


def test_the_nearest_of_several_is_named(tmp_path: Path) -> None:
    for identity in ({"attack": "fgsm", "eps": 0.3, "seed": 1}, {"attack": "pgd", "eps": 0.1, "seed": 0}):
        EvaluationFolder(tmp_path / evaluation_id(identity)).start({"identity": identity})
    with pytest.raises(StateError, match=r": seed was 0, now 7$"):
        find_to_resume(tmp_path, {"attack": "pgd", "eps": 0.1, "seed": 7})


def test_settings_edited_by_hand_are_refused(tmp_path: Path) -> None:
    identity = {"attack": "pgd", "eps": 0.1}
    folder = EvaluationFolder(tmp_path / evaluation_id(identity))
    folder.start({"identity": {**identity, "eps": 0.5}})
    with pytest.raises(StateError, match=r"eps was 0\.5, now 0\.1"):
        find_to_resume(tmp_path, identity)


def test_a_carried_record_names_who_settled_it(record: Make) -> None:
    first = record(0, job="defence/a", broken=True, correct=0)
    second = first.carried_to("defence/b", 0, attack="b")
    third = second.carried_to("defence/c", 0, attack="c")
    assert (second.skipped, second.skipped_by, second.job, second.attack) == (
        True,
        "defence/a",
        "defence/b",
        "b",
    )
    assert third.skipped_by == "defence/a"
    assert third.correct == 0
