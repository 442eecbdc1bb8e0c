"""Examples made against one aggregation rule, scored under all of them.

They are made against the exact view of the doubly-exponential rule, the logsumexp of the samples' logits,
which has a usable gradient whatever the classifier's scale. A rule without gradients of its own, such as
majority vote, is thereby attacked with real examples, and its accuracy under them is a real bound.

    <root run>/ablations/transferred-<id>/   settings.json, records.jsonl, gradients.jsonl, summary.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from carso_cli import __version__
from carso_cli.distributed.world import World, join
from carso_cli.errors import UsageError
from carso_cli.evaluation.attack_batch import interruptible, make_records, perturb, run_blocks, select_worst
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
_Block = tuple[list[Record], dict[str, Any]]


def transfer_to_rules(
    recipe: Recipe,
    rules: Sequence[str],
    *,
    root: Path,
    reporter: Reporter,
    resume: bool,
    **options: Unpack[EvaluationOptions],
) -> EvaluationFolder | None:
    """Make examples by the strongest white-box attack chosen, and score them under each rule.

    The purifier is that of the run folder `root`, and the records go to its `ablations`.

    Returns:
        The folder of the records; None where the chosen attack follows no gradients.

    Raises:
        UsageError: If an unfinished set is stored and `resume` is not given.
        InterruptedRun: On Ctrl-C; complete blocks are saved.
    """
    options["target"], options["view"], options["aggregation"] = "defence", "exact", SOURCE
    # Their scores are compared with those of each rule's own evaluation.
    options["selects"] = True
    evaluation = prepare_evaluation(recipe, run=root, reporter=SilentReporter(), **options)
    source, world = evaluation.plan.strongest, join(evaluation.setting.models.device)
    if source is None:
        return None
    # `attack` is replaced, as it names the folder: no evaluation may be taken for a transfer or the reverse.
    identity = {**evaluation.identity, "attack": NAME, "made_by": source.attack, "rules": list(rules)}
    folder = EvaluationFolder(RunFolder(root).inside("ablations", evaluation_id(identity)))
    # The job's name holds the rule where others hold a view.
    jobs = {rule: Job("defence", NAME, rule) for rule in rules}
    settings = {
        "schema": SCHEMA,
        "identity": identity,
        "label": "examples made against one aggregation rule",
        "jobs": [job.key for job in jobs.values()],
        "carso": __version__,
    }
    if world.on_main(lambda: _is_complete(folder, settings, resume=resume)):
        reporter.info(f"{folder.path} is complete; using its stored examples' scores")
        return folder
    with interruptible(folder.path):
        _run_blocks(evaluation, source, jobs, folder, world, reporter)

    def finish() -> None:
        rows = [attack_row(read_records(folder, rule)) for rule in rules]
        write_json(folder.summary, {"schema": SCHEMA, "attack": NAME, "made_by": source.key, "results": rows})

    world.on_main(finish)
    return folder


def _is_complete(folder: EvaluationFolder, settings: Mapping[str, Any], *, resume: bool) -> bool:
    """Say whether everything is stored; start the folder where there is none."""
    if not folder.exists:
        folder.start(settings)
    elif not folder.summary.is_file() and not resume:
        raise UsageError(f"{folder.path} holds an unfinished run", hint="resume it with --resume")
    return folder.summary.is_file()


def _run_blocks(
    evaluation: Evaluation,
    source: Job,
    jobs: Mapping[str, Job],
    folder: EvaluationFolder,
    world: World,
    reporter: Reporter,
) -> None:
    setting, blocks = evaluation.setting, evaluation.blocks()
    defence = setting.models.require_defence()
    planned = {(job.key, n): len(block) for job in jobs.values() for n, block in enumerate(blocks)}
    stored = world.on_main(lambda: folder.read_blocks(planned, reporter))

    def score_block(number: int) -> list[_Block]:
        """Attack one block; return its records and health under each rule for which it is not stored."""
        batch = setting.batch(blocks[number])
        # Made again where some rules are stored: examples are a function of seed and block, and are not kept.
        examples = perturb(setting, source, batch, number)
        scored = []
        for rule, job in jobs.items():
            # A kill may have come between two rules of a block.
            if (job.key, number) in stored:
                continue
            started = time.perf_counter()
            # Weights are shared and only the rule differs, so all rules score the very same reconstructions.
            models = replace(setting.models, defence=adjusted(defence, aggregation=rule))
            ruled = replace(setting, models=models)
            result = select_worst(ruled, job, examples, batch)
            # Nothing waits for these records, so no confirmation draws are spent on them.
            unbroken = [False] * len(batch.indices)
            records = make_records(ruled, job, number, batch, result, unbroken, {})
            seconds = round(time.perf_counter() - started, 4)
            health = {"job": job.key, "block": number, "seconds": seconds, "steps": [], "messages": []}
            # The rule was in the view's place to give each job its key; what was attacked is the exact view.
            scored.append(([replace(record, view="exact") for record in records], health))
        return scored

    def store(_: int, scored: Sequence[_Block]) -> None:
        for records, health in scored:
            folder.append_block(records, health)

    sizes = {number: len(block) for number, block in enumerate(blocks)}
    # A block counts as stored when all rules are; the empty list is never written again.
    done: dict[int, list[_Block]] = {
        n: [] for n in sizes if all((job.key, n) in stored for job in jobs.values())
    }
    title = f"defence: {source.attack}, scored under each rule"
    run_blocks(sizes, score_block, world, reporter, title, stored=done, store=store)


def read_records(folder: EvaluationFolder, rule: str) -> list[Record]:
    """Return the records of the examples under one rule."""
    records = [Record.from_dict(line) for line in read_json_lines(folder.records)]
    return [record for record in records if record.aggregation == rule]


def with_transfers(row: Mapping[str, Any], rule: str, folder: EvaluationFolder, root: Path) -> dict[str, Any]:
    """Return a rule's row with accuracy under the transferred examples, and the worst case of both.

    The folder holds the transferred examples' records; the row's paths are relative to `root`.
    """
    evaluation = EvaluationFolder(root / row["evaluation"])
    attack = read_json(evaluation.settings)["identity"]["attack"]
    records = map(Record.from_dict, read_json_lines(evaluation.records))
    # The defence's own attack on this rule, and for a protocol the worst of all its attacks.
    own = decisive([one for one in records if one.target == "defence"], attack)
    transferred = read_records(folder, rule)
    source = str(folder.path.relative_to(root))
    return {
        **row,
        "transferred": {**figures(transferred), "source": source},
        "worst": figures(worst_case([*own, *transferred])),
    }
