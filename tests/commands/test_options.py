"""Names that follow from options, and errors that the boundary turns into messages."""

from __future__ import annotations

import errno

import pytest
import typer

from qsearch.commands.app import bounded
from qsearch.errors import DataError, StudyError
from qsearch.search.storage import checked_name
from qsearch.session.search_request import default_study


@pytest.mark.parametrize(
    "model, study",
    [
        ("demo", "demo"),
        ("torchvision:mobilenet_v2", "torchvision-mobilenet_v2"),
        ("nets/my net.pt2", "my-net"),
        ("package.module:factory", "package-module-factory"),
        ("::", "study"),
    ],
)
def test_default_study(model: str, study: str) -> None:
    assert checked_name(default_study(model)) == study


@pytest.mark.parametrize(
    "error, code",
    [(DataError("no images"), 2), (StudyError("gone"), 1), (KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "full", "a"), 1)],
)
def test_boundary(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def verb() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        bounded(verb)()
    assert caught.value.exit_code == code
    assert capsys.readouterr().err


def test_defects_pass_the_boundary() -> None:
    def verb() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bounded(verb)()
