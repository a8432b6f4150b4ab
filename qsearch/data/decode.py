"""Open image files and insist on the channels a model was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from qsearch.bounded import check_file
from qsearch.data.preprocessing import MOST_PIXELS, Preprocessing
from qsearch.errors import DataError

__all__ = ["convert_channels", "decode", "image_size", "open_image"]

_GREY_MODES = {"1", "L", "LA", "La"}
_COLOUR_MODES = {"RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}
# Not all that Pillow reads: it has another program interpret some, PostScript for one.
_READERS = (
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    PpmImagePlugin.PpmImageFile,
    TiffImagePlugin.TiffImageFile,
    WebPImagePlugin.WebPImageFile,
)
# WebP can be left out of Pillow when it is built.
_FORMATS = tuple(reader.format for reader in _READERS if reader.format in Image.OPEN)
_MOST_BYTES = 1 << 29
# Of a JPEG, each of which passes over the whole image; encoders write about ten.
_MOST_SCANS, _MOST_SCANNED = 100, 12 * MOST_PIXELS
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


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
    with _opened(path) as image:
        most = min(_MOST_SCANS, _MOST_SCANNED // (image.width * image.height))
        if image.format in ("JPEG", "MPO") and count_scans(path.read_bytes()) > most:
            raise ValueError(f"it has more than {most} scans")
        image.load()
        return image


def image_size(path: Path) -> tuple[int, int]:
    """Read an image's (width, height), pixels, off its header.

    Raises:
        DataError: the file is missing or not an image.
    """
    with _opened(path) as image:
        return image.size


def count_scans(data: bytes) -> int:
    """Scans of the first image in a JPEG file."""
    at, scans = 2, 0
    while match := _MARKER.search(data, at):
        kind = match[0][1]
        if kind == _END_OF_IMAGE:
            break
        scans += kind == _START_OF_SCAN
        # What is between the scans is searched, what is in a segment is skipped: thumbnails are images of their own.
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return scans


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of which the header was read; what Pillow raises is told with the file that it is about."""
    try:
        check_file(path, _MOST_BYTES)
        with Image.open(path, formats=_FORMATS) as image:
            if not 0 < image.width * image.height <= MOST_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels, at most {MOST_PIXELS:,} are read")
            yield image
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct the path") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
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
