"""A hardening as a page: the verdict, before and after beside each other, pictures, and both audits."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from carso_cli import __version__
from carso_cli.evaluation.audit_report import AuditReport
from carso_cli.reports.audit_page import audit_part

_FOLDER = Path(__file__).parent


def harden_page(summary: dict[str, Any], before: AuditReport, after: AuditReport, picture: bytes) -> str:
    """Return a whole page that opens offline and runs no script.

    Args:
        summary: That of `carso_cli.hardening.outcome.summarise`, with its settings and plan.
        before: Audit of the classifier.
        after: Audit of the defence.
        picture: Examples, as a PNG.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        # Names come from files and command lines of others.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("harden.html.jinja").render(
        summary=summary,
        reports={"before": before, "after": after},
        # Both are escaped already.
        parts={name: audit_part(report) for name, report in (("before", before), ("after", after))},
        picture=base64.b64encode(picture).decode(),
        style=_FOLDER.joinpath("page.css").read_text(encoding="utf-8"),
        version=__version__,
    )
