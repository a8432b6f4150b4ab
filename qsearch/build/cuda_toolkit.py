"""The CUDA compiler and runtime: what turns CUDA C++ into a cubin, with or without a GPU in the machine.

TVM embeds a cubin in a module only where its CUDA runtime is loaded, and that needs `libcuda.so.1`, which is part of the
driver. On a machine without a driver a stub of that library, which answers every call with 'no device', is compiled and
loaded in its place; a real driver is always preferred.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qsearch.errors import BuildError, ToolchainError

__all__ = [
    "CudaCompiler",
    "cuda_driver",
    "compiler_digest",
    "find_compiler",
    "gpu_architecture",
    "gpu_present",
    "last_cubin",
    "load_cuda_runtime",
]

INSTALL = "pip install 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cuda-runtime==13.0.*', or put the CUDA toolkit's nvcc on the PATH"
# Every function of the driver's interface that TVM's runtime binds when it is loaded; error 100 is CUDA_ERROR_NO_DEVICE.
_STUBBED = (
    *("cuInit", "cuDeviceGetName", "cuFuncSetAttribute", "cuLaunchKernelEx", "cuModuleGetFunction", "cuModuleLoadData"),
    *("cuModuleUnload", "cuTensorMapEncodeTiled"),
)
_STUB = (
    "".join(f"int {name}(void) {{ return 100; }}\n" for name in _STUBBED)
    + 'int cuGetErrorName(int code, const char **text) { *text = "no CUDA driver"; return 0; }\n'
    + 'int cuGetErrorString(int code, const char **text) { *text = "no CUDA driver is installed"; return 0; }\n'
)
# Of the C++ library TVM's prelude asks for these names only; NVRTC finds them here instead of in a toolkit.
_HEADERS = {
    "cuda/std/cstdint": """
namespace cuda { namespace std {
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t;
typedef unsigned int uint32_t; typedef unsigned long long uint64_t;
} }
""",
    # Declared for the prelude's using-declarations; whoever needs one fails to compile instead of getting a wrong answer.
    "cuda/std/type_traits": """
namespace cuda { namespace std {
template <class A, class B> struct is_same; template <class A, class B> struct is_same_v;
template <class T> struct is_integral; template <class T> struct is_signed; template <class T> struct is_unsigned;
template <class T> struct is_floating_point; template <bool B, class T = void> struct enable_if;
template <bool B, class T, class F> struct conditional;
} }
""",
}
# Products and sums are rounded one by one, as the reference does, and never fused into one operation.
_OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler of CUDA C++.

    Attributes:
        kind: 'nvrtc' or 'nvcc'.
        path: The library or the program.
        version: (major, minor) of its CUDA release.
    """

    kind: str
    path: str
    version: tuple[int, int]

    def cubin(self, source: str, arch: str) -> bytes:
        """Compile.

        Args:
            source: CUDA C++.
            arch: Such as 'sm_90'.

        Raises:
            BuildError: It does not compile.
        """
        return _nvrtc_cubin(self.path, source, arch) if self.kind == "nvrtc" else _nvcc_cubin(self.path, source, arch)


@cache
def find_compiler() -> CudaCompiler:
    """NVRTC from PyPI's package or the toolkit, else nvcc.

    Raises:
        ToolchainError: There is neither.
    """
    for path in _nvrtc_candidates():
        try:
            # NVRTC opens its other half by name only, which works once that has been loaded.
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(path)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return CudaCompiler("nvrtc", path, (major.value, minor.value))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(_toolkit(), "bin"))
    if nvcc:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+)\.(\d+)", told)
        if release:
            return CudaCompiler("nvcc", nvcc, (int(release[1]), int(release[2])))
    raise ToolchainError(f"no CUDA compiler found: {INSTALL}")


def _toolkit() -> str:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"


def _package_folders() -> Iterator[Path]:
    """Where PyPI's packages of NVIDIA lie."""
    for entry in sys.path:
        yield from sorted(Path(entry or ".").glob("nvidia/cu[0-9]*"), reverse=True)
        yield from sorted(Path(entry or ".").glob("nvidia/cuda_nvrtc"))


def _nvrtc_candidates() -> Iterator[str]:
    for folder in _package_folders():
        yield from sorted(str(path) for path in folder.glob("lib/libnvrtc.so.*"))
    yield from sorted(glob.glob(f"{_toolkit()}/lib64/libnvrtc.so*"))
    yield "libnvrtc.so"


