"""What `evaluate` returns: its stored summary, with the number, the verdict and a table at hand."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any


class EvaluationResult(dict[str, Any]):
    """The summary of an evaluation, a dictionary as it is stored; see `carso_cli.evaluate` for its keys."""

    @property
    def accuracy(self) -> float:
        """Accuracy under the worst of the attacks, in [0, 1]: the number to quote."""
        return float(self["headline"]["accuracy"])

    @property
    def ci95(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        low, high = self["headline"]["ci95"]
        return float(low), float(high)

    @property
    def trusted(self) -> bool:
        """Whether no check failed."""
        return not self["failed"]

    @property
    def verdict(self) -> str:
        """`trusted`, or `not trusted: ` and the reasons, in one sentence."""
        names = ", ".join(self["failed"])
        # Evaluations of earlier versions store no sentence.
        return str(self.get("verdict", f"not trusted: {names}" if names else "trusted"))

    @property
    def headline(self) -> str:
        """Number, interval, n and verdict in one line."""
        low, high = self.ci95
        return (
            f"{self['label']}: accuracy {self.accuracy:.3f} [{low:.2f}, {high:.2f}] on {self['n_images']} "
            f"images: {self.verdict}"
        )

    def to_frame(self) -> Any:  # noqa: ANN401  (pandas is at home in reports)
        """Return a `pandas.DataFrame`: a row per target and attack, with the accuracy and its interval."""
        # By name, since the room of pandas lies above this one.
        return resolve_name("carso_cli.reports.audit_page:results_frame")(self["results"])

    def _repr_html_(self) -> str:
        """Return the result as notebooks show it."""
        part: str = resolve_name("carso_cli.reports.audit_page:result_part")(self.headline, self.to_frame())
        return part
