"""Import torchvision beside a PyTorch that it was not linked against.

PyPI's torchvision is linked against PyPI's CUDA build of torch. Beside torch+cpu its extension library cannot be
loaded, and the import then stops because the extension's operators (non-maximum suppression) have no schema. Nothing
here calls these operators, so declaring the schemas is enough for the models and transforms, which are pure Python.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from qsearch.errors import UnsupportedModelError

__all__ = ["imagenet_classes", "import_torchvision"]

# The operators that torchvision registers shape functions for while it is imported.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's declarations vanish with the object, so it has to live as long as the process.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators first where its extension does not load.

    Returns:
        The module `torchvision`.

    Raises:
        UnsupportedModelError: torchvision is not installed or cannot be imported.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedModelError("torchvision is not installed; install it with `pip install torchvision`")
    if not _declared and not _extension_loads(Path(spec.submodule_search_locations[0])):
        _declare_missing()
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); install the release that belongs to it"
        ) from error


def imagenet_classes() -> tuple[str, ...] | None:
    """Return ImageNet's 1,000 class names in the customary order; None where torchvision, which has them, is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    return tuple(import_torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"])


def _extension_loads(folder: Path) -> bool:
    """Try to load torchvision's operators, which also registers them."""
    for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            continue
        return True
    return False


def _declare_missing() -> None:
    """Declare the schemas that nothing has declared yet."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)
