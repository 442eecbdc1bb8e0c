"""Runs one attack on one block of images: perturb, check again, score, record.

`perturb` and `pick` serve `carso attack` too. Everything random is a function of the seed, the job and the
block, so a block can be run again, or alone, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.registry import Budget, build_attack
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import NumericsError
from carso_cli.evaluation.models import Models
from carso_cli.evaluation.protocols import UNPERTURBED, Job
from carso_cli.evaluation.scoring import CONFIRMATION, REPORT, SELECTION, Score, Scorer
from carso_cli.runs.records import Record
from carso_cli.runtime.seed import derive_seed


@dataclass(frozen=True, eq=False)
class Setting:
    """What all blocks of an evaluation share.

    Args:
        subject: The models under attack.
        images: The images, in the order of their blocks.
        threat: Norm, radius and pixel range.
        budget: Budget of the attacks.
        seed: Seed of attacks and scoring.
        draws: R, draws per scoring set of a defence.
        selects: Whether something is chosen among several attacks, which takes draws of its own.
    """

    models: Models
    images: ImageSet
    threat: ThreatModel
    budget: Budget
    seed: int
    draws: int
    selects: bool

    def pixels(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Return images (B, channels, H, W), labels (B,) and positions in the full split."""
        chosen = torch.tensor(positions, dtype=torch.long)
        device = self.models.device
        labels = self.images.labels[chosen].to(device)
        return self.images.pixels(chosen).to(device), labels, self.images.indices[chosen].tolist()


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The worst example that an attack offers for each image, and its scores.

    Args:
        examples: (B, channels, H, W).
        parts: Name of the attack's part that each comes from.
        distances: (B,) size of the change, in the threat's norm.
        selection: Scores that decided; those of the report where there was nothing to decide.
        report: Scores on draws that decided nothing.
        selected: Whether there was something to decide.
    """

    examples: Tensor
    parts: list[str]
    distances: Tensor
    selection: Score
    report: Score
    selected: bool


def perturb(
    setting: Setting,
    job: Job,
    images: Tensor,
    labels: Tensor,
    block: int | str,
    recorder: GradientRecorder | None = None,
) -> dict[str, Tensor]:
    """Run a job's attack on one block and check its examples again.

    Returns:
        Examples by name of the attack's part, each (B, channels, H, W).

    Raises:
        NumericsError: If an example leaves the ball or the pixel range, naming the attack.
    """
    target = setting.models.target(job, setting.seed, block)
    attack = build_attack(
        job.attack,
        setting.threat,
        setting.budget,
        stochastic=target.stochastic,
        seed=derive_seed(setting.seed, "attack", job.key, block),
        recorder=recorder,
    )
    found = attack.candidates(target, images, labels)
    for part, examples in found.items():
        inside = setting.threat.contains(examples, images)
        if not bool(inside.all()):
            worst = float(setting.threat.distance(examples, images).max())
            raise NumericsError(
                f"attack '{job.attack}' ({part}) left the ball or the pixel range on "
                f"{int((~inside).sum())} of {len(inside)} images: largest change {worst:.6g}, "
                f"eps {setting.threat.eps:.6g}"
            )
    return found


def select_worst(
    setting: Setting,
    scorer: Scorer,
    found: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    indices: list[int],
) -> AttackResult:
    """Choose each image's worst example on the selection draws; score it on the report draws."""
    names = list(found)
    if len(names) == 1 and not setting.selects:
        (examples,) = found.values()
        report = scorer(examples, labels, indices, REPORT)
        distances = setting.threat.distance(examples, images).cpu()
        return AttackResult(examples, names * len(labels), distances, report, report, selected=False)
    scores = [scorer(found[name], labels, indices, SELECTION) for name in names]
    order = [
        min(range(len(names)), key=lambda k: (int(scores[k].correct[row]), float(scores[k].margin[row])))
        for row in range(len(labels))
    ]
    examples = torch.stack([found[names[choice]][row] for row, choice in enumerate(order)])
    return AttackResult(
        examples,
        [names[choice] for choice in order],
        setting.threat.distance(examples, images).cpu(),
        _gather(scores, order),
        scorer(examples, labels, indices, REPORT),
        selected=True,
    )


def _gather(scores: list[Score], order: list[int]) -> Score:
    def rows(field: str) -> Tensor:
        return torch.stack([getattr(scores[choice], field)[row] for row, choice in enumerate(order)])

    return Score(
        draws=scores[0].draws,
        correct=rows("correct"),
        majority=rows("majority"),
        predicted=rows("predicted"),
        margin=rows("margin"),
        loss=rows("loss"),
        disagreements=rows("disagreements"),
    )


