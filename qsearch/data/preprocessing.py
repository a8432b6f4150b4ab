"""From a decoded image to the tensor a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsearch.bounded import parse_json, read_file, shortened
from qsearch.errors import DataError

__all__ = ["MOST_PIXELS", "Interpolation", "Preprocessing", "read_preprocessing"]

Interpolation = Literal["bicubic", "bilinear"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MODES = {1: "L", 3: "RGB"}
# Of means and deviations, which are of the size of one.
_LARGEST, _SMALLEST = 1e6, 1e-6
# Of an image, before and after resizing; what Pillow itself warns of.
MOST_PIXELS = 89_478_485


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation; part of the model, and recorded in every bundle.

    Pillow does the work, with the rounding rules of torchvision's `Resize` and `CenterCrop`, so that an
    exported model needs no torch to see the same numbers.

    Attributes:
        resize: Length of the short side after resizing, in pixels; None keeps the image's size.
        interpolation: Filter of the resizing, with antialiasing.
        crop: (height, width) of the centre crop, the model's input, in pixels.
        mean: Subtracted after scaling to 0..1, one value per channel.
        std: Divides the result, one value per channel.
        channels: 1 for grey, 3 for RGB.
    """

    resize: int | None
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Literal[1, 3] = 3
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        """Reject impossible values.

        Raises:
            DataError: a field is out of range or of the wrong length.
        """
        self._require("channels", type(self.channels) is int and self.channels in _MODES, "1 or 3")
        self._require("interpolation", self.interpolation in tuple(_FILTERS), "'bicubic' or 'bilinear'")
        self._require("crop", _is_tuple(self.crop, 2, _is_size), "two positive integers, height and width")
        self._require("mean", _is_tuple(self.mean, self.channels, _is_finite), f"{self.channels} finite numbers")
        positive = _is_tuple(self.std, self.channels, lambda value: _is_finite(value) and value > _SMALLEST)
        self._require("std", positive, f"{self.channels} positive numbers")
        self._require("resize", self.resize is None or _is_size(self.resize), "a positive integer or null")

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(f"preprocessing: {field} must be {expected}, got {shortened(getattr(self, field))}")

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value it can give."""
        bounds = [(edge - m) / s for m, s in zip(self.mean, self.std, strict=True) for edge in (0.0, 1.0)]
        return min(bounds), max(bounds)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the tensor that `apply` returns."""
        return (self.channels, *self.crop)

    def apply(self, image: Image.Image) -> NDArray[np.float32]:
        """Turn one image into the model's input.

        Args:
            image: any mode that Pillow converts to the wanted channels.

        Returns:
            float32 (C, H, W).

        Raises:
            DataError: the image is smaller than the crop, or resizing makes it too large.
        """
        # Conversion comes first: palette indices and 1-bit pixels cannot be interpolated.
        image = self._cropped(self._resized(image.convert(_MODES[self.channels])))
        pixels = np.asarray(image, np.float32).reshape(*self.crop, self.channels) / np.float32(255)
        normalised = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def pixels_of(self, images: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The pixels that images were before they were normalised.

        Args:
            images: float32 (N, C, H, W), of `apply`.

        Returns:
            uint8 (N, H, W, C).

        Raises:
            DataError: No pixels give exactly these images.
        """
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        last = images.transpose(0, 2, 3, 1)
        pixels = np.clip(np.rint((last * std + mean) * 255), 0, 255).astype(np.uint8)
        if not np.array_equal((pixels.astype(np.float32) / np.float32(255) - mean) / std, last):
            raise DataError("the images are not normalised pixels of 8 bits: they cannot be given as pixels")
        return np.ascontiguousarray(pixels)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image after resizing, pixels."""
        if self.resize is None:
            return width, height
        short, long = sorted((width, height))
        longer = int(self.resize * long / short)
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def crop_corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top edge of the crop in a resized image, pixels."""
        return round((width - self.crop[1]) / 2.0), round((height - self.crop[0]) / 2.0)

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self.resized(*image.size)
        if size[0] * size[1] > MOST_PIXELS:
            found = f"the image has {image.width}x{image.height} pixels, and {size[0]}x{size[1]} after resizing"
            raise DataError(f"{found}; at most {MOST_PIXELS:,} are taken")
        return image if size == image.size else image.resize(size, _FILTERS[self.interpolation])

    def _cropped(self, image: Image.Image) -> Image.Image:
        height, width = self.crop
        if image.height < height or image.width < width:
            raise DataError(
                f"the image has {image.width}x{image.height} pixels{' after resizing' if self.resize else ''}, "
                f"the crop needs {width}x{height}; set the preprocessing's resize to at least {max(self.crop)}"
            )
        left, top = self.crop_corner(*image.size)
        return image.crop((left, top, left + width, top + height))

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON types, the same for equal values."""
        floats = {"mean": [float(value) for value in self.mean], "std": [float(value) for value in self.std]}
        return {**asdict(self), "crop": list(self.crop), **floats}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Restore what `to_json` returned.

        Args:
            data: the dictionary; `channels` and `interpolation` may be left out.

        Returns:
            The preprocessing.

        Raises:
            DataError: a key is unknown or missing, or a value is impossible.
        """
        known = {field.name for field in fields(cls)}
        required = known - {"channels", "interpolation"}
        if not isinstance(data, Mapping) or not required <= set(data) <= known:
            got = ", ".join(sorted(map(str, data)))[:200] if isinstance(data, Mapping) else shortened(data)
            raise DataError(f"preprocessing: expected the keys {', '.join(sorted(known))}; got {got}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**cast(dict[str, Any], values))


def read_preprocessing(path: Path) -> Preprocessing:
    """Read a preprocessing file.

    Raises:
        DataError: It is missing, is not JSON or holds an impossible value.
    """
    try:
        return Preprocessing.from_json(parse_json(read_file(path)))
    except OSError as error:
        raise DataError(f"cannot read preprocessing {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"preprocessing {path} is not JSON: {error}") from error


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST and math.isfinite(value)


def _is_tuple(value: object, length: int, accepts: Any) -> bool:
    return isinstance(value, tuple) and len(value) == length and all(accepts(item) for item in value)
