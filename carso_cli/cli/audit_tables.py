"""What `carso audit` shows, at most 80 columns wide: the number, what broke it, the checks that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from carso_cli.cli.console import accuracy, duration, figure, table

if TYPE_CHECKING:
    from carso_cli.evaluation.audit_report import AuditReport

_BOUNDS = {"at most": "<=", "below": "<", "at least": ">="}


def audit_tables(report: AuditReport) -> list[Table | Text]:
    """Return what is printed, in order; the first line is the number and its verdict."""
    summary = report.summary
    parts: list[Table | Text] = [Text(report.headline, "bold" if report.trusted else "bold red")]
    parts.append(
        Text(
            f"{report.name}: {report.threat}, budget {summary['budget']}, seed {summary['seed']}; clean "
            f"accuracy {accuracy(report.clean_accuracy, tuple(summary['clean']['ci95']))}; "
            f"{duration(summary['seconds'])}"
        )
    )
    if summary["attacks"]:
        parts += [Text(), _attacks(report)]
    parts += [Text(), *_checks(report)]
    return parts


def _attacks(report: AuditReport) -> Table:
    """Return the attacks, those that broke most images first."""
    broken = {(row["attack"], row["source"]): row["images"] for row in report.broken_by}
    by_damage = sorted(
        report.summary["attacks"],
        key=lambda row: (-broken.get((row["attack"], row["source"]), 0), row["accuracy"] or 0.0),
    )
    rows = [
        [
            row["attack"],
            row["source"] or "–",
            str(broken.get((row["attack"], row["source"]), 0)),
            accuracy(row["accuracy"], None if row["ci95"] is None else tuple(row["ci95"])),
            duration(row["seconds"]),
        ]
        for row in by_damage
    ]
    return table(
        ("attack", "gradients from", "broke first", "accuracy left", "time"),
        rows,
        numeric=("broke first", "accuracy left", "time"),
    )


def _checks(report: AuditReport) -> list[Table | Text]:
    """Return the failed checks with their meaning, then counts of the others."""
    parts: list[Table | Text] = []
    if report.failed:
        rows = [
            [check["name"], figure(check["value"]), _bound(check), check["meaning"]]
            for check in report.failed
        ]
        columns = ("failed check", "value", "bound", "meaning")
        parts.append(table(columns, rows, numeric=("value", "bound")))
    passed = len(report.checks) - len(report.failed) - len(report.not_run)
    told = f"checks: {len(report.failed)} failed, {passed} passed"
    if report.not_run:
        told += f", {len(report.not_run)} not run ({', '.join(check['name'] for check in report.not_run)})"
    return [*parts, Text(told)]


def _bound(check: dict[str, Any]) -> str:
    return f"{_BOUNDS[check['bound']]} {figure(check['threshold'])}" if check["bound"] else "–"
