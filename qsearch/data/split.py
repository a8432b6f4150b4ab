"""Divide images into calibration, search and held-out, by class and the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from qsearch.data.listing import Listing
from qsearch.errors import DataError

__all__ = ["Split", "divide", "divide_by_count", "sample_by_class"]

DEFAULT_CALIBRATION_IMAGES = 128
MOST_CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Split:
    """Indices into a listing, in ascending order; the three parts are disjoint.

    Attributes:
        calibration: Images whose activations are recorded.
        search: Images that trials are scored on.
        heldout: Images that only the final front sees.
        carved: True where the calibration images were taken from rows that the user labelled `search`.
    """

    calibration: tuple[int, ...]
    search: tuple[int, ...]
    heldout: tuple[int, ...]
    carved: bool = False


def divide(listing: Listing, calibration_images: int | None, seed: int) -> Split:
    """Follow the user's split column where there is one, and divide by share where there is none.

    Args:
        listing: the images.
        calibration_images: wanted number; never more than a quarter of what they are taken from. None means 128 of the
            user's search rows, or a tenth of undivided images, at most 512.
        seed: changes which images are chosen.

    Returns:
        Three disjoint parts.

    Raises:
        DataError: a part would be empty.
    """
    everything = range(len(listing.names))
    splits = listing.labels.splits
    if splits is None:
        count = len(everything)
        calibrating = min(MOST_CALIBRATION_IMAGES, round(count / 10)) if calibration_images is None else calibration_images
        split = divide_by_count(listing, (min(calibrating, count // 4), round(count * 0.45)), seed)
    else:
        calibration, search, heldout = (
            tuple(index for index in everything if splits[index] == part) for part in ("calibration", "search", "heldout")
        )
        split = Split(calibration, search, heldout)
        if not calibration:
            wanted = min(calibration_images or DEFAULT_CALIBRATION_IMAGES, len(search) // 4)
            split = _carve(listing, split, wanted, seed)
    return _complete(listing, split)


def divide_by_count(listing: Listing, counts: tuple[int, int], seed: int) -> Split:
    """Draw calibration images, then search images; the rest is held out.

    Args:
        listing: the images.
        counts: calibration and search images.
        seed: changes which images are chosen.

    Returns:
        Three disjoint parts.
    """
    calibration = sample_by_class(listing, range(len(listing.names)), counts[0], seed)
    rest = sorted(set(range(len(listing.names))) - set(calibration))
    search = sample_by_class(listing, rest, counts[1], seed)
    return Split(calibration, search, tuple(sorted(set(rest) - set(search))))


def sample_by_class(listing: Listing, among: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """Draw images so that every class is represented in proportion, to within one image.

    Systematic sampling: images are put in order by class and, inside a class, by a hash of seed and name; then every
    len(among) / count-th one is taken. Hashes instead of a generator make the choice independent of library versions, and nearly
    independent of images added later.

    Args:
        listing: the images.
        among: indices to draw from.
        count: images to draw.
        seed: changes which images are chosen.

    Returns:
        `count` indices, ascending.
    """
    labels, names = listing.labels.indices, listing.names
    order = sorted(among, key=lambda index: (_hash(seed, str(labels[index])), labels[index], _hash(seed, names[index])))
    return tuple(sorted(order[(2 * step + 1) * len(order) // (2 * count)] for step in range(count)))


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()


def _carve(listing: Listing, split: Split, count: int, seed: int) -> Split:
    """Move some of the search images to calibration."""
    calibration = sample_by_class(listing, split.search, count, seed)
    return Split(calibration, tuple(sorted(set(split.search) - set(calibration))), split.heldout, carved=True)


def _complete(listing: Listing, split: Split) -> Split:
    """Check that no part is empty."""
    for part in ("calibration", "search", "heldout"):
        if not getattr(split, part):
            total = len(listing.names)
            advice = "label rows with it in the split column" if listing.labels.splits else "add images"
            raise DataError(f"{listing.name}: the part {part!r} would be empty, of {total} images; {advice}")
    return split
