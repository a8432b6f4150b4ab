"""The bar of a search on a terminal."""

from __future__ import annotations

import io
import re

from analytic import AnalyticEvaluator
from rich.console import Console

from qsearch.session.trial_progress import TrialProgress


def test_the_bar_makes_room_for_what_is_said_beside_it() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    with TrialProgress((2, 6), AnalyticEvaluator().baseline, print, console) as progress:
        with progress.aside():
            # Whoever is told writes past the bar.
            assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).endswith("\n")
            before = written.getvalue()
            written.write("measuring\n")
        assert written.getvalue().startswith(before + "measuring\n")
        assert "2/6" in written.getvalue()[len(before) :]
