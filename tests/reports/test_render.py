"""One small table in every format, and hostile texts that must stay texts."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

from carso_cli.reports.render import CSV_COLUMNS, render_page, to_csv, to_json, to_latex, to_markdown
from carso_cli.reports.table import Figure, ReportTable, Row, Trace

TRACE = Trace("runs/a_b/evaluation/pgd-1", {"images": 40, "seed": 0, "view": None}, ("Be careful",))
TABLE = ReportTable(
    "2",
    "Clean & adversarial",
    ("data", "figures", "C/Cl", "type"),
    (
        Row("measured", ("digits", "measured", Figure(0.9449, 0.912, 0.967), "AT|P"), TRACE),
        Row("paper", ("CIFAR-10", "paper", Figure(0.8686, digits=4), "AT+P")),
        Row("paper", ("CIFAR-100", "paper", Figure(None, text="< 0.7070"), None)),
    ),
    ("100% of x_1",),
)


def test_markdown() -> None:
    assert to_markdown([TABLE]) == (
        "## Table 2. Clean & adversarial\n"
        "\n"
        "| data | figures | C/Cl | type |\n"
        "| --- | --- | ---: | --- |\n"
        "| digits | measured[^2-1] | 0.945 \\[0.91, 0.97\\] | AT\\|P |\n"
        "| CIFAR-10 | paper | 0.8686 | AT+P |\n"
        "| CIFAR-100 | paper | \\< 0.7070 | – |\n"
        "\n"
        "100% of x\\_1\n"
        "\n"
        "[^2-1]: runs/a\\_b/evaluation/pgd-1, images 40, seed 0. Be careful\n"
    )


def test_latex() -> None:
    assert to_latex([TABLE]) == (
        "\\begin{table}\n\\centering\n\\caption{Table 2. Clean \\& adversarial}\n"
        "\\begin{tabular}{llrl}\n\\toprule\n"
        "data & figures & C/Cl & type \\\\\n\\midrule\n"
        "digits & measured\\textsuperscript{1} & 0.945 [0.91, 0.97] & AT|P \\\\\n"
        "CIFAR-10 & paper & 0.8686 & AT+P \\\\\n"
        "CIFAR-100 & paper & \\textless{} 0.7070 & -- \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\n"
        "{\\footnotesize 100\\% of x\\_1\\par}\n"
        "{\\footnotesize \\textsuperscript{1}runs/a\\_b/evaluation/pgd-1, images 40, seed 0. "
        "Be careful.\\par}\n"
        "\\end{table}\n"
    )


def test_csv_has_one_line_a_figure_with_its_record() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv([TABLE]))))
    assert list(lines[0]) == list(CSV_COLUMNS)
    assert lines[0] == {
        "table": "2",
        "row": "1",
        "source": "measured",
        "label": "digits; measured; AT|P",
        "column": "C/Cl",
        "value": "0.9449",
        "low": "0.912",
        "high": "0.967",
        "text": "",
        "unit": "share",
        "record": "runs/a_b/evaluation/pgd-1",
        "facts": "images 40; seed 0",
        "warnings": "Be careful",
    }
    assert [(line["source"], line["value"], line["text"]) for line in lines[1:]] == [
        ("paper", "0.8686", ""),
        ("paper", "", "< 0.7070"),
    ]


def test_csv_holds_no_formula() -> None:
    row = Row("measured", ("=1+1", "measured", Figure(0.5)), Trace("@run"))
    (line,) = csv.DictReader(io.StringIO(to_csv([ReportTable("1", "", ("a", "b", "c"), (row,))])))
    assert line["label"].startswith("'=1+1")
    assert line["record"] == "'@run"


def test_json_keeps_numbers_whole() -> None:
    (table,) = json.loads(to_json([TABLE]))["tables"]
    assert table["number"] == "2"
    figure = {"value": 0.9449, "low": 0.912, "high": 0.967, "text": "", "unit": "share", "beside": None}
    assert table["rows"][0] == {
        "source": "measured",
        "cells": ["digits", "measured", figure, "AT|P"],
        "trace": {
            "record": "runs/a_b/evaluation/pgd-1",
            "facts": {"images": 40, "seed": 0, "view": None},
            "warnings": ["Be careful"],
        },
    }
    assert table["rows"][2]["cells"][3] is None


def test_rows_of_one_record_share_a_footnote() -> None:
    other = Trace("elsewhere")
    rows = tuple(Row("measured", ("a", "b"), trace) for trace in (TRACE, other, TRACE))
    table = ReportTable("4", "", ("data", "figures"), rows)
    assert [table.mark(row) for row in rows] == [1, 2, 1]
    assert table.traces == [TRACE, other]


EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "source", "br"}


class Checker(HTMLParser):
    """Collects tags and links; raises where an element is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.open += [] if tag in VOID else [tag]
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def a_page() -> str:
    rows = (
        Row("measured", (EVIL, f"measured{EVIL}", Figure(0.5, 0.2, 0.8)), Trace(EVIL, {EVIL: EVIL}, (EVIL,))),
        Row("paper", ("CIFAR-10", "paper", Figure(None, text="< 0.7"))),
    )
    table = ReportTable("2", EVIL, ("data", "figures", EVIL), rows, (EVIL,))
    check = {"name": EVIL, "value": 0.25, "threshold": None, "passed": False, "meaning": EVIL}
    picture: dict[str, Any] = dict.fromkeys(("title", "caption", "alt"), EVIL) | {
        "kind": "svg",
        "light": b"<svg/>",
        "dark": b"<svg/>",
    }
    run = {"title": EVIL, "tiles": [(EVIL, EVIL, EVIL)], "pictures": [picture]}
    checks = [{"title": EVIL, "open": True, "summary": {"checks": [check], "failed": [EVIL]}}]
    return render_page(EVIL, runs=[run], tables=[table], checks=checks, settings=[(EVIL, EVIL)])


def test_every_text_is_escaped_and_every_element_closed() -> None:
    checker = checked(a_page())
    assert "script" not in checker.seen
    assert "<script" not in a_page()


def test_the_page_makes_no_request() -> None:
    checker = checked(a_page())
    assert all(link.startswith(("#", "data:image/")) for link in checker.links)
    assert not re.search(r"url\(|@import|https?:", a_page())
    assert "default-src 'none'" in a_page()


def test_links_lead_somewhere_and_ids_are_unique() -> None:
    checker = checked(a_page())
    targets = [link[1:] for link in checker.links if link.startswith("#")]
    assert targets
    assert set(targets) <= set(checker.ids)
    assert len(set(checker.ids)) == len(checker.ids)


def test_a_figure_shows_value_interval_and_footnote() -> None:
    text = a_page()
    assert '<td class="number">0.500 <small>[0.20, 0.80]</small></td>' in text
    assert '<td class="number">&lt; 0.7</td>' in text
    assert '<sup><a href="#t2-1">1</a></sup>' in text


def test_light_and_dark_each_get_their_picture() -> None:
    picture = {"title": "t", "caption": "c", "alt": "a", "kind": "png", "light": b"light", "dark": b"dark"}
    html = render_page("t", runs=[{"title": "r", "tiles": [], "pictures": [picture]}])
    assert 'media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,ZGFyaw=="' in html
    assert '<img src="data:image/png;base64,bGlnaHQ=" alt="a">' in html
