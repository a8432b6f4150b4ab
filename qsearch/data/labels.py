"""Map the labels that a user wrote onto the classes of a model."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qsearch.errors import DataError

__all__ = ["Classes", "Labels", "map_labels"]

_MOST_CLASSES, _MOST_DIGITS = 1 << 20, 20
_SHOWN = 100
Classes = tuple[str, ...] | int | None
"""Class names of a model, or how many it has, or None where nothing is known."""


@dataclass(frozen=True)
class Labels:
    """What the user says about the images, in the order of the listing.

    Attributes:
        indices: Class index per image.
        classes: Class names in the model's order.
        splits: Part per image; None where the source has no split column.
    """

    indices: tuple[int, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...] | None


def map_labels(
    labels: Sequence[str], classes: Classes, places: Sequence[str], least: int = 2
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Map the labels of a source onto the model's classes.

    The first rule that applies: the labels are the model's class names; they are integers, then they are class indices;
    they are the WordNet ids of all classes; the model's names are unknown, then the sorted labels are the classes.

    Args:
        labels: as written, one per image.
        classes: of the model.
        places: where each label was read, for messages.
        least: how many classes must occur; a detector may know but one.

    Returns:
        Class index per label, and the class names in the model's order.

    Raises:
        DataError: too few classes occur, or a label is none of the model's.
    """
    known = set(labels)
    if len(known) < least:
        raise DataError(f"all images have the class {labels[0]!r} ({places[0]}); top-1 needs images of at least two classes")
    if isinstance(classes, tuple) and known <= set(classes):
        return _by_name(labels, classes, places), classes
    if all(re.fullmatch(r"[+-]?[0-9]+", label) for label in known):
        return _by_index(labels, classes, places)
    if _are_synsets(known, classes):
        # ImageNet's folders: the ids of all classes, whose alphabetical order is the customary class order.
        names = classes if isinstance(classes, tuple) else tuple(sorted(known))
        return _by_name(labels, tuple(sorted(known)), places), names
    if isinstance(classes, tuple):
        stranger, place = next((label, place) for label, place in zip(labels, places, strict=True) if label not in classes)
        stranger = stranger[:_SHOWN]
        close = difflib.get_close_matches(stranger, classes, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "; use the model's class names or indices"
        raise DataError(f"{place}: {stranger!r} is not one of the model's {len(classes)} classes{hint}")
    names = tuple(sorted(known))
    if classes is not None and len(names) != classes:
        raise DataError(
            f"the data has {len(names)} class names (first: {names[0]!r}, {places[0]}), the model has {classes} classes "
            "without names; label the images by class index"
        )
    return _by_name(labels, names, places), names


def _are_synsets(labels: set[str], classes: Classes) -> bool:
    """Tell whether the labels are the WordNet ids of all the model's classes."""
    count = len(classes) if isinstance(classes, tuple) else classes
    return len(labels) == count and all(re.fullmatch(r"n[0-9]{8}", label) for label in labels)


def _by_index(labels: Sequence[str], classes: Classes, places: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Read class indices, checking their range."""
    count = len(classes) if isinstance(classes, tuple) else classes
    for label, place in zip(labels, places, strict=True):
        # By its length first: a number of a thousand digits is not worth reading.
        if len(label) > _MOST_DIGITS or not 0 <= int(label) < (_MOST_CLASSES if count is None else count):
            allowed = f"0 to {_MOST_CLASSES - 1}" if count is None else f"0 to {count - 1}, the classes of the model"
            raise DataError(f"{place}: label {label[:_SHOWN]} is out of range; expected {allowed}")
    indices = tuple(map(int, labels))
    names = classes if isinstance(classes, tuple) else tuple(str(index) for index in range(count or max(indices) + 1))
    return indices, names


def _by_name(labels: Sequence[str], classes: tuple[str, ...], places: Sequence[str]) -> tuple[int, ...]:
    """Look names up, refusing those that two classes share (ImageNet has such pairs)."""
    counts = Counter(classes)
    for label, place in zip(labels, places, strict=True):
        if counts[label] > 1:
            raise DataError(f"{place}: {counts[label]} of the model's classes are called {label!r}; label images by class index")
    index = {name: position for position, name in enumerate(classes)}
    return tuple(index[label] for label in labels)
