"""The report page as one file: the document within the template, with the page's own style and script, and nothing else.

The page asks for nothing from anywhere: its content security policy forbids it to, and lets no script run but the one whose
digest it names. Whatever a study says, names of layers included, is data to that script, and reaches the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from qsearch.errors import UsageError
from qsearch.whole_files import remove_strays, write_whole

__all__ = ["page_text", "write_page"]

SCRIPTS = ("dom.js", "charts.js", "page.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def page_text(document: Mapping[str, Any]) -> str:
    """The page of a study.

    Args:
        document: Of `qsearch.report.page_document.page_document`.

    Returns:
        HTML.
    """
    folder = files("qsearch.report") / "page"
    template, style, *scripts = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS))
    script = "\n".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(f"qsearch: {document['study']['study']}"),
        "style": style,
        "script": script,
        "script_hash": f"sha256-{digest}",
        "data": _embedded(document),
    }
    # In one pass: what is put in is not looked at again.
    return _PLACE.sub(lambda match: parts[match.group(1)], template)


def write_page(document: Mapping[str, Any], file: Path) -> None:
    """Write the page of a study; the file appears whole, in place of an earlier one.

    Raises:
        UsageError: It cannot be written there.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"--out: expected a file in a directory that exists, such as report.html, got {file}")
    text = page_text(document)
    try:
        remove_strays(file)
        with write_whole(file) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise UsageError(f"--out: {file} cannot be written: {error.strerror or error}; give another file") from error


def _embedded(document: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(document, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
