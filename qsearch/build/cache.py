"""The kernel cache: every kernel is compiled once and kept on disk by content.

Beside every file lies its SHA-256. A file that no longer has it, after a power cut or on a dying disk, counts as missing.

A kernel's symbol is a digest of everything that determines its code: the operation, the variant, the target,
the generator's own source and the TVM version. Its object file is what search loads and what export links, so
that the code that was measured is the code that is shipped. Scales and zero points are arguments, never part
of the code.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qsearch.build.claims import make_once
from qsearch.build.cuda_toolkit import compiler_digest, last_cubin
from qsearch.build.digests import is_whole, objects_are_whole, record_digests, recorded_digests
from qsearch.build.target import Target
from qsearch.errors import BuildError, ToolchainError, UsageError
from qsearch.kernels.description import Kernel
from qsearch.whole_files import make_folder, put_in_place

__all__ = ["FOREIGN", "CompiledKernel", "KernelCache", "compile_kernel", "kernel_symbol", "link_shared", "static_modules"]

# Less than this left on the disk explains a failed link.
LEAST_FREE_BYTES = 4 * 1024 * 1024
# What the variant of a kernel begins with that TVM wrote, not qsearch.
FOREIGN = "foreign"
_LOWERING = {"tirx.disable_storage_rewrite": True, "tirx.disable_assert": True}
_SKIPPED = ["s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse", "tirx.RemoveNoOp", "tirx.CommonSubexprElim"]


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel on disk.

    Attributes:
        symbol: Its name in the object file and in the Relax module.
        object_path: Relocatable object file, for linking.
        library: The loaded runtime module that holds it.
        library_path: The file of that.
    """

    symbol: str
    object_path: Path
    library: Any
    library_path: Path | None = None

    @property
    def gpu_module(self) -> Any:
        """The CUDA module that holds it; its object file holds what launches it."""
        return next(module for module in self.library.imports if module.implements_function(f"{self.symbol}_kernel"))


def kernel_symbol(kernel: Kernel, target: Target) -> str:
    """The content-derived name of a kernel."""
    import tvm

    compiled = (target.mcpu, target.triple, target.threads, *((target.arch, compiler_digest()) if target.arch else ()))
    content = repr((kernel.key, kernel.variant, *compiled, tvm.__version__, _generator_digest(target.device)))
    return "qs_" + hashlib.sha256(content.encode()).hexdigest()[:24]


