"""What CUDA kernels are compiled to, read without a GPU: instructions, registers, barriers."""

import re
import subprocess
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from test_convolution import convolution
from test_cuda_convolution import eighths, half
from test_weight_groups import grouped

from qsearch.build.cache import compile_kernel
from qsearch.build.cuda_toolkit import find_compiler, last_cubin
from qsearch.build.target import open_target
from qsearch.errors import ToolchainError
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.conv_tensor import conv2d_kernel
from qsearch.models.graph import Conv
from qsearch.quantize.program import Op


def tf32(op: Op) -> Op:
    return replace(op, key=replace(op.key, precision="tf32"))


SAME = Conv((3, 3), padding=(1, 1, 1, 1))
U8 = "uint8"
KERNELS = {
    "int8": lambda: convolution(SAME, (8, 28, 28, 128), 128, (U8, U8), 1),
    "int8 with a residual": lambda: convolution(Conv(), (128, 56, 56, 64), 256, (U8, U8, U8), 1),
    "int8, one image": lambda: convolution(SAME, (1, 14, 14, 256), 256, (U8, U8), 1),
    "int8, 24 channels": lambda: convolution(Conv(), (1, 56, 56, 24), 144, (U8, U8), 1),
    "int8 linear": lambda: convolution(Conv(), (1, 1, 1, 1280), 1000, (U8, "float32"), 1),
    "int8, 3 channels": lambda: convolution(Conv((3, 3), (2, 2), (1, 1, 1, 1)), (1, 64, 64, 3), 32, (U8, U8), 1),
    "w4a8": lambda: convolution(SAME, (8, 28, 28, 128), 128, (U8, U8), 1, "w4a8"),
    "w4a8 in groups": lambda: grouped(convolution(SAME, (8, 28, 28, 128), 128, (U8, U8), 1, "w4a8"), (16, True), 1),
    "fp16": lambda: half(convolution(SAME, (128, 28, 28, 128), 128, ("float16",) * 2, 1, "fp32")),
    "fp16 with a residual": lambda: half(convolution(Conv(), (8, 56, 56, 64), 256, ("float16",) * 3, 1, "fp32")),
    "fp32": lambda: convolution(SAME, (1, 28, 28, 64), 64, ("float32",) * 2, 1),
    "tf32": lambda: tf32(convolution(SAME, (8, 28, 28, 128), 128, ("float32",) * 2, 1)),
    "fp8": lambda: eighths(convolution(SAME, (8, 28, 28, 128), 128, ("float32",) * 2, 1), 1),
    "fp8, 3 channels": lambda: eighths(convolution(SAME, (1, 28, 28, 3), 32, ("float32",) * 2, 1), 1),
    "int16": lambda: convolution(SAME, (1, 28, 28, 64), 64, ("int16",) * 2, 1, "int16"),
}
# Compiled in the default run; the others are slow.
FEW = [
    ("int8", "sm_90"),
    ("int8 with a residual", "sm_80"),
    ("w4a8", "sm_90"),
    ("fp16", "sm_90"),
    ("fp16", "sm_75"),
    ("fp32", "sm_80"),
]


def tool(name: str) -> str:
    """NVIDIA's disassembler, as PyPI has it."""
    nvidia = pytest.importorskip("nvidia", reason="the disassembler is in nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump")
    found = sorted(path for folder in nvidia.__path__ for path in Path(folder).glob(f"cu*/bin/{name}"))
    if not found:
        pytest.skip(f"pip install nvidia-cuda-{name} to read machine code")
    return str(found[-1])


class Code:
    """A compiled kernel."""

    def __init__(self, name: str, arch: str) -> None:
        self.plan = ConvPlan(KERNELS[name]().key, arch)
        module = compile_kernel(conv2d_kernel(self.plan), "kernel", open_target(f"cuda:{arch}"))
        self.source, self.cubin = module.mod.imports[0].inspect_source("cuda"), last_cubin()

    def read(self, name: str, *options: str, folder: Path) -> str:
        (folder / "kernel.cubin").write_bytes(self.cubin)
        command = [tool(name), *options, str(folder / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@lru_cache
def compiled(name: str, arch: str) -> Code:
    try:
        find_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    return Code(name, arch)


def every_kernel():
    for name in KERNELS:
        for arch in ("sm_75", "sm_80", "sm_90") if "fp8" not in name else ("sm_89", "sm_90"):
            yield pytest.param(name, arch, marks=() if (name, arch) in FEW else pytest.mark.slow, id=f"{name}-{arch}")


ALL = pytest.mark.parametrize(("name", "arch"), list(every_kernel()))


@ALL
def test_instructions(name, arch, tmp_path):
    code = compiled(name, arch)
    found = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code.read("nvdisasm", "-c", folder=tmp_path), re.M
    )
    multiply = {
        "int8": "IMMA",
        "w4a8": "IMMA",
        "fp8": "HMMA" if arch == "sm_90" else "QMMA",
        "fp16": "HMMA",
        "tf32": "HMMA" if arch != "sm_75" else "FFMA",
        "fp32": "FFMA",
        "int16": "IMAD",
    }[code.plan.key.precision]
    assert any(x.startswith(multiply + ".") or x == multiply for x in found)
    if arch != "sm_75" and code.plan.copy_bytes:
        assert any(x.startswith("LDGSTS") for x in found)
    if code.plan.matrix:
        assert any(x.startswith("LDSM") for x in found)
    if code.plan.copy_bytes and "groups" not in name:
        assert not [x for x in found if re.match(r"(LDG|STG|LD|ST)\..*[US](8|16)\b", x)]


@ALL
def test_registers_and_memory(name, arch, tmp_path):
    code = compiled(name, arch)
    text = code.read("cuobjdump", "--dump-resource-usage", folder=tmp_path)
    (used,) = [
        {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for line in text.splitlines()
        if "REG:" in line
    ]
    assert used["LOCAL"] == used["STACK"] == 0
    assert used["REG"] <= 255
    # The driver keeps 1 KiB for itself.
    assert used["SHARED"] <= 49152 + 1024


@ALL
def test_barriers_and_waits_are_where_they_were_put(name, arch):
    """TVM adds barriers where it sees threads share memory without one."""
    code = compiled(name, arch)
    plan, body = code.plan, code.source.partition("__global__")[2]
    assert body.count("__syncthreads();") == (2 if plan.nibbles else 1) + 2 * plan.parts
    assert len(re.findall(r"qs_copies_wait_\d\(\);", body)) == 1
    assert len(re.findall(r"qs_copies_commit\(\);", body)) == 2


@ALL
def test_arrays_are_as_long_as_device_functions_take_them_to_be(name, arch):
    """TVM may cut an array short behind the last element whose address it sees."""
    body = compiled(name, arch).source.partition("__global__")[2]
    lengths = {array: int(length) for array, length in re.findall(r"(?:int|float) (_ptr\w*)\[(\d+)\];", body)}
    for call, words in (
        ("qs_load_matrices_4", 4),
        ("qs_mma_u8s8", 4),
        ("qs_mma_f16", 4),
        ("qs_mma_tf32", 4),
        ("qs_dot_f32", 1),
        ("qs_dot_s16", 1),
    ):
        for array, first in re.findall(call + r"\(\(&\((_ptr\w*)\[(\d+)\]\)\)", body):
            assert int(first) + words <= lengths[array]
