"""Examples made against one aggregation rule, scored under all of them.

They are made against the exact view of the doubly-exponential rule, the logsumexp of the samples' logits,
which has a usable gradient whatever the classifier's scale. A rule without gradients of its own, such as
majority vote, is thereby met with real examples, and its accuracy under them is a real bound.

    <root run>/ablations/transferred-<id>/   settings.json, records.jsonl, gradients.jsonl, summary.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from carso_cli import __version__
from carso_cli.distributed.world import World, join
from carso_cli.errors import InterruptedRun, UsageError
from carso_cli.evaluation.attack_batch import Setting, make_record, perturb, select_worst
from carso_cli.evaluation.models import adjusted
from carso_cli.evaluation.protocols import Job
from carso_cli.evaluation.setup import Evaluation, EvaluationOptions, prepare_evaluation
from carso_cli.io.json_files import read_json, read_json_lines, write_json
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record, evaluation_id
from carso_cli.runs.summary import attack_row, decisive, figures, worst_case
from carso_cli.runtime.reporter import Reporter, SilentReporter

SOURCE = "doubly-exponential"
"""The rule that the examples are made against."""
NAME = "transferred"


def transfer_to_rules(
    recipe: Recipe,
    rules: Sequence[str],
    *,
    run: Path,
    root: Path,
    reporter: Reporter,
    resume: bool,
    **options: Unpack[EvaluationOptions],
) -> EvaluationFolder | None:
    """Make examples by the strongest white-box attack chosen, and score them under each rule.

    Args:
        recipe: The recipe.
        rules: Aggregation rules.
        run: Run folder of the purifier.
        root: Run folder that holds `ablations`.
        reporter: Where progress goes.
        resume: Go on from the last complete block.
        options: Attack, images, seed, device, as for `evaluate`.

    Returns:
        The folder of the records; None where the chosen attack follows no gradients.

    Raises:
        UsageError: If an unfinished set is stored and `resume` is not given.
        InterruptedRun: On Ctrl-C; complete blocks are saved.
    """
    options["target"], options["view"], options["aggregation"] = "defence", "exact", SOURCE
    # Their scores are compared with those of each rule's own evaluation.
    options["selects"] = True
    evaluation = prepare_evaluation(recipe, run=run, reporter=SilentReporter(), **options)
    world = join(evaluation.setting.models.device)
    job = evaluation.plan.strongest
    if job is None:
        return None
    identity = {**evaluation.identity, "attack": NAME, "made_by": job.attack, "rules": list(rules)}
    folder = EvaluationFolder(RunFolder(root).inside("ablations", evaluation_id(identity)))
    jobs = {rule: Job("defence", NAME, rule) for rule in rules}
    if world.on_main(lambda: _open_folder(folder, identity, jobs, resume=resume)):
        reporter.info(f"{folder.path} is complete; using its stored examples' scores")
        return folder
    try:
        _run_blocks(evaluation, job, jobs, folder, world, reporter)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"stopped; complete blocks are saved in {folder.path}",
            hint="go on with the same command and --resume",
        ) from None

    def finish() -> None:
        rows = [attack_row(read_records(folder, rule)) for rule in rules]
        write_json(folder.summary, {"schema": SCHEMA, "attack": NAME, "made_by": job.key, "results": rows})

    world.on_main(finish)
    return folder


def _open_folder(
    folder: EvaluationFolder, identity: Mapping[str, Any], jobs: Mapping[str, Job], *, resume: bool
) -> bool:
    """Start the folder where there is none; return whether it is complete."""
    if folder.exists:
        complete = folder.summary.is_file()
        if not complete and not resume:
            raise UsageError(f"{folder.path} holds an unfinished run", hint="go on with it with --resume")
        return complete
    label = "examples made against one aggregation rule"
    keys = [own.key for own in jobs.values()]
    settings = {"schema": SCHEMA, "identity": identity, "label": label, "jobs": keys, "carso": __version__}
    folder.start(settings)
    return False


def _run_blocks(
    evaluation: Evaluation,
    job: Job,
    jobs: Mapping[str, Job],
    folder: EvaluationFolder,
    world: World,
    reporter: Reporter,
) -> None:
    setting, blocks = evaluation.setting, evaluation.blocks()
    sizes = {(own.key, n): len(block) for own in jobs.values() for n, block in enumerate(blocks)}
    done = world.on_main(lambda: folder.read_blocks(sizes, reporter))
    missing = {
        number: [rule for rule, own in jobs.items() if (own.key, number) not in done]
        for number in range(len(blocks))
    }

    def run_block(number: int) -> list[tuple[list[Record], dict[str, Any]]]:
        images, labels, _ = setting.pixels(blocks[number])
        examples = perturb(setting, job, images, labels, number)
        return [
            _score(_under(setting, rule), jobs[rule], number, blocks[number], examples)
            for rule in missing[number]
        ]

    with reporter.progress(f"defence: {job.attack}, scored under each rule", len(setting.images)) as progress:
        progress.advance(sum(len(blocks[number]) for number, rules in missing.items() if not rules))
        for number, scored in world.map_sharded([n for n, rules in missing.items() if rules], run_block):
            for records, health in scored if world.is_main else ():
                folder.append_block(records, health)
            progress.advance(len(blocks[number]))


def _score(
    setting: Setting, job: Job, block: int, positions: Sequence[int], examples: dict[str, Tensor]
) -> tuple[list[Record], dict[str, Any]]:
    """Score one block's examples under the setting's rule; return records and the block's line on seconds."""
    started = time.perf_counter()
    images, labels, indices = setting.pixels(positions)
    scorer = setting.models.scorer(job, setting.seed, setting.draws)
    found = select_worst(setting, scorer, examples, images, labels, indices)
    records = [
        make_record(setting, job, block, index, int(labels[row]), found, row, broken=False, clean=None)
        for row, index in enumerate(indices)
    ]
    # The job's name holds the rule where others hold a view; these images have no clean record beside them.
    records = [replace(record, view="exact", clean_margin=None) for record in records]
    seconds = round(time.perf_counter() - started, 4)
    return records, {"job": job.key, "block": block, "seconds": seconds, "steps": [], "messages": []}


def _under(setting: Setting, rule: str) -> Setting:
    """Return the setting with the defence deciding by another rule."""
    defence = adjusted(setting.models.require_defence(), aggregation=rule)
    return replace(setting, models=replace(setting.models, defence=defence))


def read_records(folder: EvaluationFolder, rule: str) -> list[Record]:
    """Return the records of the examples under one rule."""
    records = [Record.from_dict(line) for line in read_json_lines(folder.records)]
    return [record for record in records if record.aggregation == rule]


def with_transfers(row: Mapping[str, Any], rule: str, folder: EvaluationFolder, root: Path) -> dict[str, Any]:
    """Return a table's row with accuracy under the transferred examples, and the worst case of both.

    Args:
        row: The row of the rule's own evaluation.
        rule: The aggregation rule.
        folder: The transferred examples' records.
        root: Run folder that the row's paths are relative to.
    """
    evaluation = EvaluationFolder(root / row["evaluation"])
    attack = read_json(evaluation.settings)["identity"]["attack"]
    records = map(Record.from_dict, read_json_lines(evaluation.records))
    own = decisive([one for one in records if one.target == "defence"], attack)
    transferred = read_records(folder, rule)
    source = str(folder.path.relative_to(root))
    return {
        **row,
        "transferred": {**figures(transferred), "source": source},
        "worst": figures(worst_case([*own, *transferred])),
    }
