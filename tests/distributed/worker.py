"""What every process of the tests does: the same work, told by nothing but torchrun that it shares it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from carso_cli.data.batches import epoch_batches
from carso_cli.distributed import World, join, leave
from carso_cli.errors import DataError
from carso_cli.reporter import SilentReporter
from carso_cli.workflows.attack import attack


class Listening(SilentReporter):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[Listening]:
        yield self

    def advance(self, steps: int = 1, **figures: float) -> None:
        self.told.append(steps)


def primitives(world: World, out: Path) -> dict[str, Any]:
    def fail() -> None:
        raise DataError("damaged", hint="fetch it again")

    try:
        world.on_main(fail)
        raised = ""
    except DataError as error:
        raised = f"{error.message}; {error.hint}"
    return {
        "rank": world.rank,
        "size": world.size,
        "shared out": list(world.shared_out(list("abcdefg"), lambda item: [item.upper(), world.rank])),
        "on main": world.on_main(lambda: os.getpid() if world.is_main else -1),
        "raised": raised,
        "sum": world.sum(torch.tensor([1.0, world.rank])).tolist(),
        "epoch": [batch[world.own(len(batch))].tolist() for batch in epoch_batches(23, 5, 0, 0)],
    }


def main() -> None:
    out = Path(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[1] / "workflows"))
    toys = importlib.import_module("toys")
    world = join(torch.device("cpu"))
    reporter = Listening()
    answers = primitives(world, out)
    answers["summary"] = toys.run_toy(out / "evaluation", reporter)
    defence = toys.LinearDefence(noise=0.5)
    images = toys.images_with_margins(defence, [0.3, 0.6, 0.9, 1.1, 1.3, 1.6, 0.5, 1.2, 2.0])
    attack(
        toys.small_recipe(),
        run=out / "attack",
        reporter=reporter,
        name="pgd-eot",
        images=images,
        defence=defence,
        device="cpu",
    )
    answers["told"] = sum(reporter.told)
    (out / f"rank{world.rank}.json").write_text(json.dumps(answers))
    leave()


if __name__ == "__main__":
    main()
