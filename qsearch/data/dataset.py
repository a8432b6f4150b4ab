"""A data set ready to feed a model: three disjoint parts of preprocessed images, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from joblib import Parallel, delayed
from numpy.typing import NDArray
from PIL import Image

from qsearch.data.boxes import ImageBoxes, boxes_in_input
from qsearch.data.decode import convert_channels
from qsearch.data.image_file import mapped_images, write_images
from qsearch.data.labels import Classes, Labels
from qsearch.data.listing import Listing, list_csv, list_folders
from qsearch.data.preprocessing import Preprocessing
from qsearch.data.split import Split, divide, divide_by_count
from qsearch.errors import DataError

__all__ = ["Dataset", "Part", "Progress", "decode_input", "list_directory", "load_dataset"]

Part = Literal["calibration", "search", "heldout", "search_half"]
"""`search_half` is everything the user labelled `search`: the part `search`, then the images carved from it for calibration."""

Progress = Callable[[int, int], None]
"""Called with the number of images decoded so far and in all."""

DEMO_CALIBRATION_IMAGES = 500
DEMO_SEARCH_IMAGES = 3500
DECODING_THREADS = 2
DECODING_CHUNK = 64


@dataclass(frozen=True)
class Dataset:
    """Images and labels in three disjoint parts; images are decoded when they are first asked for.

    Attributes:
        listing: All images and their labels.
        split: Which image is in which part.
        preprocessing: Of the model.
        convert: Whether grey and colour images are converted to the model's channels instead of refused.
    """

    listing: Listing = field(repr=False)
    split: Split = field(repr=False)
    preprocessing: Preprocessing
    convert: bool = False

    @property
    def name(self) -> str:
        """Short name of the source."""
        return self.listing.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the model's outputs."""
        return self.listing.labels.classes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, labels, parts and preprocessing; the same wherever the files lie."""
        sizes = [size for size, _ in self.listing.versions]
        listed = [self.listing.names, sizes, self.listing.labels.indices, self.classes]
        parts = [self.split.calibration, self.split.search, self.split.heldout]
        known = [listed, parts, self.preprocessing.to_json(), self.convert]
        if self.listing.boxes is not None:
            known.append([[one.boxes.tolist(), one.classes.tolist()] for one in self.listing.boxes])
        return _sha256(known)

    @property
    def search_half_calibrating(self) -> int:
        """How many images of `search_half` are also the calibration images."""
        return len(self.split.calibration) if self.split.carved else 0

    def indices(self, part: Part) -> tuple[int, ...]:
        """Return the positions of a part's images in the listing."""
        if part == "search_half":
            return self.split.search + (self.split.calibration if self.split.carved else ())
        return getattr(self.split, part)

    def paths(self, part: Part) -> tuple[str, ...]:
        """Return the images' names relative to the source."""
        return tuple(self.listing.names[index] for index in self.indices(part))

    def labels(self, part: Part) -> NDArray[np.int64]:
        """Return the class indices, int64 (N,)."""
        return np.array([self.listing.labels.indices[index] for index in self.indices(part)], np.int64)

    def boxes(self, part: Part) -> tuple[ImageBoxes, ...]:
        """Return what is on each image, in pixels of the model's input.

        Raises:
            DataError: the images have a class each, and no boxes.
        """
        if self.listing.boxes is None:
            raise DataError(f"data {self.name!r} has no boxes to score a detector with: give --data a directory with boxes.csv")
        return tuple(boxes_in_input(self.listing.boxes[index], self.preprocessing) for index in self.indices(part))

    def images(self, part: Part, cache: Path, progress: Progress | None = None) -> NDArray[np.float32]:
        """Return a part's preprocessed images, decoding them if the cache does not hold them.

        Args:
            part: which images.
            cache: folder for the decoded images, created if missing; safe to share between processes.
            progress: called while images are decoded, not at all if the cache holds them.

        Returns:
            float32 (N, C, H, W), a read-only memory map, in the order of `labels` and `paths`.

        Raises:
            DataError: an image cannot be used, or the cache cannot be written.
        """
        if not self.split.carved or part == "heldout":
            return self._decoded(self.indices(part), cache, progress)
        # One file holds the search images and then those carved from them, so that no image is decoded or kept twice.
        half = self._decoded(self.indices("search_half"), cache, progress)
        searched = len(self.split.search)
        return {"search": half[:searched], "calibration": half[searched:], "search_half": half}[part]

    def _decoded(self, indices: tuple[int, ...], cache: Path, progress: Progress | None) -> NDArray[np.float32]:
        """Map the file of these images, writing it first if need be."""
        # Unlike the fingerprint this hashes the times of change: a file edited in place must not be served from the cache.
        key = _sha256([self.fingerprint, indices, [self.listing.versions[index] for index in indices]])
        final = cache / f"images-{key[:32]}.npy"
        shape = (len(indices), *self.preprocessing.shape)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_suffix(".lock")):
                kept = mapped_images(final, shape)
                if kept is None:
                    write_images(final, shape, self._rows(indices, progress))
                    kept = np.load(final, mmap_mode="r")
            return kept
        except OSError as error:
            raise DataError(
                f"cannot keep the decoded images in {cache} ({error.strerror or error}); free space or choose another folder"
            ) from error

    def _rows(self, indices: tuple[int, ...], progress: Progress | None) -> Iterable[NDArray[np.float32]]:
        """Decode in threads (Pillow releases the interpreter lock) and yield in order, float32 (C, H, W) each."""
        done = 0
        with Parallel(n_jobs=DECODING_THREADS, prefer="threads") as workers:
            # In bounded chunks, or decoding would run ahead of writing and fill the memory.
            for start in range(0, len(indices), DECODING_CHUNK):
                for row in workers(delayed(self._row)(index) for index in indices[start : start + DECODING_CHUNK]):
                    yield row
                    done += 1
                    if progress:
                        progress(done, len(indices))

    def _row(self, index: int) -> NDArray[np.float32]:
        return decode_input(self.listing, index, self.preprocessing, self.convert)


