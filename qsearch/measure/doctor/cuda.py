"""The path of a search for CUDA: driver, device, toolkit, a kernel that is compiled and, with a GPU, run."""

from __future__ import annotations

import ctypes
import importlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from qsearch.measure.doctor.check import Check, State, attempted

__all__ = ["Driver", "check_cuda", "check_driver", "check_toolkit", "open_driver"]

# Attributes of cuDeviceGetAttribute.
CLOCK_KHZ, MEMORY_CLOCK_KHZ, MAJOR, MINOR = 13, 36, 75, 76
# What the CUDA part of qsearch may bring: check_cubin(arch) compiles a test kernel to a cubin and says so in words,
# check_run() runs one on the device; both raise what is wrong.
HOOKS = "qsearch.build.cuda_toolkit"
NO_GPU = "measure on a machine with a GPU: qsearch pack --target cuda:ARCH --out kernels.pack here, python kernels.pack there"


@dataclass(frozen=True)
class Driver:
    """What NVIDIA's driver says.

    Attributes:
        version: Of CUDA that it supports, such as 12.4.
        devices: Name, arch, bytes of memory and clocks of every device, in words.
        archs: Arch of every device, such as sm_90.
    """

    version: tuple[int, int]
    devices: tuple[str, ...]
    archs: tuple[str, ...]


def check_cuda(target: str) -> list[Check]:
    """Look at everything that a search for CUDA needs.

    Args:
        target: What was asked about; unless it is CUDA, nothing of it that is missing is a problem.
    """
    wanted = target.partition(":")[0] == "cuda"
    missing: State = "problem" if wanted else "absent"
    driver = open_driver()
    found = check_driver(driver, missing)
    found += check_toolkit(driver if isinstance(driver, Driver) else None, missing)
    try:
        hooks: ModuleType | None = importlib.import_module(HOOKS)
    except ImportError:
        hooks = None
    arch = target.partition(":")[2] or (driver.archs[0] if isinstance(driver, Driver) and driver.archs else "sm_90")
    if hooks is None or not hasattr(hooks, "check_cubin"):
        return [
            *found,
            Check("test kernel for CUDA", missing, "this qsearch has no CUDA kernels", "install one that has", "cuda"),
        ]
    if any(one.name == "CUDA compiler" and one.state == "ok" for one in found) or wanted:
        found.append(attempted("test kernel for CUDA", "see the toolkit above", lambda: str(hooks.check_cubin(arch)), "cuda"))
    if isinstance(driver, Driver) and driver.archs and hasattr(hooks, "check_run"):
        found.append(attempted("test kernel on the GPU", "see driver and toolkit above", lambda: str(hooks.check_run()), "cuda"))
    return found


def open_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver | str:
    """Ask the driver; the reason why there is nothing to ask.

    Args:
        load: Loads a shared library by name.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return "no driver (libcuda.so.1) is installed"
    number, count = ctypes.c_int(), ctypes.c_int()
    if status := cuda.cuInit(0):
        return f"a driver is installed, and does not start (cuInit returns {status})"
    cuda.cuDriverGetVersion(ctypes.byref(number))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    supported = (number.value // 1000, number.value % 1000 // 10)
    found = [_device(cuda, index) for index in range(count.value)]
    return Driver(supported, tuple(words for words, _ in found), tuple(arch for _, arch in found))


def _device(cuda: Any, index: int) -> tuple[str, str]:
    """A device in words, and its arch."""
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        return value.value

    arch = f"sm_{attribute(MAJOR)}{attribute(MINOR)}"
    clocks = f"clocks up to {attribute(CLOCK_KHZ) / 1e6:.2f} GHz, memory {attribute(MEMORY_CLOCK_KHZ) / 1e6:.2f} GHz"
    return f"{name.value.decode(errors='replace')}, {arch}, {memory.value / 2**30:.1f} GiB, {clocks}", arch


def check_driver(driver: Driver | str, missing: State) -> list[Check]:
    """Driver and devices as findings."""
    if isinstance(driver, str):
        return [Check("NVIDIA driver", missing, driver, f"install NVIDIA's driver, or {NO_GPU}", "cuda")]
    found = [Check("NVIDIA driver", "ok", f"supports CUDA {driver.version[0]}.{driver.version[1]}{_clocks_now()}", part="cuda")]
    if not driver.devices:
        return [*found, Check("GPU", missing, "the driver sees none", NO_GPU, "cuda")]
    return [*found, *(Check(f"GPU {index}", "ok", words, part="cuda") for index, words in enumerate(driver.devices))]


def _clocks_now() -> str:
    """Driver's own version and the first device's clock at this moment, as NVML has them; '' without it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    text, handle, clock = ctypes.create_string_buffer(80), ctypes.c_void_p(), ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return ""
    words = f", version {text.value.decode(errors='replace')}"
    if not nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) and not nvml.nvmlDeviceGetClockInfo(
        handle, 1, ctypes.byref(clock)
    ):
        words += f", GPU 0 now at {clock.value / 1e3:.2f} GHz"
    return words


def check_toolkit(driver: Driver | None, missing: State) -> list[Check]:
    """The compiler of CUDA code: NVRTC from PyPI or nvcc; and whether the driver takes what it makes."""
    packages = {name: _version(name) for name in ("cuda-bindings", "nvidia-cuda-nvrtc")}
    nvcc = _nvcc()
    words = [f"{name} {found}" for name, found in packages.items() if found] + ([f"nvcc {nvcc}"] if nvcc else [])
    remedy = "pip install cuda-bindings nvidia-cuda-nvrtc, or install NVIDIA's toolkit with nvcc"
    if not all(packages.values()) and not nvcc:
        return [Check("CUDA compiler", missing, ", ".join(words) or "neither NVRTC nor nvcc found", remedy, "cuda")]
    found = [Check("CUDA compiler", "ok", ", ".join(words), part="cuda")]
    made = (packages["nvidia-cuda-nvrtc"] if all(packages.values()) else nvcc) or ""
    if driver is not None and made and int(made.split(".")[0]) > driver.version[0]:
        text = f"the toolkit is of CUDA {made} and the driver supports {driver.version[0]}.{driver.version[1]}"
        older = f"update the driver, or pip install 'nvidia-cuda-nvrtc<{driver.version[0] + 1}' and cuda-bindings to match"
        found.append(Check("driver against toolkit", "problem", text, older, "cuda"))
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    """Version of nvcc; None where there is none."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else None
