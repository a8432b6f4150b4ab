"""A compiled module on its way between machines that share no cache: the executable and its kernels, as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsearch.build.digests import is_as_named, short_digest
from qsearch.build.packed import PackedModule
from qsearch.whole_files import write_whole

__all__ = ["TravellingModule"]


@dataclass(frozen=True)
class TravellingModule:
    """A linked module on its way between machines.

    Attributes:
        executable: The Relax executable's file; weights are in it.
        libraries: The kernels' shared libraries, by the names of their files.
        device: 'cpu' or 'cuda'.
    """

    executable: bytes
    libraries: Mapping[str, bytes]
    device: str

    @classmethod
    def of(cls, packed: PackedModule) -> TravellingModule:
        """Take a packed module along, its file with it."""
        try:
            libraries = {file.name: file.read_bytes() for file in packed.libraries}
            return cls(packed.file.read_bytes(), libraries, packed.device)
        finally:
            packed.file.unlink(missing_ok=True)

    def unpack(self, folder: Path) -> PackedModule:
        """Lay it down in a folder; kernels that lie there already are left alone."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [_laid_down(folder, Path(name).stem, ".so", content) for name, content in self.libraries.items()]
        return PackedModule(_laid_down(folder, "module", ".module", self.executable), tuple(paths), False, self.device)


def _laid_down(folder: Path, name: str, suffix: str, content: bytes) -> Path:
    """A file whose name has the digest of its content."""
    path = folder / f"{name[:80]}-{short_digest(content)}{suffix}"
    # What a power cut has left of one would be loaded as code.
    if not is_as_named(path):
        with write_whole(path, durable=False) as stream:
            stream.write(content)
    return path
