"""What must hold before a module is measured: a target this machine runs, images with labels it knows, room on the disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from qsearch.build.target import Target, open_target, require_runnable
from qsearch.build.threads import use_threads
from qsearch.config import QuantConfig
from qsearch.data import Dataset, Preprocessing, load_dataset
from qsearch.data.box_listing import BOXES_FILE, load_box_dataset
from qsearch.errors import DataError, SpaceError, StudyError, UnsupportedModelError
from qsearch.measure.mean_average_precision import require_torchmetrics
from qsearch.models.graph import Graph
from qsearch.models.zoo import LoadedModel
from qsearch.search.bound_space import bind_space
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.profile import HOW_TO_DECLARE
from qsearch.search.space import SearchSpace

__all__ = [
    "LEAST_FREE_BYTES",
    "check_classes",
    "open_dataset",
    "open_local_target",
    "require_asked",
    "require_precisions",
    "require_room",
]

# Objects and libraries of all kernels of a large model that are missing from the cache, with a margin.
LEAST_FREE_BYTES = 16_000_000


def open_local_target(name: str, threads: int) -> Target:
    """Resolve a target whose modules this machine can run, since every trial is measured on it, and ready its threads.

    Args:
        name: As for `open_target`.
        threads: Threads its modules run on.

    Raises:
        UsageError: There is no such target, or it has instructions that this machine lacks.
    """
    target = open_target(name, threads)
    require_runnable(target)
    use_threads(threads)
    return target


def require_asked(target: Target, asked: Mapping[str, QuantConfig | SearchSpace], graph: Graph) -> None:
    """Refuse configurations and spaces with precisions that a target has no kernels for, before anything is measured.

    Args:
        target: What to compile for.
        asked: Name -> what is to be measured on it.
        graph: The model's layers.

    Raises:
        SpaceError: A layer may get such a precision, or what is asked for does not fit the model.
    """
    for name, one in asked.items():
        if isinstance(one, SearchSpace):
            bound = bind_space(one, graph)
            require_precisions(target, {layer.name: layer.values for layer in bound.layers}, f"search space {name!r}")
        else:
            layers = {layer: (of.precision,) for layer, of in one.resolve(graph.layer_types).items()}
            require_precisions(target, layers, f"configuration {name!r}")


def require_precisions(target: Target, layers: Mapping[str, Collection[str]], what: str) -> None:
    """Refuse precisions that a target has no kernels for.

    Args:
        target: What to compile for.
        layers: Layer name -> the precisions it may get.
        what: Who asks for them, for the message.

    Raises:
        SpaceError: There is such a layer.
    """
    missing = dict.fromkeys(name for names in layers.values() for name in names if name not in target.precisions)
    for name in missing:
        asking = [layer for layer, names in layers.items() if name in names]
        more = f" and {len(asking) - 3} more" if len(asking) > 3 else ""
        raise SpaceError(
            f"{what} asks for {name} in {', '.join(asking[:3])}{more}, and target {target.name!r} has no {name} kernels, only "
            f"{', '.join(target.precisions)}: use --target cuda, or leave {name} out"
        )


def open_dataset(settings: Settings, loaded: LoadedModel, preprocessing: Preprocessing) -> Dataset:
    """The images of `--data`, or the model's own.

    Raises:
        DataError: There are none, or they cannot be used.
    """
    built_in = settings.model in ("demo", "demo_detector")
    if settings.data is None and not built_in:
        raise DataError(f"model {settings.model!r} brings no images: pass a directory of labelled images with --data")
    source = settings.model if settings.data is None else settings.data
    if loaded.detection is not None:
        require_torchmetrics()
        return load_box_dataset(source, preprocessing, loaded.classes, settings.seed, settings.convert_channels)
    if settings.data is not None and (settings.data / BOXES_FILE).exists() and not (settings.data / "labels.csv").exists():
        raise DataError(
            f"{settings.data} holds {BOXES_FILE}, images for a detector, which model {settings.model!r} does not say it is. If "
            f"it is one, {HOW_TO_DECLARE}"
        )
    return load_dataset(source, preprocessing, loaded.classes, seed=settings.seed, convert_channels=settings.convert_channels)


def check_classes(name: str, outputs: int, classes: tuple[str, ...] | None, dataset: Dataset) -> None:
    """Refuse labels that the model has no output for, and class names that cannot be told which output is theirs.

    Args:
        name: The model's.
        outputs: How many classes it tells apart.
        classes: Its class names; None where it brings none.
        dataset: The images.

    Raises:
        DataError: A label is out of range, or names and outputs do not match.
        UnsupportedModelError: The model's class names are not those of its outputs.
    """
    if classes is not None and len(classes) != outputs:
        raise UnsupportedModelError(
            f"model {name!r} brings {len(classes)} class names for {outputs} outputs; give it one name per output, or none"
        )
    listing = dataset.listing
    indices = list(enumerate(listing.labels.indices))
    if listing.boxes is not None:
        indices = [(place, int(index)) for place, image in enumerate(listing.boxes) for index in image.classes]
    stray = next(((place, index) for place, index in indices if index >= outputs), None)
    if stray is not None:
        label, where = dataset.classes[stray[1]], f"{dataset.name}/{listing.names[stray[0]]}"
        raise DataError(
            f"{where}: label {label!r} is out of range; model {name!r} has {outputs} outputs, classes 0 to {outputs - 1}. "
            "Correct the label or remove the image"
        )
    numbered = dataset.classes == tuple(str(index) for index in range(len(dataset.classes)))
    if classes is None and not numbered and len(dataset.classes) != outputs:
        raise DataError(
            f"data {dataset.name!r} names {len(dataset.classes)} classes ({dataset.classes[0]!r} and so on), but model "
            f"{name!r} has {outputs} outputs without names; label the images by output, 0 to {outputs - 1}"
        )


def require_room(folder: Path) -> None:
    """Refuse to compile on a nearly full disk: LLVM ends the process when it cannot write an object file.

    Args:
        folder: Where kernels are kept; the folder for temporary files, where they are linked, is looked at too.

    Raises:
        StudyError: There is no room.
    """
    for place in (folder, Path(tempfile.gettempdir())):
        nearest = next(parent for parent in (place.resolve(), *place.resolve().parents) if parent.exists())
        free = shutil.disk_usage(nearest).free
        if free < LEAST_FREE_BYTES:
            raise StudyError(
                f"the disk is full: {free / 1e6:.1f} MB are free in {nearest}, {LEAST_FREE_BYTES / 1e6:.0f} MB are needed to "
                "compile; free some space and run the same command again, nothing that was finished is lost"
            )