def decode_input(listing: Listing, index: int, preprocessing: Preprocessing, convert: bool) -> NDArray[np.float32]:
    """Turn one image of a listing into a model's input.

    Args:
        listing: the images.
        index: which one.
        preprocessing: of the model.
        convert: convert grey and colour images to the model's channels instead of refusing them.

    Returns:
        float32 (C, H, W).

    Raises:
        DataError: the image cannot be used; it is named.
    """
    name = listing.names[index]
    image = convert_channels(listing.open(index), preprocessing.channels, name, convert)
    try:
        return preprocessing.apply(image)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def load_dataset(
    source: str | Path,
    preprocessing: Preprocessing,
    classes: Classes = None,
    calibration_images: int | None = None,
    seed: int = 0,
    convert_channels: bool = False,
) -> Dataset:
    """List and divide the images of a source; nothing is decoded yet.

    Args:
        source: "demo" (the built-in images), a directory with `labels.csv`, or one with a folder per class.
        preprocessing: of the model.
        classes: the model's class names, or how many classes it has, or None.
        calibration_images: how many images calibrate; None for the default of the source.
        seed: of the split.
        convert_channels: convert grey or colour images to the model's channels instead of refusing them.

    Returns:
        The data set.

    Raises:
        DataError: the source is missing, malformed or too small.
    """
    if calibration_images is not None and calibration_images < 1:
        raise DataError(f"the number of calibration images must be at least 1, got {calibration_images}")
    if str(source) == "demo":
        listing = _list_demo(classes)
        calibrating = min(calibration_images or DEMO_CALIBRATION_IMAGES, len(listing.names) // 4)
        split = divide_by_count(listing, (calibrating, DEMO_SEARCH_IMAGES), seed)
        return Dataset(listing, split, preprocessing, convert_channels)
    listing = list_directory(Path(source), classes)
    return Dataset(listing, divide(listing, calibration_images, seed), preprocessing, convert_channels)


def list_directory(folder: Path, classes: Classes) -> Listing:
    """List the labelled images of a directory: those that `labels.csv` names, or a folder per class.

    Args:
        folder: the directory.
        classes: the model's class names, or how many classes it has, or None.

    Raises:
        DataError: it is missing or malformed, or a label is none of the model's.
    """
    if not folder.is_dir():
        state = "is not a directory" if folder.exists() else "does not exist"
        raise DataError(f"data source {folder} {state}; expected a directory with labels.csv or class folders, or 'demo'")
    table = folder / "labels.csv"
    try:
        return list_csv(table, classes) if table.exists() else list_folders(folder, classes)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder} ({error.strerror}); check its permissions") from error


def _list_demo(classes: Classes) -> Listing:
    """List the built-in images, for a model with as many classes as they have."""
    # Imported here because models stand above data; only this source needs one of them.
    from qsearch.models.demo import CLASSES, load_images

    count = len(classes) if isinstance(classes, tuple) else classes
    if count not in (None, len(CLASSES)):
        raise DataError(
            f"the built-in images have {len(CLASSES)} classes, the model has {count}; pass the model's images with --data"
        )
    images, labels = load_images()
    return Listing(
        name="demo",
        names=tuple(f"t10k/{index:05d}" for index in range(len(images))),
        labels=Labels(tuple(map(int, labels)), CLASSES, None),
        versions=((images[0].size, 0),) * len(images),
        open=lambda index: Image.fromarray(images[index]),
    )


def _sha256(value: object) -> str:
    """Hash a value of JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
