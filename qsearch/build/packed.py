"""A compiled module on its way between processes: the Relax executable as a file, its kernels by name.

Kernels are not sent: both processes share the kernel cache, and loaded libraries cannot be written out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from qsearch.build.cuda_toolkit import load_cuda_runtime
from qsearch.build.link import CompiledModule
from qsearch.build.machine import Machine
from qsearch.errors import BuildError

__all__ = ["PackedModule", "pack_module"]


@dataclass(frozen=True)
class PackedModule:
    """A module without its kernels.

    Attributes:
        file: The Relax executable; weights are in it.
        libraries: The kernels' shared libraries, in the kernel cache.
        kept: Whether the file stays when it has been loaded.
        device: 'cpu' or 'cuda'.
    """

    file: Path
    libraries: tuple[Path, ...]
    kept: bool = False
    device: str = "cpu"

    def open(self) -> Machine:
        """A virtual machine of its own, on the device that it was compiled for.

        Raises:
            BuildError: The module cannot be loaded.
        """
        if self.device == "cuda":
            load_cuda_runtime()
        return Machine(self._module, self.device)

    @cached_property
    def _module(self) -> Any:
        """The TVM module, its kernels imported."""
        import tvm_ffi

        try:
            module = tvm_ffi.get_global_func("ffi.Module.load_from_file.relax.VMExecutable")(str(self.file))
            for library in self.libraries:
                module.import_module(_library(library))
        except (RuntimeError, OSError) as error:
            raise BuildError(f"the linked module {self.file} cannot be loaded: {str(error).strip().splitlines()[-1]}") from error
        finally:
            if not self.kept:
                self.file.unlink(missing_ok=True)
        return module


def pack_module(module: CompiledModule, file: Path, kept: bool = False) -> PackedModule:
    """Write a module to a file.

    Args:
        module: The module.
        file: Where to write.
        kept: Whether the file stays when it has been loaded.
    """
    module.executable.mod.write_to_file(str(file), "")
    libraries = dict.fromkeys(kernel.library_path for kernel in module.kernels if kernel.library_path is not None)
    return PackedModule(file, tuple(libraries), kept, module.device)


@cache
def _library(path: Path) -> Any:
    """A library of kernels, loaded once."""
    import tvm

    return tvm.runtime.load_module(str(path))
