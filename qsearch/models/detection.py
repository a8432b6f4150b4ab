"""How a detector's output is read: the record that a model brings beside its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from qsearch.bounded import shortened
from qsearch.errors import UnsupportedModelError

__all__ = ["DetectionHead", "Distances"]

# Boxes of an image that COCO's evaluation looks at.
MOST_COUNTED = 100
Distances = Literal["exp", "linear"]


@dataclass(frozen=True)
class DetectionHead:
    """An anchor-free head: one box and one logit per class at every position of one or more grids.

    The model's one output is float32 (N, positions, 4 + classes), or (N, positions, 5 + classes) with objectness. Positions
    are those of the grid with the first stride, row by row, then those of the next. A position lies in the middle of its
    cell of stride x stride pixels. The first four numbers say how far from it the left, top, right and bottom edges
    of the box are (FCOS, Tian et al. 2019, equation 1), the rest are logits.

    Decoding and suppression are no part of the compiled module: they cost little, and have no precision to choose.

    Attributes:
        strides: Pixels between the positions of each grid; each divides the input's height and width.
        distances: exp: a number is the logarithm of a distance in strides. linear: the distance in strides itself, where
            less than 0 means 0.
        objectness: Whether the fifth number is the logit of there being anything; it multiplies the classes' probabilities.
        heads: Names or globs of layers that the detection profile keeps precise besides the last ones before the output.
        least_score: Boxes that score less are dropped.
        most_overlap: Of two boxes of one class that overlap more (intersection over union) the weaker one is dropped.
        most_boxes: The strongest so many boxes of an image are kept; mean average precision looks at no more than 100.
    """

    strides: tuple[int, ...]
    distances: Distances = "exp"
    objectness: bool = False
    heads: tuple[str, ...] = ()
    least_score: float = 0.05
    most_overlap: float = 0.6
    most_boxes: int = 100

    def __post_init__(self) -> None:
        """Reject impossible values.

        Raises:
            UnsupportedModelError: A field is of the wrong type or out of range.
        """
        _require("strides", self.strides, _each(self.strides, _is_positive), "a list of positive integers, finest first")
        _require("distances", self.distances, self.distances in get_args(Distances), "'exp' or 'linear'")
        _require("objectness", self.objectness, isinstance(self.objectness, bool), "true or false")
        named = self.heads == () or _each(self.heads, lambda one: isinstance(one, str))
        _require("heads", self.heads, named, "a list of layer names or globs")
        for name in ("least_score", "most_overlap"):
            value = getattr(self, name)
            share = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
            _require(name, value, share, "a number from 0 to 1")
        counted = _is_positive(self.most_boxes) and self.most_boxes <= MOST_COUNTED
        _require("most_boxes", self.most_boxes, counted, f"an integer from 1 to {MOST_COUNTED}")

    @property
    def fixed_channels(self) -> int:
        """Numbers before the first class: 4, or 5 with objectness."""
        return 5 if self.objectness else 4

    def check_output(self, name: str, output: tuple[int, ...], side: tuple[int, int]) -> int:
        """Refuse an output that this record cannot describe.

        Args:
            name: The model's, for messages.
            output: Shape of its output.
            side: (height, width) of its input, pixels.

        Returns:
            The number of classes.

        Raises:
            UnsupportedModelError: Rank, positions or channels do not fit.
        """
        stray = next((stride for stride in self.strides if side[0] % stride or side[1] % stride), None)
        if stray is not None:
            raise UnsupportedModelError(
                f"model {name!r}: stride {stray} of its detection record does not divide the input of {side[1]}x{side[0]} pixels"
            )
        positions = sum((side[0] // stride) * (side[1] // stride) for stride in self.strides)
        if len(output) != 3 or output[1] != positions or output[2] <= self.fixed_channels:
            raise UnsupportedModelError(
                f"model {name!r} returns shape {output}; with strides {list(self.strides)} on {side[1]}x{side[0]} pixels a "
                f"detector returns (batch, {positions}, {self.fixed_channels} + classes). "
                "Correct its detection record, or its forward"
            )
        return output[2] - self.fixed_channels

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "strides": list(self.strides), "heads": list(self.heads)}

    @classmethod
    def from_json(cls, data: Any) -> DetectionHead:
        """Restore what `to_json` returned; everything but `strides` may be left out.

        Raises:
            UnsupportedModelError: A key is unknown or missing, or a value is impossible.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or "strides" not in data or not set(data) <= set(known):
            got = ", ".join(map(str, data))[:200] if isinstance(data, Mapping) else shortened(data)
            raise UnsupportedModelError(f"detection record: expected strides and any of {', '.join(known[1:])}; got {got}")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**values)


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UnsupportedModelError(f"detection record: {name} must be {expected}, got {shortened(value)}")


def _each(values: Any, accepts: Any) -> bool:
    return isinstance(values, tuple) and bool(values) and all(accepts(one) for one in values)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
