"""What an audit found: a number with its interval, a verdict, and what led to it.

report = audit(model, images, labels, eps=8 / 255)
report.accuracy, report.ci95, report.trusted
report.to_frame()
report.to_html("audit.html")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from carso_cli.io.json_files import write_atomically
from carso_cli.runs.records import Record

TRUSTED = "trusted"
"""Verdict of an audit whose checks found nothing against its number."""


@dataclass(frozen=True, eq=False, repr=False)
class AuditReport:
    """Result of an audit.

    Args:
        summary: As stored in `summary.json`, plain JSON values: `name`, `n_images`, `eps`, `norm`, `seed`,
            `budget`, `clean` and `robust` (`accuracy`, `ci95`), `trusted`, `verdict`, `broken_by` (`attack`,
            `source`, `images`), `attacks` (`attack`, `source`, `accuracy`, `ci95`, `seconds`), `checks`
            (`name`, `value`, `threshold`, `bound`, `passed`, `meaning`), `facts`, `settings`, `seconds`.
        records: One per image and attack.
    """

    summary: dict[str, Any]
    records: Sequence[Record]

    @property
    def name(self) -> str:
        """What was audited."""
        return str(self.summary["name"])

    @property
    def accuracy(self) -> float:
        """Robust accuracy in [0, 1]: the share of images that no attack breaks."""
        return float(self.summary["robust"]["accuracy"])

    @property
    def ci95(self) -> tuple[float, float]:
        """95% interval of the robust accuracy."""
        low, high = self.summary["robust"]["ci95"]
        return float(low), float(high)

    @property
    def clean_accuracy(self) -> float:
        """Accuracy on the unperturbed images, in [0, 1]."""
        return float(self.summary["clean"]["accuracy"])

    @property
    def n_images(self) -> int:
        """M, number of images."""
        return int(self.summary["n_images"])

    @property
    def trusted(self) -> bool:
        """Whether the checks found nothing against the number."""
        return bool(self.summary["trusted"])

    @property
    def verdict(self) -> str:
        """`trusted`, or `not trusted: ` and the reason, in one sentence."""
        return str(self.summary["verdict"])

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The checks: those that failed, then those that were not run, then those that passed."""
        order = {False: 0, None: 1, True: 2}
        return sorted(self.summary["checks"], key=lambda check: order[check["passed"]])

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The checks that failed."""
        return [check for check in self.checks if check["passed"] is False]

    @property
    def not_run(self) -> list[dict[str, Any]]:
        """The checks without a verdict."""
        return [check for check in self.checks if check["passed"] is None]

    @property
    def headline(self) -> str:
        """Number, interval, n and verdict in one line; the first line of every output."""
        low, high = self.ci95
        return (
            f"robust accuracy {self.accuracy:.3f} [{low:.2f}, {high:.2f}] on {self.n_images} images: "
            f"{self.verdict}"
        )

    @property
    def threat(self) -> str:
        """Norm and radius in words, such as `linf, eps 8/255`."""
        return f"{self.summary['norm']}, eps {self.eps}"

    @property
    def eps(self) -> str:
        """Radius in pixel units, such as `8/255`."""
        eps, whole = float(self.summary["eps"]), round(float(self.summary["eps"]) * 255)
        return f"{whole}/255" if whole >= 1 and abs(eps * 255 - whole) < 1e-6 else f"{eps:.4g}"

    def __repr__(self) -> str:
        told = [
            self.headline,
            f"{self.name}: {self.threat}, budget {self.summary['budget']}, clean accuracy "
            f"{self.clean_accuracy:.3f}",
        ]
        sources = [f" on {row['source']}" if row["source"] else "" for row in self.broken_by]
        broken = ", ".join(
            f"{row['attack']}{source} {row['images']}"
            for row, source in zip(self.broken_by, sources, strict=True)
        )
        told += [f"images broken first by: {broken}"] if broken else []
        told += [f"failed: {check['name']}: {check['meaning']}" for check in self.failed]
        return "\n".join(told)

    @property
    def broken_by(self) -> list[dict[str, Any]]:
        """Which attack broke how many images first, the most first."""
        found = [row for row in self.summary["broken_by"] if row["images"]]
        return sorted(found, key=lambda row: -row["images"])

    def to_frame(self) -> Any:  # noqa: ANN401  (pandas is at home in reports)
        """Return a `pandas.DataFrame`: a row per image and attack, the fields of a `Record` as columns."""
        # By name, since the room of pandas lies above this one.
        return resolve_name("carso_cli.reports.audit_page:records_frame")(self.records)

    def to_robustbench(self, dataset: str, path: str | Path | None = None) -> dict[str, Any]:
        """Return the `model_info` that RobustBench's leaderboard keeps of a model, and write it to a path.

        The audit's number is `external`, an evaluation other than the leaderboard's own AutoAttack, whose
        `autoattack_acc` is left to it. What no audit knows is empty, or None, for the model's authors.

        Args:
            dataset: `cifar10`, `cifar100` or `imagenet`, as RobustBench calls it.
            path: File to write; RobustBench takes the model's name from it.

        Raises:
            CarsoError: If the file cannot be written.
        """
        robust, low, high = (f"{100 * share:.2f}" for share in (self.accuracy, *self.ci95))
        about = f"{self.summary['norm']}, {self.n_images} images, budget {self.summary['budget']}"
        found: dict[str, Any] = {
            **dict.fromkeys(("link", "name", "authors"), ""),
            **dict.fromkeys(("additional_data", "number_forward_passes")),
            "dataset": dataset,
            **dict.fromkeys(("venue", "architecture"), ""),
            "eps": self.eps,
            "clean_acc": f"{100 * self.clean_accuracy:.2f}",
            "reported": robust,
            "external": robust,
            "footnote": f"carso audit: {robust} % [{low}, {high}] ({about}); {self.verdict}",
            "unreliable": not self.trusted,
        }
        if path is not None:
            write_atomically(Path(path), json.dumps(found, indent=2) + "\n")
        return found

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the result as a page that opens offline, and write it where a path is given.

        Raises:
            CarsoError: If the file cannot be written.
        """
        page: str = resolve_name("carso_cli.reports.audit_page:audit_page")(self)
        if path is not None:
            write_atomically(Path(path), page)
        return page

    def _repr_html_(self) -> str:
        """Return the result as notebooks show it: the page's content without its frame."""
        part: str = resolve_name("carso_cli.reports.audit_page:audit_part")(self)
        return part
