"""The path of a search for CUDA: driver, device, toolkit, a kernel that is compiled and, with a GPU, run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qsearch.build.cuda_toolkit import find_compiler
from qsearch.errors import ToolchainError
from qsearch.measure.doctor import gpu_kernel
from qsearch.measure.doctor.check import Check, State, attempted

__all__ = ["Driver", "check_cuda", "check_driver", "check_toolkit", "open_driver"]

# Attributes of cuDeviceGetAttribute.
CLOCK_KHZ, MEMORY_CLOCK_KHZ, MAJOR, MINOR = 13, 36, 75, 76
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
    arch = target.partition(":")[2] or (driver.archs[0] if isinstance(driver, Driver) and driver.archs else "sm_90")
    if any(one.name == "CUDA compiler" and one.state == "ok" for one in found) or wanted:
        found.append(attempted("test kernel for CUDA", "see the toolkit above", lambda: gpu_kernel.check_cubin(arch), "cuda"))
    if isinstance(driver, Driver) and driver.archs:
        found.append(attempted("test kernel on the GPU", "see driver and toolkit above", gpu_kernel.check_run, "cuda"))
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
    try:
        compiler = find_compiler()
    except ToolchainError as error:
        return [Check("CUDA compiler", missing, "neither NVRTC nor nvcc found", str(error).partition(": ")[2], "cuda")]
    made = compiler.version
    found = [Check("CUDA compiler", "ok", f"{compiler.kind} {made[0]}.{made[1]}, {compiler.path}", part="cuda")]
    if driver is not None and made[0] > driver.version[0]:
        text = f"the toolkit is of CUDA {made[0]}.{made[1]} and the driver supports {driver.version[0]}.{driver.version[1]}"
        older = f"update the driver, or pip install 'nvidia-cuda-nvrtc<{driver.version[0] + 1}' to match"
        found.append(Check("driver against toolkit", "problem", text, older, "cuda"))
    return found
