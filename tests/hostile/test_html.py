"""A report's page shows whatever a run's files and names say, and takes none of it for markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carso_cli.io.json_files import append_json_lines, write_json
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.reports.render import render_page
from carso_cli.reports.table import Figure, ReportTable, Row, Trace
from tests.hostile.conftest import Call

EVIL = "<script>alert(1)</script>"
ATTEMPTS = [EVIL, '"><img src=x onerror=alert(1)>', "' onload='x", "</style><svg/onload=x>"]
TEXT = st.text(max_size=20) | st.sampled_from([*ATTEMPTS, "&lt;script&gt;", "\x00<b>", "]]>"])


class Tags(HTMLParser):
    """The elements of a page with the names of their attributes: all that could do something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, *(name for name, _ in attrs)))


def page(text: str) -> str:
    row = Row("measured", (text, text, Figure(0.5, text=text)), Trace(text, {text: text}, (text,)))
    table = ReportTable("2", text, ("data", "figures", text), (row,), (text,))
    check: dict[str, Any] = {"name": text, "value": 0.5, "threshold": 1.0, "passed": True, "meaning": text}
    checks = [{"title": text, "open": True, "summary": {"checks": [check], "failed": [text]}}]
    picture = {"title": text, "caption": text, "alt": text, "kind": "svg", "light": b"", "dark": b""}
    run = {"title": text, "tiles": [(text,) * 3], "pictures": [picture]}
    return render_page(text, runs=[run], tables=[table], checks=checks, settings=[(text, text)])


@given(text=TEXT)
def test_no_text_adds_an_element_or_an_attribute(text: str) -> None:
    assert Tags(page(text)).found == Tags(page("plain")).found


def test_a_whole_report_of_a_hostile_run(
    carso: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "<script>alert(1)<" / "script>"
    run.mkdir(parents=True)
    recipe = load_recipe("digits").model_copy(update={"description": EVIL, "reproduces": EVIL})
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    write_json(
        run / "environment.json", {"device": EVIL, "device_name": EVIL, "threads": 1, "classes": [EVIL]}
    )
    line = {"epoch": 0, "seconds": 1.0, "images": 1, "loss": 1.0, "bce": 1.0, "kl": 1.0, "beta": 0.0}
    append_json_lines(run / "metrics.jsonl", [line | {"learning_rate": 0.1, "defence_clean_accuracy": 0.5}])
    code, said = carso(["report", str(run), "--html", "page.html"])
    assert code == 0, said
    text = (tmp_path / "page.html").read_text()
    assert "alert(1)" in text
    assert not {tag for tag, *_ in Tags(text).found} & {"script", "iframe", "object", "embed", "form", "link"}
    assert not [tag for tag in Tags(text).found if any(name.startswith("on") for name in tag[1:])]
