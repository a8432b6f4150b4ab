"""Turn what the user typed after `--model` into a module, its preprocessing and its class names."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qsearch.data import Preprocessing
from qsearch.errors import DataError, UnsupportedModelError
from qsearch.models import efficientnet_lite
from qsearch.models.checkpoint import first_line, hash_tensors, load_weights, read_state, reject_non_finite
from qsearch.models.detection import DetectionHead
from qsearch.models.exported_program import load_exported_program
from qsearch.models.torchvision_import import imagenet_classes, import_torchvision

__all__ = ["IMAGENET_PREPROCESSING", "LoadedModel", "load_model"]

IMAGENET_PREPROCESSING = Preprocessing(
    resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)
"""Assumed for models that do not say how their images are prepared."""

DOWNLOAD = "download"
_BUILT_IN = ("demo", "demo_detector", "efficientnet_lite0")
_FORMS = "demo, demo_detector, efficientnet_lite0, torchvision:NAME, package.module:factory, or a .pt2 file"
_RANDOM_SEED = 0
_WARMING_PASSES, _WARMING_IMAGES = 2, 4


@dataclass(frozen=True)
class LoadedModel:
    """A float model, ready to be imported into the layer graph.

    Attributes:
        name: What the user called it.
        module: In evaluation mode: float32 (N, C, H, W) to logits, float32 (N, classes), or to what `detection` describes.
        preprocessing: From image to input.
        classes: Class names in the order of the logits; None where the model does not know them.
        fingerprint: SHA-256 of weights and structure.
        detection: How a detector's output is read; None for a classifier.
    """

    name: str
    module: nn.Module | ExportedProgram
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    fingerprint: str
    detection: DetectionHead | None = None


@dataclass(frozen=True)
class _Found:
    """What one way of loading returns, before the checks that all share."""

    module: nn.Module | ExportedProgram
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    detection: DetectionHead | None = None


def load_model(source: str, weights: str | Path | None = None, num_classes: int | None = None) -> LoadedModel:
    """Load a float model.

    Args:
        source: `demo`, `demo_detector`, `efficientnet_lite0`, `torchvision:NAME`, `package.module:factory` or a `.pt2` file.
        weights: a file with a state dict; for torchvision also "download"; None for the model's own weights, which for
            torchvision are random numbers.
        num_classes: width of the last layer; None for the model's own.

    Returns:
        The model with finite weights, in evaluation mode.

    Raises:
        UnsupportedModelError: the model or its weights cannot be found or used.
    """
    kind, _, rest = source.partition(":")
    if source in ("demo", "demo_detector"):
        found = _load_demo(source, weights, num_classes)
    elif source == "efficientnet_lite0":
        found = _load_efficientnet_lite0(weights, num_classes)
    elif kind == "torchvision" and rest:
        found = _load_torchvision(rest, weights, num_classes)
    elif source.endswith(".pt2"):
        found = _load_file(Path(source), weights, num_classes)
    elif kind and rest:
        found = _load_factory(kind, rest, weights, num_classes)
    else:
        close = difflib.get_close_matches(source, _BUILT_IN, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnsupportedModelError(f"unknown model {source!r}: expected {_FORMS}{hint}")
    return _checked(source, found)


def _checked(source: str, found: _Found) -> LoadedModel:
    """Check the weights and add the fingerprint."""
    module = found.module
    if isinstance(module, ExportedProgram):
        constants = {name: value for name, value in module.constants.items() if isinstance(value, torch.Tensor)}
        tensors = {**module.state_dict, **constants}
        # Operators and shapes as text, which does not depend on where the file lies.
        structure = module.graph_module.print_readable(print_output=False)
    else:
        tensors, structure = module.eval().state_dict(), repr(module)
    reject_non_finite(tensors, source)
    fingerprint = hash_tensors(tensors, structure)
    return LoadedModel(source, module, found.preprocessing, found.classes, fingerprint, found.detection)


def _require_classes(source: str, num_classes: int | None, own: int) -> None:
    if num_classes not in (None, own):
        raise UnsupportedModelError(f"{source} has {own} classes, {num_classes} were asked for; leave the number out")


def _load_demo(source: str, weights: str | Path | None, num_classes: int | None) -> _Found:
    # Not at the top: most runs load another model.
    home = importlib.import_module(f"qsearch.models.{source}")
    _require_classes(source, num_classes, len(home.CLASSES))
    module = load_weights(home.build(), read_state(Path(weights)), str(weights)) if weights else home.build()
    return _Found(module, home.PREPROCESSING, home.CLASSES, _detection_from(getattr(home, "DETECTION", None), source))


def _load_efficientnet_lite0(weights: str | Path | None, num_classes: int | None) -> _Found:
    if weights is None:
        _require_classes("efficientnet_lite0 with its published weights", num_classes, 1000)
    path = Path(weights) if weights else efficientnet_lite.published_weights()
    module = efficientnet_lite.EfficientNetLite0(num_classes or 1000)
    load_weights(module, efficientnet_lite.rename_published(read_state(path)), str(path))
    return _Found(module, efficientnet_lite.PREPROCESSING, imagenet_classes() if num_classes in (None, 1000) else None)


def _load_torchvision(name: str, weights: str | Path | None, num_classes: int | None) -> _Found:
    """Build a torchvision classifier; its published weights say how images are prepared, whichever are loaded."""
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or sorted(known)[:3]
        raise UnsupportedModelError(f"torchvision has no classification model {name!r}; did you mean {', '.join(close)}?")
    entries = models.get_model_weights(name)
    default = entries.DEFAULT
    if weights is None:
        # A module built without weights expects the size of the first recipe; fine-tuned ones may be larger.
        default = min((default, *entries), key=lambda entry: _torchvision_preprocessing(entry).crop)
    file = None if weights is None or str(weights) == DOWNLOAD else Path(weights)
    # A file that keeps the name it was downloaded under tells which of the recipes it belongs to.
    entry = next((entry for entry in entries if file and entry.url.endswith(f"/{file.name}")), default)
    options = {} if num_classes is None else {"num_classes": num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        try:
            module = models.get_model(name, weights=entry if str(weights) == DOWNLOAD else None, **options)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise UnsupportedModelError(f"torchvision:{name} cannot be loaded ({first_line(error)})") from error
        preprocessing = _torchvision_preprocessing(entry)
        if weights is None:
            _fill_empty_heads(module)
            _settle_batch_norm(module.eval(), preprocessing.shape)
    if file:
        load_weights(module, read_state(file), str(file))
    classes = tuple(entry.meta["categories"]) if num_classes in (None, 1000) and weights is not None else None
    return _Found(module, preprocessing, classes)


def _torchvision_preprocessing(entry: Any) -> Preprocessing:
    """Translate torchvision's preset; all its classifiers use the same class of it."""
    preset = entry.transforms()
    size = preset.crop_size * 2 if len(preset.crop_size) == 1 else preset.crop_size
    return Preprocessing(
        resize=int(preset.resize_size[0]),
        crop=(int(size[0]), int(size[1])),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
    )


