"""The page: whole, escaped, and without a request to anywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from carso_cli.reports.html import (
    EmbeddedPicture,
    checks_html,
    page_html,
    settings_html,
    table_html,
    tiles_html,
)
from carso_cli.reports.table import Figure, ReportTable, Row, Trace

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
    picture = EmbeddedPicture(EVIL, EVIL, EVIL, b"<svg/>", b"<svg/>")
    content = (
        table_html(table)
        + checks_html({"checks": [check], "failed": [EVIL]}, EVIL)
        + settings_html(EVIL, EVIL)
        + tiles_html([(EVIL, EVIL, EVIL)])
        + picture.html()
    )
    return page_html(EVIL, [("one", EVIL, content)], version=EVIL)


def test_every_text_is_escaped_and_every_element_closed() -> None:
    checker = checked(a_page())
    assert "script" not in checker.seen
    assert "<script" not in a_page()


def test_the_page_asks_nobody_for_anything() -> None:
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
    html = EmbeddedPicture("t", "c", "a", b"light", b"dark", kind="png").html()
    assert 'media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,ZGFyaw=="' in html
    assert '<img src="data:image/png;base64,bGlnaHQ=" alt="a">' in html
