"""Two and three processes come to the results of one."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runtime.reporter import SilentReporter

pytestmark = pytest.mark.slow
Answers = tuple[Path, list[dict[str, Any]]]


def test_work_is_shared_out_and_done_once(answers: Answers) -> None:
    _, said = answers
    size = len(said)
    assert [one["rank"] for one in said] == list(range(size))
    for one in said:
        assert one["size"] == size
        assert one["shared out"] == [[item, [item.upper(), n % size]] for n, item in enumerate("abcdefg")]
        assert one["on main"] == said[0]["on main"] > 0
        assert one["raised"] == "damaged; fetch it again"
        assert one["sum"] == [size, sum(range(size))]


def test_every_image_is_seen_once_an_epoch(answers: Answers) -> None:
    _, said = answers
    for batch in zip(*(one["epoch"] for one in said), strict=True):
        # Every process's share differs from another's by one image at most: the last batch has three.
        assert max(map(len, batch)) - min(map(len, batch)) <= 1
    assert sorted(image for one in said for batch in one["epoch"] for image in batch) == list(range(23))


def test_records_do_not_depend_on_the_number_of_processes(answers: Answers, alone: Path) -> None:
    out, _ = answers
    (records,) = (out / "evaluation").glob("evaluation/*/records.jsonl")
    assert records.read_bytes() == next(alone.glob("evaluation/*/records.jsonl")).read_bytes()
    health, reference = (
        [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in read_json_lines(next(folder.glob("evaluation/*/gradients.jsonl")))
        ]
        for folder in (out / "evaluation", alone)
    )
    assert health == reference


def test_every_process_returns_the_result_that_one_writes(answers: Answers) -> None:
    out, said = answers
    stored = read_json(next((out / "evaluation").glob("evaluation/*/summary.json")))
    # What another evaluation measured on the exact view is looked up whenever the result is shown.
    assert all(one["summary"] == stored | {"exact": None} for one in said)
    # The others are silent.
    assert [one["told"] > 0 for one in said] == [True] + [False] * (len(said) - 1)


def test_examples_do_not_depend_on_the_number_of_processes(
    answers: Answers, toys: ModuleType, tmp_path: Path
) -> None:
    from carso_cli.evaluation.attack import attack

    defence = toys.LinearDefence(noise=0.5)
    images = toys.images_with_margins(defence, [0.3, 0.6, 0.9, 1.1, 1.3, 1.6, 0.5, 1.2, 2.0])
    attack(
        toys.small_recipe(),
        run=tmp_path,
        reporter=SilentReporter(),
        name="pgd-eot",
        images=images,
        defence=defence,
        device="cpu",
    )
    name = "attacks/pgd-eot-defence.safetensors"
    expected, header = load_tensors(tmp_path / name)
    found, other = load_tensors(answers[0] / "attack" / name)
    assert header == other
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def alone(toys: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same evaluation without torchrun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("alone")
    toys.run_toy(folder, SilentReporter())
    torch.set_num_threads(threads)
    return folder
