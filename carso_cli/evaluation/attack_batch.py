"""Runs attacks on blocks of images: perturb, check the examples again, score, record.

- `perturb` and `select_worst`: the examples of one block, and the worst of each image with its scores;
- `attack_block`: the same as records, without the images that an earlier attack has broken;
- `run_blocks`: every block that is not stored yet, shared out over all processes.

Everything random is a function of the seed, the job and the block, so a block can be run again, or alone,
with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.registry import Budget, build_attack
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.data.image_set import ImageSet
from carso_cli.distributed.world import World
from carso_cli.errors import RESUME, InterruptedRun, NumericsError
from carso_cli.evaluation.models import Models
from carso_cli.evaluation.protocols import GIVEN, UNPERTURBED, Job
from carso_cli.evaluation.scoring import CONFIRMATION, REPORT, SELECTION, Score, Scorer
from carso_cli.runs.records import Record
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import derive_seed

Block = TypeVar("Block")
Result = TypeVar("Result")


class Batch(NamedTuple):
    """The images of one block, on the models' device."""

    images: Tensor
    """(B, channels, H, W) in [0, 1]."""
    labels: Tensor
    """(B,) int64."""
    indices: list[int]
    """Position of each image in the full split."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What all blocks of an evaluation share.

    Args:
        models: The models under attack.
        images: The images, in the order of their blocks.
        threat: Norm, radius and pixel range.
        budget: Budget of the attacks.
        seed: Seed of attacks and scoring.
        draws: R, draws per scoring set of a defence.
        selects: Whether the worst of several attacks is selected, which takes draws of its own.
        given: Examples of all the images made elsewhere, which the attack `given` offers.
    """

    models: Models
    images: ImageSet
    threat: ThreatModel
    budget: Budget
    seed: int
    draws: int
    selects: bool
    given: Tensor | None = None

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the images at some positions of the image set."""
        # Indexed on the CPU, where the whole split lies as uint8; only one block is on the device at a time.
        chosen, device = torch.tensor(positions, dtype=torch.long), self.models.device
        images, labels = self.images.pixels(chosen).to(device), self.images.labels[chosen].to(device)
        return Batch(images, labels, self.images.indices[chosen].tolist())

    def scorer(self, job: Job) -> Scorer:
        """Return what scores a job's examples."""
        return self.models.scorer(job, self.seed, self.draws)

    def eps(self, job: Job) -> float:
        """Return the radius of a job: 0 where nothing is perturbed."""
        return 0.0 if job.attack == UNPERTURBED else float(self.threat.eps)


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The worst example that an attack offers for each image, and its scores.

    Args:
        examples: (B, channels, H, W).
        parts: Name of the attack's part that each comes from.
        distances: (B,) size of the change, in the threat's norm.
        selection: Scores on the selection draws; those of the report where there was nothing to select.
        report: Scores on draws that decided nothing.
        selected: Whether there was something to select.
    """

    examples: Tensor
    parts: list[str]
    distances: Tensor
    selection: Score
    report: Score
    selected: bool


def perturb(
    setting: Setting, job: Job, batch: Batch, block: int | str, recorder: GradientRecorder | None = None
) -> dict[str, Tensor]:
    """Run a job's attack on one block and check its examples again.

    Returns:
        Examples by name of the attack's part, each (B, channels, H, W).

    Raises:
        NumericsError: If an example leaves the ball or the pixel range, naming the attack.
    """
    if job.attack == GIVEN and setting.given is not None:
        positions = {index: place for place, index in enumerate(setting.images.indices.tolist())}
        chosen = torch.tensor([positions[index] for index in batch.indices])
        return {GIVEN: setting.given[chosen].to(batch.images.device)}
    # Latents, attack and scoring have seeds of their own: an attack cannot foresee the scoring draws.
    target = setting.models.target(job, setting.seed, block)
    attack = build_attack(
        job.attack,
        setting.threat,
        setting.budget,
        stochastic=target.stochastic,
        seed=derive_seed(setting.seed, "attack", job.key, block),
        recorder=recorder,
    )
    found = attack.candidates(target, batch.images, batch.labels)
    for part, examples in found.items():
        # Measured here once more and not trusted: one example out of the ball would void the result.
        inside = setting.threat.contains(examples, batch.images)
        if not bool(inside.all()):
            worst = float(setting.threat.distance(examples, batch.images).max())
            raise NumericsError(
                f"attack '{job.attack}' ({part}) left the ball or the pixel range on "
                f"{int((~inside).sum())} of {len(inside)} images: largest change {worst:.6g}, "
                f"eps {setting.threat.eps:.6g}"
            )
    return found


def select_worst(setting: Setting, job: Job, found: Mapping[str, Tensor], batch: Batch) -> AttackResult:
    """Select each image's worst example on the selection draws; score it on the report draws."""
    parts, offered = zip(*found.items(), strict=True)
    # Draws that chose the worst would flatter the attacker, so the choice has a set of its own.
    order, selected = [0] * len(batch.labels), setting.selects or len(parts) > 1

    def score(examples: Tensor, draw_set: str) -> Score:
        return setting.scorer(job)(examples, batch.labels, batch.indices, draw_set)

    if selected:
        # Fewest correct draws first; among equals, the lowest margin.
        scores = [score(examples, SELECTION) for examples in offered]
        order = [
            min(range(len(parts)), key=lambda k: (int(scores[k].correct[row]), float(scores[k].margin[row])))
            for row in range(len(order))
        ]
        examples = torch.stack([offered[choice][row] for row, choice in enumerate(order)])
    else:
        examples = offered[0]
    # An image has the same report draws under every attack, so attacks do not differ by their draws.
    report = score(examples, REPORT)
    return AttackResult(
        examples,
        [parts[choice] for choice in order],
        setting.threat.distance(examples, batch.images).cpu(),
        Score.of_rows(scores, order) if selected else report,
        report,
        selected,
    )


