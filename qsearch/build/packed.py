"""A compiled module on its way between processes: the Relax executable as a file, its kernels by name.

Kernels are not sent: both processes share the kernel cache, and loaded libraries cannot be written out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qsearch.build.link import CompiledModule
from qsearch.errors import BuildError

__all__ = ["PackedModule", "pack_module", "unpack_module"]


@dataclass(frozen=True)
class PackedModule:
    """A module without its kernels.

    Attributes:
        file: The Relax executable; weights are in it.
        libraries: The kernels' shared libraries, in the kernel cache.
    """

    file: Path
    libraries: tuple[Path, ...]


def pack_module(module: CompiledModule, file: Path) -> PackedModule:
    """Write a module to a file.

    Args:
        module: The module.
        file: Where to write; its folder is made if it is not there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    module.executable.mod.write_to_file(str(file), "")
    pointers = (kernel.object_path.with_suffix(".lib") for kernel in module.kernels)
    libraries = dict.fromkeys(pointer.parent / pointer.read_text(encoding="ascii").strip() for pointer in pointers)
    return PackedModule(file, tuple(libraries))


def unpack_module(packed: PackedModule) -> Any:
    """Load a module that another process has packed, and delete its file.

    Returns:
        The TVM module, its kernels imported.

    Raises:
        BuildError: It cannot be loaded.
    """
    import tvm_ffi

    try:
        module = tvm_ffi.get_global_func("ffi.Module.load_from_file.relax.VMExecutable")(str(packed.file))
        for library in packed.libraries:
            module.import_module(_library(library))
    except (RuntimeError, OSError) as error:
        raise BuildError(f"the linked module {packed.file} cannot be loaded: {str(error).strip().splitlines()[-1]}") from error
    finally:
        packed.file.unlink(missing_ok=True)
    return module


@cache
def _library(path: Path) -> Any:
    """A library of kernels, loaded once."""
    import tvm

    return tvm.runtime.load_module(str(path))
