"""A model and its images: what is seen of the model in float, and how good what a module computes of the images is."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from qsearch.calibrate.coverage import coverage_warnings
from qsearch.calibrate.input_moments import KeptMoments
from qsearch.data import Dataset, Part
from qsearch.measure.latency import first_images
from qsearch.measure.task import ClassificationScorer, DetectionScorer, Scorer
from qsearch.models.detection import DetectionHead
from qsearch.models.graph import Graph, Model
from qsearch.quantize.kept_weights import KeptWeights, most_kept
from qsearch.quantize.rounding.rounded_weights import RoundedWeights
from qsearch.quantize.variants import Variants
from qsearch.search.evaluation.cache_folder import CacheFolder
from qsearch.search.evaluation.evaluator import Progress, Settings, said_once
from qsearch.search.evaluation.float_pass import float_statistics
from qsearch.search.profile import task_profile

__all__ = ["ModelImages"]


class ModelImages:
    """A model and its images, after the float pass.

    Args:
        settings: Where caches are kept.
        model: The imported model.
        dataset: Its images.
        progress: Called whenever a slow step begins.
        head: How a detector's output is read; None for a classifier.
    """

    def __init__(
        self, settings: Settings, model: Model, dataset: Dataset, progress: Progress, head: DetectionHead | None = None
    ) -> None:
        self.head, self.profile = head, task_profile(model.graph, head)
        self.settings, self.model, self.dataset, self.progress = settings, model, dataset, progress
        # Kept open as long as the evaluator lives: it tells other processes that the cache is in use.
        self._cache = CacheFolder(settings.cache_dir)
        self.seconds: dict[str, float] = {}
        start = time.monotonic()
        self._moments = KeptMoments(partial(self.images, "calibration"))
        self._weights = KeptWeights(most_kept(model))
        statistics = lambda variant: float_statistics(variant, dataset, settings.cache_dir, progress)  # noqa: E731
        self.variants = Variants(model, statistics, self._rounded_weights, self._weights)
        self.record = self.variants.plain.record
        self.seconds["float_pass"] = time.monotonic() - start
        for warning in self.coverage_warnings():
            progress(warning)
        self._scorers: dict[str, Scorer] = {}

    def _rounded_weights(self, model: Model) -> RoundedWeights:
        said = {
            clause: said_once(self.progress, f"{clause}, {what}")
            for clause, what in (
                ("observing layer inputs", "images"),
                ("rounding weights", "layers"),
                ("learning blocks", "blocks"),
            )
        }
        images = partial(self.images, "calibration")
        folder = self.settings.cache_dir / "roundings"
        progress = lambda clause, *counts: said[clause](*counts)  # noqa: E731
        return RoundedWeights(model, images, self.dataset.fingerprint, folder, progress, self._moments, self._weights)

    def coverage_warnings(self) -> list[str]:
        """What is to be known of the calibration images, see `coverage_warnings`."""
        parts: tuple[Part, ...] = ("calibration", "search", "heldout")
        present = {label for part in parts for label in self.dataset.labels(part).tolist()}
        return coverage_warnings(self.record, self.dataset.labels("calibration").tolist(), len(present))

    @property
    def graph(self) -> Graph:
        """The layer graph."""
        return self.model.graph

    @property
    def batch(self) -> int:
        """Images of one inference."""
        return self.graph.input.shape[0]

    def images(self, part: str) -> np.ndarray:
        """Preprocessed images, float32 (N, C, H, W)."""
        return self.dataset.images(part, self.settings.cache_dir / "images", said_once(self.progress, f"decoding {part} images"))  # type: ignore[arg-type]

    def timed_images(self, part: str) -> np.ndarray:
        """What one inference is timed on, float32 (batch, C, H, W)."""
        return first_images(self.images(part), self.batch)

    def scorer(self, part: str) -> Scorer:
        """What tells how good outputs on a part of the images are."""
        if part not in self._scorers:
            side = self.dataset.preprocessing.crop
            self._scorers[part] = (
                ClassificationScorer(self.dataset.labels(part))  # type: ignore[arg-type]
                if self.head is None
                else DetectionScorer(self.head, self.dataset.boxes(part), side)  # type: ignore[arg-type]
            )
        return self._scorers[part]
