"""Audit any model: an honest robust accuracy, with a verdict on whether to trust it.

    report = audit(model, images, labels, eps=8 / 255)
    print(report)                              # the number, its interval, n, and the verdict
    report.to_frame(); report.to_html("audit.html")

The steps, in order: probes of what kind of function the model is; sources of its gradients, and a check of
each; the same attacks for every model, from every source that leads anywhere, each on the images that are
left; scores on fresh calls of the model itself; checks of the gradients where the attacks ended; the verdict.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from carso_cli import __version__
from carso_cli.attacks.model_parts import Model
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.data.image_set import ordered_batches
from carso_cli.distributed.world import join
from carso_cli.evaluation.attack_batch import interruptible
from carso_cli.evaluation.audit_checks import audit_checks
from carso_cli.evaluation.audit_report import AuditReport
from carso_cli.evaluation.audit_setup import BUDGETS, CHECKED, AuditOptions, Images, Prepared, prepare_audit
from carso_cli.evaluation.audit_time import predict_audit
from carso_cli.evaluation.protocols import UNPERTURBED
from carso_cli.evaluation.rerun_checks import spread
from carso_cli.evaluation.run import run_jobs
from carso_cli.evaluation.sanity_checks import Evidence
from carso_cli.evaluation.verdict import verdict_of
from carso_cli.io.json_files import ensure_folder, read_json, read_json_lines, write_json
from carso_cli.runs.description import describe_environment
from carso_cli.runs.lock import locked
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record, evaluation_id
from carso_cli.runs.summary import attack_row, broken_first, figures, headline, job_health
from carso_cli.runtime.reporter import Reporter, shown


def audit(
    model: Model | RandomDefence,
    images: Images,
    labels: Tensor | None = None,
    *,
    reporter: Reporter | None = None,
    **options: Unpack[AuditOptions],
) -> AuditReport:
    """Measure the robust accuracy of a model, and say whether the number can be trusted.

    Args:
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores; a module or any callable, deterministic
            or random. A module is put into evaluation mode. A `RandomDefence`, which says of itself what
            is random, is attacked faster.
        images: (M, channels, H, W) float32 in [0, 1] or uint8; an `ImageSet`; or batches of images and
            labels, such as a DataLoader.
        labels: (M,) int64; None where the images bring theirs.
        reporter: Where progress goes; shown on the terminal when None.
        options: Radius, norm, budget and the rest: see `AuditOptions`.

    Raises:
        UsageError: If the model does not answer scores, or an option is not allowed.
        DataError: If images or examples do not fit.
        InterruptedRun: On Ctrl-C; complete blocks are saved in `out`.
    """
    reporter = shown(reporter)
    started, out, resume = time.monotonic(), options.get("out"), options.get("resume", False)
    prepared = prepare_audit(model, images, labels, **options)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        folder = EvaluationFolder(ensure_folder(root) / evaluation_id(prepared.identity))
        stack.enter_context(locked(ensure_folder(folder.path), reporter))
        if resume and folder.summary.is_file():
            reporter.info(f"{folder.path} is complete; showing its stored result")
            stored = [Record.from_dict(line) for line in read_json_lines(folder.records)]
            return AuditReport(read_json(folder.summary), stored)
        if not (resume and folder.exists):
            folder.discard()
            folder.start(
                {
                    "schema": SCHEMA,
                    "identity": prepared.identity,
                    "carso": __version__,
                    "environment": describe_environment(prepared.setting.models.device),
                    "jobs": [job.key for job in prepared.plan.jobs],
                }
            )
        seconds = sum(job["seconds"] for job in predict_audit(prepared))
        reporter.info(f"{options.get('name', 'model')}: about {seconds:.0f} s")
        stack.enter_context(interruptible(folder.path))
        summary, records = _run(prepared, folder, options.get("name", "model"), reporter, started)
        write_json(folder.summary, summary)
        return AuditReport(summary, records)


def _run(
    prepared: Prepared, folder: EvaluationFolder, name: str, reporter: Reporter, started: float
) -> tuple[dict[str, Any], list[Record]]:
    """Run the attacks and the checks; return the summary and all records."""
    setting, plan = prepared.setting, prepared.plan
    world = join(setting.models.device)
    parts = ordered_batches(len(setting.images), BUDGETS[prepared.budget].batch_size)
    blocks = [range(part.start, part.stop) for part in parts]
    records = run_jobs(plan, setting, blocks, folder, world, reporter)
    health = folder.read_health()
    evidence = Evidence(plan, records, {key: job_health(health, key) for key in records})
    checks = audit_checks(
        setting,
        evidence,
        prepared.facts,
        prepared.sources,
        prepared.at_start,
        spread(len(setting.images), CHECKED),
    )
    every = [record for group in records.values() for record in group]
    clean, robust = figures(records[plan.jobs[0].key]), headline(every, "audit")
    trusted, verdict = verdict_of(checks)
    jobs = {job.key: job for job in plan.jobs}
    summary = {
        "schema": SCHEMA,
        "name": name,
        "n_images": len(setting.images),
        "eps": float(setting.threat.eps),
        "norm": setting.threat.norm,
        "seed": setting.seed,
        "budget": prepared.budget,
        "clean": {"accuracy": clean["accuracy"], "ci95": clean["ci95"]},
        "robust": {"accuracy": robust["accuracy"], "ci95": robust["ci95"]},
        "trusted": trusted,
        "verdict": verdict,
        "broken_by": [
            {"attack": jobs[key].attack, "source": jobs[key].view or "", "images": count}
            for key, count in broken_first(records).items()
            if jobs[key].attack != UNPERTURBED
        ],
        "attacks": [
            {
                "attack": job.attack,
                "source": job.view or "",
                **{key: attack_row(records[job.key])[key] for key in ("accuracy", "ci95", "attacked")},
                "seconds": round(evidence.health[job.key]["seconds"], 3),
            }
            for job in plan.jobs
        ],
        "checks": [check.as_dict() for check in checks],
        "facts": {key: value for key, value in asdict(prepared.facts).items() if key != "checks"},
        "settings": read_json(folder.settings),
        "seconds": round(time.monotonic() - started, 3),
    }
    return summary, every


def estimate_audit(
    model: Model | RandomDefence,
    images: Images,
    labels: Tensor | None = None,
    **options: Unpack[AuditOptions],
) -> dict[str, Any]:
    """Return what an audit would do and how long it would take, from one gradient on a few images.

    Returns:
        `n_images`, `jobs` (`job`, `seconds`) and `seconds`.
    """
    prepared = prepare_audit(model, images, labels, **options)
    jobs = predict_audit(prepared)
    return {
        "n_images": len(prepared.setting.images),
        "jobs": jobs,
        "seconds": sum(job["seconds"] for job in jobs),
    }
