"""Labelled images to fine-tune on: of the user's directory, or those that the built-in model was trained on.

Images that score trials or judge the front are never among them. They are recognised by what the model would see, in whatever
file they lie, and left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qsearch.data import Dataset
from qsearch.data.dataset import DECODING_THREADS, decode_input, list_directory
from qsearch.data.labels import Labels
from qsearch.data.listing import Listing
from qsearch.data.preprocessing import Preprocessing
from qsearch.data.split import sample_by_class
from qsearch.errors import DataError

__all__ = ["FASHION_MNIST", "Judged", "TrainingImages", "builtin_images", "directory_images"]

# Where Debian's package dataset-fashion-mnist puts them.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# One image in so many is held out for validation, at most MOST_VALIDATION.
VALIDATION_SHARE, MOST_VALIDATION = 10, 5000
# Fewer are learned by heart at once.
LEAST_IMAGES = 10

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class TrainingImages:
    """Images to train on and to validate with.

    Attributes:
        listing: All images and their labels.
        preprocessing: Of the model.
        convert: Whether grey and colour images are converted to the model's channels.
        training: Indices of the images that are trained on.
        validation: Indices of those that are not.
        augment: Changes a batch of inputs, float32 (N, C, H, W), at random; None to train on images as they are.
    """

    listing: Listing
    preprocessing: Preprocessing
    convert: bool
    training: tuple[int, ...]
    validation: tuple[int, ...]
    augment: Augment | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of names, sizes, labels, parts and preprocessing."""
        sizes = [size for size, _ in self.listing.versions]
        augmented = None if self.augment is None else self.augment.__name__
        known = [self.listing.names, sizes, self.listing.labels.indices, self.training, self.validation]
        text = json.dumps([known, self.preprocessing.to_json(), self.convert, augmented])
        return hashlib.sha256(text.encode()).hexdigest()

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training images once, in random order and augmented; the incomplete last batch is left out.

        Args:
            size: Images per batch.
            generator: Source of randomness.

        Yields:
            Inputs, float32 (size, C, H, W), and labels, int64 (size,).

        Raises:
            DataError: An image cannot be used; it is named.
        """
        order = torch.randperm(len(self.training), generator=generator).tolist()
        parts = (order[start : start + size] for start in range(0, len(order) - size + 1, size))
        for inputs, labels in self._decoded([self.training[place] for place in part] for part in parts):
            yield inputs if self.augment is None else self.augment(inputs, generator), labels

    def validation_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images as they are, like `batches`; the last batch may be smaller."""
        starts = range(0, len(self.validation), size)
        return self._decoded(self.validation[start : start + size] for start in starts)

    def _decoded(self, parts: Iterable[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode batches, one ahead of the one in use."""
        labels = self.listing.labels.indices
        with ThreadPoolExecutor(DECODING_THREADS) as pool:

            def rows(part: Sequence[int]) -> list:
                return [pool.submit(decode_input, self.listing, index, self.preprocessing, self.convert) for index in part]

            ahead: deque[tuple[Sequence[int], list]] = deque()
            for part in [*parts, ()]:
                ahead.append((part, rows(part)))
                if len(ahead) > 1:
                    chosen, decoded = ahead.popleft()
                    inputs = torch.from_numpy(np.stack([one.result() for one in decoded]))
                    yield inputs, torch.tensor([labels[index] for index in chosen])


@dataclass(frozen=True)
class Judged:
    """The images that judge configurations, none of which may be trained on.

    Attributes:
        sizes: Bytes of their files: an image of another size is none of them.
        inputs: Gives what the model sees of them, float32 (N, C, H, W) arrays.
    """

    sizes: frozenset[int]
    inputs: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, dataset: Dataset, inputs: Callable[[], Iterable[np.ndarray]]) -> Judged:
        """Those of a data set: its search and held-out images."""
        indices = (*dataset.indices("search"), *dataset.indices("heldout"))
        return cls(frozenset(dataset.listing.versions[index][0] for index in indices), inputs)

    def without(self, listing: Listing, indices: Sequence[int], decode: Callable[[int], np.ndarray]) -> list[int]:
        """The indices of images that are none of these, in order.

        Args:
            listing: Of the images.
            indices: Which of them.
            decode: What the model would see of one.
        """
        suspects = {index for index in indices if listing.versions[index][0] in self.sizes}
        if not suspects:
            return list(indices)
        known = {_digest(row) for part in self.inputs() for row in part}
        return [index for index in indices if index not in suspects or _digest(decode(index)) not in known]


def _digest(row: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(row, np.float32).tobytes()).digest()


def directory_images(
    folder: Path, dataset: Dataset, judged: Judged, limit: int | None, seed: int, progress: Callable[[str], None]
) -> TrainingImages:
    """The labelled images of a directory.

    Args:
        folder: In one of the layouts of --data; rows that labels.csv marks search or heldout are left out.
        dataset: The images that judge, for classes and preprocessing.
        judged: What is left out.
        limit: Images to use at most; None for all.
        seed: Of the validation images, and of those used.
        progress: Called with what is to be known of them.

    Raises:
        DataError: The directory is missing or malformed, has other classes, or too few images are left.
    """
    listing = list_directory(folder, dataset.classes)
    splits = listing.labels.splits
    allowed = [index for index in range(len(listing.names)) if splits is None or splits[index] == "calibration"]
    images = _without_judged(listing, allowed, dataset, judged, progress)
    count = len(images)
    if count < LEAST_IMAGES:
        raise DataError(
            f"--train {folder} has {count} images to train on that are neither search nor held-out images, of "
            f"{len(listing.names)} in all, and fine-tuning needs at least {LEAST_IMAGES}: add images"
        )
    if limit is not None and limit < count:
        images = list(sample_by_class(listing, images, limit, seed))
    validation = sample_by_class(listing, images, _validation_count(len(images)), seed + 1)
    training = tuple(sorted(set(images) - set(validation)))
    return TrainingImages(listing, dataset.preprocessing, dataset.convert, training, validation)


def builtin_images(
    dataset: Dataset, judged: Judged, limit: int | None, seed: int, progress: Callable[[str], None], folder: Path = FASHION_MNIST
) -> TrainingImages:
    """What the built-in model was trained on, with its recipe's validation images and augmentation.

    Args:
        dataset: As for `directory_images`.
        judged: As for `directory_images`.
        limit: As for `directory_images`.
        seed: As for `directory_images`.
        progress: As for `directory_images`.
        folder: Where Fashion-MNIST's training files lie.

    Raises:
        DataError: They are not there.
    """
    # Only this source needs one of the models.
    from qsearch.models.demo.images import read_images_and_labels
    from qsearch.models.demo.train import Recipe, augment, divide

    if not folder.is_dir():
        raise DataError(
            f"the built-in model is fine-tuned on the images it was trained on, which are not in {folder}: install Debian's "
            "package dataset-fashion-mnist, or give a directory of labelled images with --train"
        )
    pixels, labels = read_images_and_labels(folder, "train")
    listing = Listing(
        name="fashion-mnist",
        names=tuple(f"train/{index:05d}" for index in range(len(pixels))),
        labels=Labels(tuple(map(int, labels)), dataset.classes, None),
        versions=((pixels[0].size, 0),) * len(pixels),
        open=lambda index: Image.fromarray(pixels[index]),
    )
    # Those that the float network was validated with: it has not seen them either.
    recipe = Recipe()
    held, used = divide(len(pixels), recipe, torch.Generator().manual_seed(recipe.seed))
    images = _without_judged(listing, sorted(used.tolist()), dataset, judged, progress)
    validation = held.tolist()
    if limit is not None and limit < len(images):
        images = list(sample_by_class(listing, images, limit, seed))
        validation = validation[: _validation_count(limit)]
    return TrainingImages(listing, dataset.preprocessing, dataset.convert, tuple(images), tuple(validation), augment)


def _without_judged(
    listing: Listing, indices: Sequence[int], dataset: Dataset, judged: Judged, progress: Callable[[str], None]
) -> list[int]:
    kept = judged.without(listing, indices, lambda index: decode_input(listing, index, dataset.preprocessing, dataset.convert))
    if left_out := len(indices) - len(kept):
        progress(f"{left_out} of {len(indices)} training images are search or held-out images as well: they are left out")
    return kept


def _validation_count(images: int) -> int:
    return max(1, min(images // VALIDATION_SHARE, MOST_VALIDATION))
