"""The paper's figures, to be set beside ours: `carso_cli/paper_figures.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from carso_cli.io.json_files import read_plain_json


@cache
def paper_figures() -> dict[str, Any]:
    """Return the figures by table number, then by scenario, `(a)`, `(b)` or `(c)`."""
    return read_plain_json(Path(__file__).resolve().parents[1] / "paper_figures.json")


def paper_row(reproduces: str, table: str) -> dict[str, Any] | None:
    """Return the paper's row of a table for what a recipe reproduces.

    Args:
        reproduces: The recipe's own word, such as `Table 2, scenario (a)`; empty for none.
        table: Number of the table.
    """
    row: dict[str, Any] | None = paper_figures().get(table, {}).get(scenario_of(reproduces))
    return row


def scenario_of(reproduces: str) -> str | None:
    """Return the paper's scenario, `(a)`, `(b)` or `(c)`, that a recipe says it reproduces, if any."""
    found = re.search(r"\([abc]\)", reproduces)
    return found.group() if found else None


def beyond_the_paper(recipe: Mapping[str, Any]) -> str:
    """Return in what a recipe's defence is not the paper's, as one phrase; empty for the paper's."""
    training, purifier = recipe["training"], recipe["purifier"]
    objective, share = training["objective"], purifier["input_share"]
    through = objective != "elbo"
    trades = training["adversarial"]["trades_weight"] if through else None
    found = (
        *((objective,) if through else ()),
        # An objective through the defence always starts from another purifier: that goes without saying.
        *(("trained on from another purifier",) if training["initial"] and not through else ()),
        *((f"TRADES weight {trades:g}",) if trades is not None else ()),
        *((f"{share:g} of the input",) if share else ()),
        *(() if purifier["latent_features"] else ("no latent",)),
    )
    return f"beyond the paper ({', '.join(found)})" if found else ""
