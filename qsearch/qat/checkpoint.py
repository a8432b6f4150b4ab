"""Checkpoints of a training: one folder, tensors as safetensors, the rest as JSON.

The JSON file is the last to be written and names the tensors' file with its digest: a process that is killed at any moment
leaves the checkpoint before or the one after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load, save
from torch import Tensor

from qsearch.errors import StudyError, StudyMismatchError
from qsearch.whole_files import make_folder, remove_strays, write_whole

__all__ = ["Checkpoint", "CheckpointFolder", "Epoch"]

_FORMAT, _VERSION = "qsearch-finetuning", 1
_TABLE = "checkpoint.json"


@dataclass(frozen=True)
class Epoch:
    """What an epoch showed.

    Attributes:
        loss: Mean loss over its batches; None before the first.
        validation_top1: Percent of the validation images that are right at its end.
        processor_seconds: What it took of processors, validation included.
    """

    loss: float | None
    validation_top1: float
    processor_seconds: float


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A training after some of its epochs.

    Attributes:
        tensors: All that is trained, and the optimizer's own, by name.
        epochs: What was seen before the first epoch, and in every one since.
    """

    tensors: Mapping[str, Tensor]
    epochs: tuple[Epoch, ...]

    @property
    def done(self) -> int:
        """Number of epochs done."""
        return len(self.epochs) - 1


class CheckpointFolder:
    """The folder of one training.

    Args:
        path: The folder.
        identity: What the training depends on: what it is called -> its value, all of them text.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path, self._identity = path, dict(identity)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            StudyError: One is at work there, or the folder cannot be written.
        """
        try:
            make_folder(self.path)
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise StudyError(f"another process is training in {self.path}: wait for it, or give another --checkpoint") from None
        except FileExistsError as error:
            raise StudyError(f"{self.path} is not a directory: give another --checkpoint") from error

    def load(self) -> Checkpoint | None:
        """The checkpoint, if there is one.

        Raises:
            StudyMismatchError: It is of another training; the message says in what they differ.
            StudyError: It is damaged.
        """
        table = self.path / _TABLE
        if not table.exists():
            return None
        try:
            found = json.loads(table.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT or found["version"] != _VERSION:
                raise ValueError("another format")
            self._require_same(found["identity"])
            content = (self.path / found["tensors"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != found["sha256"]:
                raise ValueError("another digest")
            return Checkpoint(load(content), tuple(Epoch(**epoch) for epoch in found["epochs"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(
                f"the checkpoint in {self.path} is damaged ({error}): remove that folder to train from the start, or give "
                "another --checkpoint"
            ) from error

    def _require_same(self, found: Mapping[str, str]) -> None:
        names = dict.fromkeys((*self._identity, *found))
        other = [name for name in names if found.get(name) != self._identity.get(name)]
        if other:
            shown = "; ".join(f"{name} was {_short(found.get(name))}, is {_short(self._identity.get(name))}" for name in other)
            raise StudyMismatchError(
                f"{self.path} holds the checkpoint of another fine-tuning: {shown}. Give another --checkpoint, or leave it out"
            )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in place of the one before.

        Raises:
            StudyError: It cannot be written; the one before is kept.
        """
        content = save({name: value.contiguous() for name, value in checkpoint.tensors.items()})
        name = f"epoch-{checkpoint.done}.safetensors"
        document: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": self._identity,
            "epochs": [asdict(epoch) for epoch in checkpoint.epochs],
            "tensors": name,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        try:
            for file, written in ((name, content), (_TABLE, (json.dumps(document, indent=1) + "\n").encode())):
                remove_strays(self.path / file)
                with write_whole(self.path / file) as stream:
                    stream.write(written)
            for other in self.path.glob("epoch-*.safetensors"):
                if other.name != name:
                    other.unlink(missing_ok=True)
        except OSError as error:
            raise StudyError(
                f"cannot write the checkpoint in {self.path}: {error.strerror or error}; free some space and run the same "
                "command again, it goes on after the last epoch that was kept"
            ) from error


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) < 20 else value[:12]
