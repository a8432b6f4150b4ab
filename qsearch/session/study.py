"""A study as Python sees it: its front, bundles of it, a picture, a report."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qsearch.config import QuantConfig
from qsearch.errors import StudyError
from qsearch.report.documents import baseline_of, study_document
from qsearch.report.figure_pictures import beside, draw_front
from qsearch.report.figures import write_figures
from qsearch.report.notes import calibration_text
from qsearch.report.page_document import page_document
from qsearch.report.page_file import write_page
from qsearch.report.pictures import byte_text
from qsearch.search.evaluation.evaluator import Progress
from qsearch.search.study import StudyHandle, load_study
from qsearch.session.export_session import ExportRequest, run_export

__all__ = ["Point", "Study", "open_study"]


@dataclass(frozen=True)
class Point:
    """A configuration on a front, and what was measured of it.

    Attributes:
        trial: Its number in the study.
        config: What was built.
        latency_ms: As the search measured it, milliseconds.
        peak_bytes: Weights, activations and workspace.
        loss_pp: Top-1, or a detector's mAP, lost on the search images, percentage points.
        loss_ci_pp: Its 95 % interval.
        metrics: All that is known, as `front --json` prints it: these, the spread, and `heldout`, the second measurement.
    """

    trial: int
    config: QuantConfig
    latency_ms: float
    peak_bytes: int
    loss_pp: float
    loss_ci_pp: tuple[float, float]
    metrics: Mapping[str, Any]


class Study:
    """A study: what a search has found so far, read anew whenever it is asked."""

    def __init__(self, handle: StudyHandle, progress: Progress) -> None:
        """Stand for an open study; `open_study` and `search` make one.

        Args:
            handle: The study.
            progress: Called with what slow steps have to say.
        """
        self._handle, self._progress = handle, progress

    @property
    def name(self) -> str:
        """The study's name, for `--study`."""
        return self._handle.name

    @property
    def storage(self) -> str:
        """The URL of its database, for `--storage`, without a password."""
        return self._handle.shown_url

    @property
    def document(self) -> dict[str, Any]:
        """Everything there is to say about it, as `front --json` prints it."""
        return study_document(self._handle)

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other one dominates, by the second measurement where there was one; fastest first."""
        return tuple(_point(point) for point in self.document["front"])

    @property
    def closest(self) -> tuple[Point, ...]:
        """Where nothing is within the study's constraints, what comes closest; else nothing."""
        return tuple(_point(point) for point in self.document["closest"])

    def export(
        self,
        which: int | str = "knee",
        out: str | Path | None = None,
        *,
        max_loss_pp: float | None = None,
        remeasure: bool = False,
    ) -> Path:
        """Write a bundle of one point: the compiled module with everything needed to run and check it.

        Args:
            which: Number of a trial; or knee, fastest, smallest, most-accurate.
            out: Directory to write; by default NAME-trial-NUMBER, or NAME-PICK.
            max_loss_pp: Pick only among points that lose at most so much, percentage points.
            remeasure: Measure a trial whose kernels have changed again, and say so in the bundle.

        Returns:
            The directory.

        Raises:
            QSearchError: There is no such point, or it cannot be built as it was measured.
        """
        number = None if isinstance(which, str) else int(which)
        folder = Path(out if out is not None else f"{self.name}-{which if number is None else f'trial-{number}'}")
        pick = "knee" if number is not None else str(which)
        run_export(self._handle, ExportRequest(folder, number, pick, max_loss_pp, remeasure=remeasure), self._progress)
        return folder

    def plot(self) -> Image.Image:
        """The front as a picture: latency against loss, and memory against loss.

        Raises:
            StudyError: There is no point to draw.
        """
        document = page_document(self._handle)
        if not document["points"]:
            raise StudyError(f"study {self.name!r} has no completed trial to draw yet; search on")
        return beside([draw_front(document, measure) for measure in ("latency_ms", "peak_bytes")])

    def report(self, out: str | Path, figures: str | Path | None = None) -> Path:
        """Write the study as one page, and its figures, as the command `report` does.

        Returns:
            The page's file.

        Raises:
            UsageError: It cannot be written there.
        """
        document = page_document(self._handle)
        write_page(document, Path(out))
        if figures is not None:
            write_figures(document, Path(figures))
        return Path(out)

    def __repr__(self) -> str:
        document = self.document
        measured = document["trials"]["complete"] + document["trials"]["stopped_early"]
        return f"Study({self.name!r}, {self.storage!r}): {len(document['front'])} points of {measured} measured trials"

    def _repr_html_(self) -> str:
        """The front as a table, which is how a notebook shows a study."""
        document, baseline = self.document, baseline_of(self._handle)
        points = document["front"] or document["closest"]
        head = ["trial", "latency, ms", "speed-up", "memory", "loss, pp", "held-out, pp", "layers", "calibration and methods"]
        rows = [] if baseline is None else [_cells(point, baseline.latency.median_ms) for point in points]
        title = repr(self) if document["front"] or not points else f"{self!r}; none within its constraints, the closest are"
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
        heads = "".join(f"<th>{name}</th>" for name in head)
        return f"<table><caption>{html.escape(title)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def open_study(name: str, storage: str | None = None) -> Study:
    """Open a study that was searched before, by Python or by the command line.

    Args:
        name: The study's name.
        storage: SQLAlchemy URL of its database; by default sqlite:///studies/<name>.db.

    Raises:
        StudyError: There is no such study, or it cannot be read.
    """
    return Study(load_study(name, storage), lambda clause: None)


def _point(data: Mapping[str, Any]) -> Point:
    low, high = data["top1_loss_ci_pp"]
    config = QuantConfig.model_validate(data["config"])
    metrics = {key: value for key, value in data.items() if key != "config"}
    return Point(data["trial"], config, data["latency_ms"], data["peak_bytes"], data["top1_loss_pp"], (low, high), metrics)


def _cells(data: Mapping[str, Any], float_ms: float) -> list[str]:
    config = QuantConfig.model_validate(data["config"])
    counts = Counter(config.precision.values())
    return [
        str(data["trial"]),
        f"{data['latency_ms']:.3f} ± {data['latency_spread_ms']:.3f}",
        f"{float_ms / data['latency_ms']:.2f}",
        byte_text(data["peak_bytes"]),
        _loss(data),
        "" if data["heldout"] is None else _loss(data["heldout"]),
        ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
        calibration_text(config),
    ]


def _loss(data: Mapping[str, Any]) -> str:
    low, high = data["top1_loss_ci_pp"]
    return f"{data['top1_loss_pp']:+.2f} ({low:+.2f} to {high:+.2f})"
