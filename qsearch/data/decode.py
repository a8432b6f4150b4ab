"""Open image files and insist on the channels a model was trained on."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsearch.data.preprocessing import Preprocessing
from qsearch.errors import DataError

__all__ = ["convert_channels", "decode", "image_size", "open_image"]

_GREY_MODES = {"1", "L", "LA", "La"}
_COLOUR_MODES = {"RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}
# What Pillow's decoders raise on damaged files; SyntaxError is how the PNG reader reports a broken chunk.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode(path: Path, preprocessing: Preprocessing, convert: bool = False) -> NDArray[np.float32]:
    """Read one image file as the model's input.

    Args:
        path: the file.
        preprocessing: of the model.
        convert: turn grey into colour, or colour into grey, instead of refusing.

    Returns:
        float32 (C, H, W).

    Raises:
        DataError: the file is unreadable, has the wrong channels or is too small.
    """
    image = convert_channels(open_image(path), preprocessing.channels, str(path), convert)
    try:
        return preprocessing.apply(image)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def open_image(path: Path) -> Image.Image:
    """Read and fully decode an image file.

    Args:
        path: the file.

    Returns:
        The image in its own mode.

    Raises:
        DataError: the file is missing, truncated or not an image.
    """
    with _readable(path), Image.open(path) as image:
        image.load()
        return image


def image_size(path: Path) -> tuple[int, int]:
    """Read an image's (width, height), pixels, off its header.

    Raises:
        DataError: the file is missing or not an image.
    """
    with _readable(path), Image.open(path) as image:
        return image.size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of what Pillow raises which file it is about."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct the path") from None
    except _DAMAGED as error:
        raise DataError(f"{path} is not a readable image ({error}); replace or remove the file") from error


def convert_channels(image: Image.Image, channels: int, name: str, convert: bool) -> Image.Image:
    """Bring an image to grey or RGB, refusing to invent or drop colour unless asked to.

    Args:
        image: decoded image.
        channels: 1 or 3, what the model wants.
        name: the image's name for messages.
        convert: allow grey to become colour and the reverse.

    Returns:
        The image in mode L or RGB.

    Raises:
        DataError: the channels differ and `convert` is false, or the pixel type is not 8 or 16 bits.
    """
    image = _to_eight_bits(image, name)
    grey = image.mode in _GREY_MODES
    if grey != (channels == 1) and not convert:
        found, wanted = ("1 channel (grey)", "3 channels (RGB)") if grey else ("colour channels", "1 channel (grey)")
        raise DataError(f"{name} has {found}, the model wants {wanted}; pass --convert-channels to convert such images")
    return image.convert("L" if channels == 1 else "RGB")


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Unpack palettes and 16-bit grey, both of which Pillow's own conversion would misjudge."""
    if image.mode in ("P", "PA"):
        colours = image.convert("RGB")
        red, green, blue = colours.split()
        return red if red.tobytes() == green.tobytes() == blue.tobytes() else colours
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255; the high byte is the 8-bit image.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(f"{name} has pixel type {image.mode!r}, expected 8 or 16 bits per channel; convert it to PNG or JPEG")
    return image
