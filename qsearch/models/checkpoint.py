"""Read weights from files without running code from them, and check what was read."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from qsearch.bounded import check_archive
from qsearch.errors import UnsupportedModelError

__all__ = ["first_line", "hash_tensors", "load_weights", "read_state", "reject_non_finite"]

_MOST_NAMES = 3


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict.

    Args:
        path: a `.safetensors` file, or whatever `torch.save` wrote; a dict under the key `state_dict` is unwrapped.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        UnsupportedModelError: the file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise UnsupportedModelError(f"weights file {path} does not exist; pass the path of a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch stores tensors as they are: nothing can be larger unpacked.
                check_archive(archive, path.stat().st_size)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedModelError(
            f"{path} is damaged or holds more than tensors; it was not loaded, since that could run code from it; "
            "save only `model.state_dict()`"
        ) from error
    except Exception as error:  # Damaged files raise whatever the bytes happen to provoke in torch's reader.
        raise UnsupportedModelError(f"{path} is not a readable weights file ({first_line(error)})") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UnsupportedModelError(f"{path} does not hold a state dict (tensors by name); save `model.state_dict()`")
    return dict(state)


def load_weights(module: nn.Module, state: Mapping[str, torch.Tensor], origin: str) -> nn.Module:
    """Put a state dict into a freshly built module.

    Args:
        module: receives the weights.
        state: tensors by name.
        origin: where they come from, for messages.

    Returns:
        The same module.

    Raises:
        UnsupportedModelError: names or shapes differ.
    """
    wanted = module.state_dict()
    problems = [
        f"{title} {', '.join(names[:_MOST_NAMES])}{f' and {len(names) - _MOST_NAMES} more' if len(names) > _MOST_NAMES else ''}"
        for title, names in (
            ("missing", [name for name in wanted if name not in state]),
            ("unexpected", [name for name in state if name not in wanted]),
            ("of another shape", [_shapes(name, wanted, state) for name in wanted if _differs(name, wanted, state)]),
        )
        if names
    ]
    if problems:
        raise UnsupportedModelError(f"the weights in {origin} do not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(state)
    return module


def _differs(name: str, wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> bool:
    return name in state and state[name].shape != wanted[name].shape


def _shapes(name: str, wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    return f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"


def reject_non_finite(tensors: Mapping[str, torch.Tensor], model: str) -> None:
    """Refuse NaN and infinity, which would silently become a quantization range.

    Args:
        tensors: weights and buffers by name.
        model: the model's name, for messages.

    Raises:
        UnsupportedModelError: a tensor holds one; it is named.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise UnsupportedModelError(
                f"model {model}: {name} holds {count} NaN or infinite values of {value.numel()}; repair or retrain the weights"
            )


def hash_tensors(tensors: Mapping[str, torch.Tensor], structure: str) -> str:
    """Hash weights and structure.

    Args:
        tensors: weights and buffers by name.
        structure: text that changes when the computation does.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line of moderate length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