def attack_block(
    setting: Setting,
    job: Job,
    blocks: Sequence[Sequence[int]],
    earlier: Mapping[str, Mapping[int, Record]],
    block: int,
) -> tuple[list[Record], dict[str, Any]]:
    """Run a job on one block.

    Args:
        setting: What all blocks share.
        job: The job.
        blocks: Positions of each block's images in the image set.
        earlier: The records of earlier jobs, by job key and image.
        block: Number of the block.

    Returns:
        One record per image, in order, and the block's line on seconds and gradients.
    """
    started = time.perf_counter()
    # `blocks` holds places in this image set, records positions in the full split: never mix the two.
    every = setting.images.indices[list(blocks[block])].tolist()
    skipped: dict[int, Record] = {}
    # The first that broke an image is named; a carried record is broken too, and names its origin.
    for record in (earlier[key][index] for key in job.waits_for for index in every):
        if record.broken:
            skipped.setdefault(record.index, record)
    recorder = GradientRecorder()
    records: dict[int, Record] = {}
    remaining = [place for place, index in zip(blocks[block], every, strict=True) if index not in skipped]
    if remaining:
        batch = setting.batch(remaining)
        result = select_worst(setting, job, perturb(setting, job, batch, block, recorder), batch)
        # Nothing before the first job, which is the unperturbed one itself.
        clean = earlier.get(f"{job.target}/{UNPERTURBED}", {})
        made = make_records(setting, job, block, batch, result, _broken(setting, job, result, batch), clean)
        records = dict(zip(batch.indices, made, strict=True))
    # A broken image counts with the result that broke it, under the name of this job.
    own = {"view": job.view, "target": job.target, "attack": job.attack, "eps": setting.eps(job)}
    records |= {index: record.carried_to(job.key, block, **own) for index, record in skipped.items()}
    health = {
        "job": job.key,
        "block": block,
        "seconds": round(time.perf_counter() - started, 4),
        # JSON has no NaN or infinity.
        "steps": [
            {
                key: None if isinstance(value, float) and not isfinite(value) else value
                for key, value in step.as_dict().items()
            }
            for step in recorder.steps()
        ],
        "messages": recorder.messages,
    }
    # In the order of the block, since attacked and skipped images were found separately.
    return [records[index] for index in every], health


