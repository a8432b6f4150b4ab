"""CUDA kernels compiled for several architectures without a GPU: they build, and nothing of theirs lies in local memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qsearch.build.cache import compile_kernel
from qsearch.build.cuda_toolkit import find_compiler, last_cubin
from qsearch.build.target import open_target
from qsearch.errors import ToolchainError
from qsearch.models.graph import Conv, Matmul, Pool
from qsearch.quantize.program import OpKey

U8, I16, F8, F16, F32 = "uint8", "int16", "float8_e4m3fn", "float16", "float32"
IMAGE, LARGE = (1, 14, 14, 96), (32, 28, 28, 96)
SAME, WIDE = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 96), ((7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 96)
PRODUCT = Matmul((2, 3, 49, 49, 32), (0, 14112, 32, 288, 1), (96, 14112, 32, 1, 288), (0, 7203, 2401, 49, 1))


def layer(image, precision, geometry, dtypes, residual=False):
    shapes = (image, image, image) if residual else (image, image)
    return OpKey("conv2d", shapes, dtypes, precision, Conv(*geometry), residual=residual, clips_channels=residual)


def of_rows(kind, dtypes, *constants):
    return OpKey(kind, ((4, 197, 768), *constants, (4, 197, 768)), dtypes, epsilon=1e-5)


KEYS = {
    "depthwise int8": layer(IMAGE, "int8", SAME, (U8, U8)),
    "depthwise int8, large": layer(LARGE, "int8", SAME, (U8, U8)),
    "depthwise int8, residual": layer(LARGE, "w4a8", WIDE, (U8, U8, U8), True),
    "depthwise int16": layer(LARGE, "int16", SAME, (I16, I16)),
    "depthwise fp16": layer(LARGE, "fp16", WIDE, (F16, F16)),
    "depthwise fp8": layer(LARGE, "fp8", SAME, (F8, F8)),
    "depthwise fp32": layer(LARGE, "fp32", SAME, (F32, F32)),
    "maximum": OpKey("max_pool2d", (IMAGE, (1, 7, 7, 96)), (U8, U8), pool=Pool((3, 3), (2, 2), (1, 1, 1, 1))),
    "average": OpKey("avg_pool2d", (IMAGE, IMAGE), (F16, F16), pool=Pool((3, 3), (1, 1), (1, 1, 1, 1), False)),
    "global average": OpKey("avg_pool2d", (IMAGE, (1, 1, 1, 96)), (U8, U8), pool=Pool((14, 14), (14, 14))),
    "concat": OpKey("concat", (IMAGE, IMAGE, (1, 14, 14, 192)), (U8, U8, U8), copies=(True, False)),
    "selection": OpKey("concat", (IMAGE, (1, 14, 14, 32)), (F16, F16), copies=(True,), channels=tuple(range(0, 96, 3))),
    "image": OpKey("to_channels_last", ((1, 3, 96, 96), (1, 96, 96, 3)), (F32, U8)),
    "channels last": OpKey("to_channels_last", ((1, 96, 14, 14), IMAGE), (F32, F16)),
    "channels first": OpKey("to_channels_first", (IMAGE, (1, 96, 14, 14)), (U8, U8)),
    "product int8": OpKey("matmul", ((2, 49, 288), (2, 49, 288), (14406,)), (U8, U8, U8), "int8", matmul=PRODUCT),
    "product fp16": OpKey("matmul", ((2, 49, 288), (2, 49, 288), (14406,)), (F16, F16, F16), "fp16", matmul=PRODUCT),
    "gather": OpKey("gather", ((1, 56, 56, 96), (3136, 96)), (U8, U8), padded=True),
    "layer norm": of_rows("layer_norm", (F16, U8), (768,), (768,)),
    "softmax": of_rows("softmax", (F32, U8)),
    "softmax fp8": of_rows("softmax", (F16, F8)),
    "long softmax": OpKey("softmax", ((1, 1, 30_000),) * 2, (F32, F32)),
    "normalisation": of_rows("l2_normalize", (U8, F32)),
    "scale": of_rows("scale", (U8, U8), (768,)),
    "shift": of_rows("shift", (F32, F16), (1,)),
}
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
# Fast to compile, and between them most of what kernels are made of.
QUICK = {("depthwise int8", "sm_90"), ("product int8", "sm_80"), ("softmax", "sm_75"), ("channels last", "sm_90")}
# TVM has float8 in vectors only where the hardware has it.
EVERY = [(name, arch) for name in KEYS for arch in ARCHITECTURES if "fp8" not in name or arch == "sm_90"]


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of memory of the kernel in a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    told = subprocess.run([str(disassembler()), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", told.stdout)}


def disassembler() -> Path:
    """The program from PyPI's nvidia-cuda-cuobjdump."""
    for entry in sys.path:
        for path in Path(entry or ".").glob("nvidia/cu[0-9]*/bin/cuobjdump"):
            return path
    pytest.skip("pip install nvidia-cuda-cuobjdump to see what kernels need")


@pytest.mark.parametrize(
    ("name", "arch"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_kernels_build_and_spill_nothing(name, arch, tmp_path):
    try:
        find_compiler()
    except ToolchainError as reason:
        pytest.skip(str(reason))
    target = open_target(f"cuda:{arch}")
    compile_kernel(target.describe(KEYS[name]), "tested", target)
    found = resources(last_cubin(), tmp_path)
    assert found["LOCAL"] == found["STACK"] == 0, found
    # Two blocks of 256 threads fit a multiprocessor.
    assert found["REG"] <= 128, found