@cache
def _include_folders() -> tuple[str, ...]:
    """Folders that hold cuda_fp16.h."""
    folders = [folder / "include" for folder in _package_folders()]
    folders += [Path(entry or ".") / "nvidia/cuda_runtime/include" for entry in sys.path]
    folders.append(Path(_toolkit()) / "include")
    return tuple(str(folder) for folder in folders if (folder / "cuda_fp16.h").is_file())


def _nvrtc_cubin(path: str, source: str, arch: str) -> bytes:
    library = ctypes.CDLL(path)
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
    texts = (ctypes.c_char_p * len(_HEADERS))(*(text.encode() for text in _HEADERS.values()))
    status = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", len(_HEADERS), texts, names)
    if status:
        raise BuildError(f"NVRTC {path} cannot be used (status {status}); {INSTALL}")
    try:
        options = [*_OPTIONS, f"--gpu-architecture={arch}", *(f"--include-path={folder}" for folder in _include_folders())]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise BuildError(f"NVRTC refuses a kernel for {arch}: {_nvrtc_text(library, program, 'ProgramLog').strip()[-1500:]}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, data)
        return data.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(max(size.value, 1))
    getattr(library, f"nvrtcGet{what}")(program, data)
    return data.value.decode(errors="replace")


def _nvcc_cubin(path: str, source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        given.write_text(source, encoding="utf-8")
        command = [path, "--cubin", "-O3", "-std=c++17", "--fmad=false", f"-arch={arch}", "-o", str(made), str(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"nvcc refuses a kernel for {arch}: {(done.stderr or done.stdout).strip()[-1500:]}")
        return made.read_bytes()


@cache
def cuda_driver() -> str | None:
    """Name of the installed driver's library; None where there is none.

    Only by the name that drivers install: libcuda.so may be the one that the toolkit has for linking.
    """
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return "libcuda.so.1"


@cache
def load_cuda_runtime() -> None:
    """Make TVM able to embed cubins, and to run them where there is a GPU.

    Raises:
        ToolchainError: There is no CUDA compiler, no C compiler for the stub, or TVM has no CUDA runtime.
    """
    import tvm
    import tvm_ffi

    find_compiler()
    if not _registered():
        # TVM tried when it was imported. Without a driver its library could not be loaded.
        if cuda_driver() is None:
            _load_stub()
        library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
        try:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ToolchainError(
                f"TVM's CUDA runtime cannot be loaded: {error}; install the apache-tvm wheel for Linux"
            ) from error
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile, override=True)


def _registered() -> bool:
    """Whether TVM's CUDA runtime is loaded."""
    import tvm_ffi

    return tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None


# The binary that this thread compiled last: TVM keeps it where Python cannot read it.
_last = threading.local()


def _compile(source: str) -> bytes:
    """What TVM's code generator calls."""
    from tvm.target import Target

    _last.cubin = find_compiler().cubin(source, str(Target.current().attrs["arch"]))
    return bytes(_last.cubin)


def last_cubin() -> bytes:
    """What the calling thread compiled last."""
    return bytes(_last.cubin)


def _load_stub() -> None:
    """Compile the stub of the driver's library and load it; it is not left on the disk, so that nothing else can find it."""
    from tvm.support import cc

    compiler = cc.get_cc()
    if not compiler:
        raise ToolchainError("no C++ compiler found: install g++ or clang++, or set CXX to one")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
        source.write_text(_STUB, encoding="ascii")
        command = [compiler, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolchainError(f"the stub of the CUDA driver does not compile: {done.stderr.strip()[-300:]}")
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@cache
def gpu_present() -> bool:
    """Whether a GPU can be used."""
    import tvm

    load_cuda_runtime()
    return bool(tvm.cuda(0).exist)


@cache
def gpu_architecture() -> str | None:
    """Architecture of the first GPU, such as 'sm_90'; None where there is none that can be used."""
    import tvm

    if not gpu_present():
        return None
    return "sm_" + str(tvm.cuda(0).compute_version).replace(".", "")


def compiler_digest() -> str:
    """What of the compiler decides the code: its kind, its release and the options."""
    compiler = find_compiler()
    return hashlib.sha256(repr((compiler.kind, compiler.version, _OPTIONS)).encode()).hexdigest()[:12]
