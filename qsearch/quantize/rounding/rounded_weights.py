"""Weights rounded by second order: every layer once for all configurations, kept on disk by content."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.calibrate.input_moments import MAX_READS, InputMoments, KeptMoments
from qsearch.config import Granularity, WeightScale
from qsearch.errors import QuantizeError
from qsearch.models.content import array_digest, value_digests
from qsearch.models.graph import Model
from qsearch.qtype import IntRange
from qsearch.quantize.group_scales import GroupForm, group_weights
from qsearch.quantize.kept_weights import KeptWeights
from qsearch.quantize.rounding.learned import RoundedLayer
from qsearch.quantize.rounding.learned_network import LearnRequest, learn_network
from qsearch.quantize.rounding.rounding_file import load_rounding, rounding_path, save_rounding
from qsearch.quantize.rounding.second_order import round_in_groups, round_second_order
from qsearch.quantize.weights import QuantizedWeight, weight_scales

__all__ = ["RoundedWeights", "WeightGrid"]

# Raised whenever the same request would be answered with other numbers.
_VERSION = 3


@dataclass(frozen=True)
class WeightGrid:
    """What weights are rounded to.

    Attributes:
        limits: Integer range.
        granularity: One scale per output channel, or one for the layer.
        power_of_two: Whether scales are powers of two.
        form: Groups of 4-bit weights; None without. Their scales and offsets are those of the least squared error.
    """

    limits: IntRange
    granularity: Granularity = "channel_wise"
    power_of_two: bool = False
    form: GroupForm | None = None

    @property
    def rule(self) -> WeightScale:
        """The rule of the scales; without powers of two they follow the error."""
        return "power_of_two" if self.power_of_two else "max"


class RoundedWeights:
    """The second-order roundings of one model.

    What is asked for first costs a float pass, unless it lies on disk; all other layers are then rounded to the same grid
    along with it, since they are likely to be asked for next. Repeated calls return the same arrays as long as they are kept.

    Args:
        model: The model; roundings are those of its own parameters.
        images: Gives the calibration images, float32 (N, C, H, W), preprocessed; called if the float pass is due.
        source: Digest of these images.
        folder: Where roundings are kept.
        progress: Called with a clause, what is done and the total: 'observing layer inputs', 'rounding weights',
            'learning blocks'.
        moments: Of these images, where several models take turns; None for moments of its own.
        kept: Where rounded weights are kept in memory; None for a place of its own.
    """

    def __init__(
        self,
        model: Model,
        images: Callable[[], np.ndarray],
        source: str,
        folder: Path,
        progress: Callable[[str, int, int], None] | None = None,
        moments: KeptMoments | None = None,
        kept: KeptWeights | None = None,
    ) -> None:
        self._model, self._images, self._source, self._folder = model, images, source, folder
        self._progress = progress or (lambda clause, done, total: None)
        self._moments, self._kept = moments or KeptMoments(images), kept or KeptWeights()

    def quantized(self, name: str, grid: WeightGrid) -> QuantizedWeight:
        """A layer's integer weights.

        Args:
            name: Layer name.
            grid: What to round to.

        Raises:
            QuantizeError: The layer reads more values at once than second-order rounding can treat, or is not finite.
            StudyError: The result cannot be written.
        """
        if (found := self._found(name, grid)) is not None:
            return found
        if name not in self._roundable:
            raise QuantizeError(
                f"an output of layer {name!r} reads more than {MAX_READS} values at once, too many for the covariance that "
                "second-order rounding needs: round this layer to nearest"
            )
        return self.prepare(self._roundable, grid)[name]

    def prepare(self, layers: Collection[str], grid: WeightGrid) -> dict[str, QuantizedWeight]:
        """Round layers to a grid, as far as they are neither known nor on disk.

        Args:
            layers: Their names.
            grid: What to round to.

        Returns:
            Those that were rounded now, by name.

        Raises:
            QuantizeError: A layer's weights are not finite.
            CalibrationError: What a layer reads is not finite.
            StudyError: A result cannot be written.
        """
        made: dict[str, QuantizedWeight] = {}
        missing = [name for name in layers if self._found(name, grid) is None]
        if not missing:
            return made
        observed = lambda done, total: self._progress("observing layer inputs", done, total)  # noqa: E731
        moments = self._moments.of(self._model, missing, observed)
        for done, name in enumerate(missing, 1):
            weight = self._model.parameters.weight[name]
            made[name] = _rounded(name, weight, moments.pop(name), grid)
            save_rounding(made[name], self._path(name, grid))
            self._kept.put((self, name, grid), made[name], made[name].bytes)
            self._progress("rounding weights", done, len(missing))
        return made

    def learned(self, request: LearnRequest) -> dict[str, RoundedLayer]:
        """Learn a configuration on the same images, see `learn_network`; kept beside the roundings."""
        said = lambda done, total: self._progress("learning blocks", done, total)  # noqa: E731
        return learn_network(request, self._images, self._source, self._folder, said)

    @cached_property
    def _roundable(self) -> tuple[str, ...]:
        weights = self._model.parameters.weight
        return tuple(node.name for node in self._model.graph.layers if weights[node.name][0].size <= MAX_READS)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return value_digests(self._model, self._source)

    def _found(self, name: str, grid: WeightGrid) -> QuantizedWeight | None:
        """What is in memory or on disk."""
        if (found := self._kept.get((self, name, grid))) is None and (loaded := load_rounding(self._path(name, grid))):
            found = loaded[0]
            self._kept.put((self, name, grid), found, found.bytes)
        return found

    def _path(self, name: str, grid: WeightGrid) -> Path:
        node = self._model.graph.by_name[name]
        content: dict[str, Any] = {
            "version": _VERSION,
            "method": "second_order",
            "grid": asdict(grid),
            "geometry": [node.op, asdict(node.conv)],
            "weight": array_digest(self._model.parameters.weight[name]),
            "input": self._digests[node.inputs[0]],
        }
        return rounding_path(self._folder, content)


def _rounded(name: str, weight: np.ndarray, moments: InputMoments, grid: WeightGrid) -> QuantizedWeight:
    if grid.form is None:
        return round_second_order(name, weight, moments, grid.limits, grid.granularity, grid.rule)
    scale = weight_scales(weight, grid.limits, "channel_wise", "mse")
    return round_in_groups(name, weight, moments, group_weights(weight, scale, grid.form))
