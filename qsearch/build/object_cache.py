"""Kernels as object files only, for targets whose code this machine cannot run, and the linker that joins them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qsearch.build.cache import CompiledKernel, KernelCache, static_modules
from qsearch.build.digests import objects_are_whole
from qsearch.build.target import Target, host_architecture
from qsearch.errors import BuildError, ToolchainError
from qsearch.kernels.description import Kernel

__all__ = ["ObjectCache", "cache_for", "compiler_for", "link_for"]


class ObjectCache(KernelCache):
    """A kernel cache that loads nothing: what it gives can be planned with, linked and exported, not run.

    It shares its folder, and the object files in it, with caches that do load.
    """

    def _load(self, symbol: str) -> bool:
        if not objects_are_whole(self.directory, symbol):
            return False
        self._loaded[symbol] = CompiledKernel(symbol, self.directory / f"{symbol}.o", None)
        return True

    def _compile(self, kernels: dict[str, Kernel]) -> None:
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".batch-") as scratch:
            self._make_objects(Path(scratch), kernels)
        for symbol in kernels:
            self._load(symbol)


def compiler_for(target: Target) -> str:
    """The C++ compiler that links for a target's architecture.

    Raises:
        ToolchainError: None is installed.
    """
    from tvm.support import cc

    own = target.architecture == host_architecture()
    found = cc.get_cc() if own else shutil.which(f"{target.architecture}-linux-gnu-g++")
    if found:
        return str(found)
    if own:
        raise ToolchainError("no C++ compiler found to link kernels with: install g++ or clang++, or set CXX to one")
    raise ToolchainError(
        f"no linker for {target.architecture} found: install {target.architecture}-linux-gnu-g++ (Debian's "
        f"g++-{target.architecture.replace('_', '-')}-linux-gnu), or run the command on such a machine"
    )


def cache_for(directory: Path, target: Target) -> KernelCache:
    """A cache of kernels that need not run here.

    Those for GPUs are loaded all the same: what launches them is this machine's code, and they are part of what is loaded.
    """
    return KernelCache(directory, target) if target.arch else ObjectCache(directory, target)


def link_for(target: Target, output: Path, kernels: Sequence[CompiledKernel]) -> None:
    """Link kernels into a shared library for a target.

    Raises:
        BuildError: Linking fails.
        ToolchainError: There is no linker for it.
    """
    from tvm.support import cc

    compiler = compiler_for(target)
    try:
        if target.arch:
            objects = {kernel.symbol: kernel.object_path for kernel in kernels}
            static_modules(objects, {kernel.symbol: kernel.gpu_module for kernel in kernels}).export_library(str(output))
            return
        cc.create_shared(str(output), [str(kernel.object_path) for kernel in kernels], cc=compiler)
    except RuntimeError as error:
        raise BuildError(f"linking {output.name} failed: {str(error).strip().splitlines()[-1]}") from error