@cache
def _generator_digest(device: str) -> str:
    """Digest of the source that writes a device's kernels: an edited generator never meets a stale kernel."""
    root = Path(__file__).parent.parent
    files = sorted((root / "kernels" / device).rglob("*.py"))
    files += [root / "kernels" / name for name in ("description.py", "prim_func.py")]
    files += [root / "qtype.py", root / "quantize" / "program.py"]
    files += [Path(__file__).parent / name for name in ("cache.py", "foreign.py", "target.py")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class KernelCache:
    """Kernels of one target, on disk and loaded.

    Args:
        directory: Where kernels are kept; created if absent. Processes may share it.
        target: What to compile for.
    """

    def __init__(self, directory: Path, target: Target) -> None:
        self.directory, self.target = directory, target
        self._loaded: dict[str, CompiledKernel] = {}
        self._libraries: dict[str, Any] = {}
        try:
            make_folder(directory)
        except OSError as error:
            raise UsageError(
                f"cannot create the kernel cache {directory}: {error.strerror}; run qsearch in a folder you can write to"
            ) from error

    def get(self, kernels: Iterable[tuple[str, Kernel]]) -> dict[str, CompiledKernel]:
        """Compile what is missing, load what is not loaded.

        Args:
            kernels: (symbol, kernel) pairs; symbols may repeat.

        Returns:
            Symbol -> compiled kernel.

        Raises:
            BuildError: A kernel does not compile.
            OSError: The cache cannot be written; that is no configuration's fault, so it is no TrialError.
        """
        wanted = dict(kernels)
        missing = {symbol: kernel for symbol, kernel in wanted.items() if symbol not in self._loaded and not self._load(symbol)}
        if missing:
            self._compile(missing)
        return {symbol: self._loaded[symbol] for symbol in wanted}

    def _load(self, symbol: str) -> bool:
        """Load a kernel from disk; a batch library carries the kernels that were compiled together."""
        import tvm

        pointed = recorded_digests(self.directory / f"{symbol}.lib")
        if len(pointed) != 1 or not objects_are_whole(self.directory, symbol):
            return False
        ((name, digest),) = pointed.items()
        if name not in self._libraries:
            path = self.directory / name
            # Checked before it is loaded: the process may die of reading a damaged one.
            if not is_whole(path, digest):
                return False
            try:
                self._libraries[name] = tvm.runtime.load_module(str(path))
            except (RuntimeError, OSError):
                # A library that cannot be used here is compiled anew under the same name.
                return False
        library = self._libraries[name]
        self._loaded[symbol] = CompiledKernel(symbol, self.directory / f"{symbol}.o", library, self.directory / name)
        return True

    def _compile(self, kernels: dict[str, Kernel]) -> None:
        """Link the objects of kernels into one library, then publish it by renaming."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".batch-") as scratch_name:
            scratch = Path(scratch_name)
            on_gpu = self._make_objects(scratch, kernels)
            name = "lib_" + hashlib.sha256(" ".join(sorted(kernels)).encode()).hexdigest()[:24] + ".so"
            objects = {symbol: self.directory / f"{symbol}.o" for symbol in kernels}
            if on_gpu:
                static_modules(objects, on_gpu).export_library(str(scratch / name))
            else:
                link_shared(scratch / name, list(objects.values()))
            for symbol in kernels:
                record_digests(scratch / f"{symbol}.lib", [scratch / name])
            # Pointers go last: whoever finds one finds everything it points to.
            for file in (name, *(f"{symbol}.lib" for symbol in kernels)):
                put_in_place(scratch / file, self.directory / file, durable=False)
        for symbol in kernels:
            if not self._load(symbol):
                raise BuildError(f"kernel {symbol} vanished from the cache {self.directory} while it was being written")

    def _make_objects(self, scratch: Path, kernels: dict[str, Kernel]) -> dict[str, Any]:
        """Compile kernels to object files, each published by renaming; those that others are at are waited for.

        Returns:
            Symbol -> CUDA module. It is needed to link, and the process that has compiled it has it: for GPUs all are compiled.
        """
        on_gpu: dict[str, Any] = {}

        def make(symbol: str) -> None:
            module = compile_kernel(kernels[symbol], symbol, self.target)
            files = [f"{symbol}.o"]
            module.mod.write_to_file(str(scratch / files[0]), "o")
            if self.target.arch:
                files.append(f"{symbol}.cubin")
                (scratch / files[1]).write_bytes(last_cubin())
                on_gpu[symbol] = module.mod.imports[0]
            record_digests(scratch / f"{symbol}.sha256", [scratch / file for file in files])
            # Digests go first: a process that is killed in between leaves a file that is missing, not one that looks damaged.
            for file in (f"{symbol}.sha256", *files):
                put_in_place(scratch / file, self.directory / file, durable=False)

        # TVM leaves Python's lock while LLVM works.
        threads = len(_processors())
        if self.target.arch:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(make, kernels))
        else:
            make_once(self.directory, kernels, lambda symbol: objects_are_whole(self.directory, symbol), make, threads)
        return on_gpu


def static_modules(objects: dict[str, Path], on_gpu: dict[str, Any]) -> Any:
    """Object files that launch GPU kernels, and these kernels, as one module that can be exported.

    Args:
        objects: Symbol -> its object file.
        on_gpu: Symbol -> the CUDA module that it launches.
    """
    import tvm

    modules = []
    for symbol, path in objects.items():
        modules.append(tvm.runtime.load_static_library(str(path), [symbol]))
        modules[-1].import_module(on_gpu[symbol])
    for module in modules[1:]:
        modules[0].import_module(module)
    return modules[0]


def compile_kernel(kernel: Kernel, symbol: str, target: Target) -> Any:
    """Compile one kernel to a TVM executable.

    Without TVM's storage rewriting, which forgets that registers are to stay on the stack (see `registers`), and without its
    checks of every argument: they take three quarters of the code and a third of the time to compile it. Only the
    executable calls kernels, with what it was linked with; it checks its own input.

    Raises:
        BuildError: TVM or LLVM refuses it.
    """
    import tvm

    compiled: Any = target.tvm()
    # TVM's callbacks ask for the target of the scope; those of a GPU need to know its architecture.
    scope: Any = compiled if target.arch else nullcontext()
    # The first takes most of the time that large kernels for GPUs need, and finds nothing to cut there: see `simt._whole`. What
    # the others do the compiler of CUDA C++ does as well: the machine code is the same.
    foreign = kernel.variant[:1] == (FOREIGN,)
    skipped = [] if not target.arch else _SKIPPED[:1] if foreign else _SKIPPED
    try:
        with tvm.transform.PassContext(config=_LOWERING, disabled_pass=skipped), scope:
            module = tvm.IRModule({symbol: kernel.generate(symbol)})
            if target.arch and foreign:
                # Loops of TVM's own know of no threads yet.
                module = tvm.s_tir.transform.DefaultGPUSchedule()(module)
            return tvm.compile(module, target=compiled)
    except (RuntimeError, TypeError, ValueError) as error:  # what TVM raises for its own failures
        key, reason = kernel.key, (str(error).strip().splitlines() or [type(error).__name__])[-1]
        what = f"{key.kind} {key.precision or ''} {key.shapes[0]} -> {key.shapes[-1]}"
        raise BuildError(f"kernel {symbol} ({what}, {target.arch or target.isa.name}) does not compile: {reason}") from error


def _processors() -> set[int]:
    """Processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def link_shared(output: Path, objects: list[Path]) -> None:
    """Link object files into a shared library.

    Raises:
        BuildError: Linking fails.
        ToolchainError: No C++ compiler is installed.
        OSError: The disk is full.
    """
    from tvm.support import cc

    if not cc.get_cc():
        raise ToolchainError("no C++ compiler found to link kernels with: install g++ or clang++, or set CXX to one")
    try:
        cc.create_shared(str(output), [str(path) for path in objects])
    except RuntimeError as error:
        if shutil.disk_usage(output.parent).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(output)) from error
        raise BuildError(f"linking {output.name} failed: {str(error).strip().splitlines()[-1]}") from error