def _broken(setting: Setting, job: Job, result: AttackResult, batch: Batch) -> list[bool]:
    """Say of each image whether its example is wrong in all selection draws and in all of a third set.

    The third set is drawn only where the first is unanimous, and keeps the report draws out of the decision.
    """
    scorer = setting.scorer(job)
    # Without selection draws only report draws could say so, and they must decide nothing.
    broken = (result.selection.correct == 0).tolist() if result.selected else [False] * len(batch.labels)
    unanimous = [row for row, wrong in enumerate(broken) if wrong]
    # Of many images near the border some fail a whole set by chance; few of these fail another.
    if unanimous and scorer.draws > 1:
        indices = [batch.indices[row] for row in unanimous]
        again = scorer(result.examples[unanimous], batch.labels[unanimous], indices, CONFIRMATION)
        for row, correct in zip(unanimous, again.correct.tolist(), strict=True):
            broken[row] = correct == 0
    return broken


def make_records(
    setting: Setting,
    job: Job,
    block: int,
    batch: Batch,
    result: AttackResult,
    broken: Sequence[bool],
    clean: Mapping[int, Record],
) -> list[Record]:
    """Return what a job found about the images of a block, one record each.

    `broken` says of each example whether it is wrong in all selection and confirmation draws; `clean` holds
    the records of the unperturbed images by their position in the full split, or nothing.
    """
    defence = setting.models.defence if job.target == "defence" else None
    selection, report = result.selection, result.report
    records = []
    for row, (index, label) in enumerate(zip(batch.indices, batch.labels.tolist(), strict=True)):
        margin = float(selection.margin[row])
        # Unknown where no unperturbed job ran beside this one, as for transferred examples.
        before = margin if job.attack == UNPERTURBED else clean[index].margin if clean else None
        records.append(
            Record(
                job=job.key,
                block=block,
                index=index,
                label=label,
                target=job.target,
                attack=job.attack,
                part=result.parts[row],
                view=job.view,
                aggregation=getattr(defence, "aggregation", None),
                n_samples=None if defence is None else defence.n_samples,
                eps=setting.eps(job),
                norm=setting.threat.norm,
                seed=setting.seed,
                draws=report.draws,
                correct=int(report.correct[row]),
                # Unknown, and not the report's count: no draws of its own decided about this example.
                correct_selection=int(selection.correct[row]) if result.selected else None,
                majority_correct=bool(report.majority[row]),
                margin=margin,
                clean_margin=before,
                loss=float(selection.loss[row]),
                distance=float(result.distances[row]),
                disagreements=int(report.disagreements[row]),
                broken=broken[row],
                skipped=False,
                skipped_by=None,
            )
        )
    return records


def run_blocks(
    sizes: Mapping[Block, int],
    work: Callable[[Block], Result],
    world: World,
    reporter: Reporter,
    title: str,
    *,
    stored: Mapping[Block, Result] | None = None,
    store: Callable[[Block, Result], None] = lambda block, result: None,
    accuracy: Callable[[Sequence[Result]], float] | None = None,
    unit: str = "images",
) -> dict[Block, Result]:
    """Run every block that is not stored yet, shared out over all processes.

    Args:
        sizes: The blocks, in order, and how far each moves the progress bar.
        work: Runs one block on one process; its result holds no tensors of a GPU.
        world: The processes.
        reporter: Where progress goes.
        title: What is written beside the bar.
        stored: Results of earlier runs.
        store: Stores one new result; called on the main process alone, in the order of the blocks.
        accuracy: From all results so far to what is shown beside the bar.
        unit: What the bar counts.

    Returns:
        The result of every block, in order, on every process.
    """
    results = {block: stored[block] for block in sizes if block in stored} if stored else {}
    missing = [block for block in sizes if block not in results]
    with reporter.progress(title, sum(sizes.values()), unit) as progress:
        if results:
            progress.advance(sum(sizes[block] for block in results))
        for block, result in world.map_sharded(missing, work):
            # In the order of the blocks: the files are the same however many processes share the work.
            if world.is_main:
                store(block, result)
            results[block] = result
            shown = {"accuracy": accuracy([*results.values()])} if accuracy else {}
            progress.advance(sizes[block], **shown)
    # Stored blocks came first above; in order again, a resumed run sums in the same order as a whole one.
    return {block: results[block] for block in sizes}


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Report a Ctrl-C as an interruption that can be resumed from a folder's stored blocks.

    Raises:
        InterruptedRun: On Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        # Nothing is saved here: each block was written as it was finished.
        raise InterruptedRun(
            f"stopped; complete blocks are saved in {folder}",
            hint=RESUME,
        ) from None