def run_block(
    setting: Setting,
    job: Job,
    block: int,
    positions: Sequence[int],
    earlier: Callable[[int], tuple[Record | None, Record | None]],
) -> tuple[list[Record], dict[str, Any]]:
    """Run a job on one block.

    Args:
        setting: What all blocks share.
        job: The job.
        block: Number of the block.
        positions: Its images' positions in the image set.
        earlier: From an image's index to its clean record (None while that is made) and to the record of an
            earlier job that settles it, if any.

    Returns:
        One record per image, in order, and the block's line on seconds and gradients.
    """
    started = time.perf_counter()
    every = setting.images.indices[list(positions)].tolist()
    skipped = {index: record for index in every if (record := earlier(index)[1]) is not None}
    open_positions = [place for place, index in zip(positions, every, strict=True) if index not in skipped]
    recorder = GradientRecorder()
    fresh: dict[int, Record] = {}
    if open_positions:
        images, labels, indices = setting.pixels(open_positions)
        scorer = setting.models.scorer(job, setting.seed, setting.draws)
        examples = perturb(setting, job, images, labels, block, recorder)
        found = select_worst(setting, scorer, examples, images, labels, indices)
        broken = _broken(scorer, found, labels, indices)
        for row, index in enumerate(indices):
            fresh[index] = make_record(
                setting, job, block, index, int(labels[row]), found, row, broken[row], earlier(index)[0]
            )
    own = {"view": job.view, "target": job.target, "attack": job.attack, "eps": _eps(setting, job)}
    records = [
        skipped[index].carried_to(job.key, block, **own) if index in skipped else fresh[index]
        for index in every
    ]
    health = {
        "job": job.key,
        "block": block,
        "seconds": round(time.perf_counter() - started, 4),
        "steps": [_finite(step.as_dict()) for step in recorder.steps()],
        "messages": recorder.messages,
    }
    return records, health


def _broken(scorer: Scorer, found: AttackResult, labels: Tensor, indices: list[int]) -> list[bool]:
    """Say of each image whether its example is wrong in all selection draws and in all of a third set.

    The third set is drawn only where the first is unanimous, and keeps the report draws out of the decision.
    """
    broken = (found.selection.correct == 0).tolist() if found.selected else [False] * len(labels)
    unanimous = [row for row, wrong in enumerate(broken) if wrong]
    if unanimous and scorer.draws > 1:
        again = scorer(
            found.examples[unanimous], labels[unanimous], [indices[row] for row in unanimous], CONFIRMATION
        )
        for row, correct in zip(unanimous, again.correct.tolist(), strict=True):
            broken[row] = correct == 0
    return broken


def make_record(
    setting: Setting,
    job: Job,
    block: int,
    index: int,
    label: int,
    found: AttackResult,
    row: int,
    broken: bool,
    clean: Record | None,
) -> Record:
    """Return what was found about one image of a block.

    Args:
        setting: What all blocks share.
        job: The job.
        block: Number of the block.
        index: Position of the image in the full split.
        label: Its label.
        found: What was found about the block.
        row: Place of the image in it.
        broken: Whether the example fools the target with certainty.
        clean: The image's clean record; None where this is it.
    """
    defence = setting.models.require_defence() if job.target == "defence" else None
    margin = float(found.selection.margin[row])
    return Record(
        job=job.key,
        block=block,
        index=index,
        label=label,
        target=job.target,
        attack=job.attack,
        part=found.parts[row],
        view=job.view,
        aggregation=getattr(defence, "aggregation", None),
        n_samples=None if defence is None else defence.n_samples,
        eps=_eps(setting, job),
        norm=setting.threat.norm,
        seed=setting.seed,
        draws=found.report.draws,
        correct=int(found.report.correct[row]),
        correct_selection=int(found.selection.correct[row]) if found.selected else None,
        majority_correct=bool(found.report.majority[row]),
        margin=margin,
        clean_margin=margin if clean is None else clean.margin,
        loss=float(found.selection.loss[row]),
        distance=float(found.distances[row]),
        disagreements=int(found.report.disagreements[row]),
        broken=broken,
        skipped=False,
        skipped_by=None,
    )


def _eps(setting: Setting, job: Job) -> float:
    return 0.0 if job.attack == UNPERTURBED else float(setting.threat.eps)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: value if abs(value) < float("inf") else None for key, value in values.items()}