@torch.no_grad()
def _fill_empty_heads(module: nn.Module) -> None:
    """Vision transformers start with a head of zeros, behind which every image looks alike."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


@torch.no_grad()
def _settle_batch_norm(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Set running statistics from noise; with the initial ones, activations of random deep networks explode or vanish."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.train()
        layer.momentum = None  # A plain mean over the passes.
    for _ in range(_WARMING_PASSES):
        module(torch.randn(_WARMING_IMAGES, *shape))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _load_factory(module_name: str, attribute: str, weights: str | Path | None, num_classes: int | None) -> _Found:
    """Call the user's function; `PREPROCESSING`, `CLASSES` and a detector's `DETECTION` beside it describe images and output."""
    source = f"{module_name}:{attribute}"
    if os.getcwd() not in sys.path:
        # As with `python -m`: the user's own files are importable.
        sys.path.insert(0, os.getcwd())
    try:
        home = _import_home(module_name)
        factory = getattr(home, attribute)
        module = factory() if num_classes is None else factory(num_classes=num_classes)
    except UnsupportedModelError:
        raise
    except (Exception, SystemExit) as error:  # The user's code may raise anything; it is their message that helps.
        raise UnsupportedModelError(f"{source} cannot be built ({first_line(error)})") from error
    if not isinstance(module, nn.Module | ExportedProgram):
        raise UnsupportedModelError(f"{source} returned {type(module).__name__}, expected a torch.nn.Module")
    if weights is not None:
        module = load_weights(_require_module(module, source), read_state(Path(weights)), str(weights))
    preprocessing = getattr(home, "PREPROCESSING", IMAGENET_PREPROCESSING)
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = _preprocessing_from(preprocessing, source)
    classes = getattr(home, "CLASSES", None)
    head = _detection_from(getattr(home, "DETECTION", None), source)
    return _Found(module, preprocessing, None if classes is None else tuple(map(str, classes)), head)


def _import_home(module_name: str) -> Any:
    """Import the user's module.

    Raises:
        UnsupportedModelError: It is not on the path.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UnsupportedModelError(
            f"there is no Python module {error.name!r} here: run the command in the folder that holds it, or put that folder "
            "on PYTHONPATH"
        ) from error


def _load_file(path: Path, weights: str | Path | None, num_classes: int | None) -> _Found:
    if weights is not None or num_classes is not None:
        raise UnsupportedModelError(f"{path} brings its own weights and classes; leave --weights and the number of classes out")
    loaded = load_exported_program(path)
    channels, height, width = loaded.shape
    head = _detection_from(loaded.detection, str(path))
    if loaded.preprocessing is not None:
        return _Found(loaded.program, _preprocessing_from(loaded.preprocessing, str(path)), loaded.classes, head)
    colour = (IMAGENET_PREPROCESSING.mean, IMAGENET_PREPROCESSING.std) if channels == 3 else ((0.5,), (0.5,))
    preprocessing = Preprocessing(
        # 256 to 224, the customary margin, at any size.
        resize=round(min(height, width) * 256 / 224),
        crop=(height, width),
        mean=colour[0],
        std=colour[1],
        channels=3 if channels == 3 else 1,
        interpolation="bilinear",
    )
    return _Found(loaded.program, preprocessing, loaded.classes, head)


def _preprocessing_from(data: Any, source: str) -> Preprocessing:
    try:
        return Preprocessing.from_json(data)
    except DataError as error:
        raise UnsupportedModelError(f"{source}: {error}") from error


def _detection_from(data: Any, source: str) -> DetectionHead | None:
    if data is None or isinstance(data, DetectionHead):
        return data
    try:
        return DetectionHead.from_json(data)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source}: {error}") from error


def _require_module(module: nn.Module | ExportedProgram, source: str) -> nn.Module:
    if isinstance(module, ExportedProgram):
        raise UnsupportedModelError(f"{source} returned an exported program, which brings its own weights; leave --weights out")
    return module
