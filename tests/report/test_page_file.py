"""The report page as a file: nothing that a study says ends its script or is taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hostile_study import HARM, NAMES, hostile_study

from qsearch.errors import UsageError
from qsearch.report.page_document import page_document
from qsearch.report.page_file import page_text, write_page


class Reader(HTMLParser):
    """Collects the elements of a page and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def test_hostile_names_are_data(tmp_path: Path) -> None:
    document = page_document(hostile_study(tmp_path))
    text = page_text(document)
    assert HARM not in text and "<img" not in text and "<!--" not in text
    reader = Reader()
    reader.feed(text)
    assert len(reader.scripts) == 2
    read = json.loads(reader.scripts[0])
    assert read == document
    assert [layer["name"] for layer in read["layers"]] == list(NAMES)
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == 2 and "img" not in tags and "iframe" not in tags


def test_the_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    text = page_text(page_document(hostile_study(tmp_path, ("a", "b", "c"))))
    reader = Reader()
    reader.feed(text)
    for tag, attributes in reader.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    policy = next(one["content"] for tag, one in reader.elements if tag == "meta" and "http-equiv" in one)
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}=';", policy)
    assert "url(" not in text and "@import" not in text


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    document = page_document(hostile_study(tmp_path))
    file = tmp_path / "report.html"
    write_page(document, file)
    assert file.read_text(encoding="utf-8") == page_text(document)
    assert not list(tmp_path.glob(".report-*"))
    for wrong in (tmp_path, tmp_path / "nowhere" / "report.html"):
        with pytest.raises(UsageError, match="--out: expected a file in a directory that exists"):
            write_page(document, wrong)
