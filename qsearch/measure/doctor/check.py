"""One thing that was looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Check", "attempted"]

State = Literal["ok", "problem", "absent"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: ok; problem; or absent: not here, and not needed for the target that was asked about.
        found: What was found.
        remedy: What to do about a problem; '' where nothing is to be done.
        part: 'host' or 'cuda'.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    part: str = "host"

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def attempted(name: str, remedy: str, run: Callable[[], str], part: str = "host") -> Check:
    """Try something out: what it gives in words, or the error that it raises as a problem.

    Whatever goes wrong is a finding here.
    """
    try:
        return Check(name, "ok", run(), part=part)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Check(name, "problem", reason[:300], remedy, part)
