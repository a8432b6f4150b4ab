"""Modules for GPUs, compiled and linked on a machine that may have none."""

import hashlib

import networks
import pytest
import tvm

from qsearch.build import cuda_toolkit
from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target, require_runnable
from qsearch.config import QuantConfig
from qsearch.errors import BuildError, ToolchainError, UsageError
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import WeightStore

try:
    cuda_toolkit.find_compiler()
except ToolchainError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def linker(tmp_path_factory):
    return Linker(KernelCache(tmp_path_factory.mktemp("kernels"), open_target("cuda:sm_90")))


def program(name, **config):
    model, _ = networks.network(name)
    chosen = QuantConfig.model_validate(config)
    return lower(model, chosen, networks.ranges_of(model, chosen), WeightStore())


def test_a_mixture_is_linked_and_its_kernels_are_captured_in_a_graph(linker, tmp_path):
    names = [node.name for node in networks.network("residual")[0].graph.layers]
    mixed = dict(zip(names, ["int8", "fp16", "tf32", "w4a8", "int16", "fp32"] * len(names), strict=False))
    built = program("residual", default_precision="int8", precision=mixed)
    module = linker.build(built)
    assert module.device == "cuda"
    text = module.executable.as_text()
    assert "cuda_graph.run_or_capture" in text
    captured = text[text.index("@main_cuda_graph_capture:") :]
    launches = sum(f"call  {kernel.symbol} " in captured for kernel in module.kernels)
    # The first reads the caller's image and the last writes the caller's output, which move from call to call.
    assert launches >= len(module.kernels) - 2
    exported = linker.build(built, linked=False, exported=True)
    file = tmp_path / "model.so"
    exported.executable.export_library(str(file))
    data = file.read_bytes()
    for kernel in module.kernels:
        cubin = kernel.object_path.with_suffix(".cubin").read_bytes()
        assert cubin[:4] == b"\x7fELF" and cubin in data, "the machine code itself is part of the module"
    assert b"__global__" not in data, "no source is"
    loaded = tvm.runtime.load_module(str(file))
    assert {module.kind for module in loaded.imports} >= {"cuda"} or any("cuda" in str(m.kind) for m in _all(loaded))


def _all(module):
    for imported in module.imports:
        yield imported
        yield from _all(imported)


def test_one_layer_changed_compiles_its_kernels_only(linker, monkeypatch):
    linker.build(program("residual", default_precision="int8"))
    changed = networks.network("residual")[0].graph.layers[1].name
    compiled = []
    before = linker.cache._compile
    monkeypatch.setattr(linker.cache, "_compile", lambda kernels: (compiled.extend(kernels), before(kernels)))
    linker.build(program("residual", default_precision="int8", precision={changed: "fp16"}))
    assert 0 < len(compiled) <= 5


def test_operators_without_a_kernel_run_on_the_gpu_too(linker):
    module = linker.build(program("foreign", default_precision="fp32"))
    assert module.kernels


def test_a_gpu_that_is_not_there_is_named():
    if cuda_toolkit.gpu_present():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="none that can be used"):
        open_target("cuda")
    with pytest.raises(UsageError, match="needs a GPU of architecture sm_90"):
        require_runnable(open_target("cuda:sm_90"))


def test_an_architecture_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="unknown CUDA architecture 'sm_42'"):
        open_target("cuda:sm_42")


def test_a_driver_is_never_replaced(monkeypatch):
    loaded = []
    monkeypatch.setattr(cuda_toolkit, "_load_stub", lambda: loaded.append("stub"))
    monkeypatch.setattr(cuda_toolkit, "cuda_driver", lambda: "libcuda.so.1")
    monkeypatch.setattr(cuda_toolkit, "_registered", lambda: False)
    cuda_toolkit.load_cuda_runtime.__wrapped__()
    assert not loaded


def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(BuildError, match="undefined"):
        cuda_toolkit.find_compiler().cubin('extern "C" __global__ void k(int *a) { a[0] = nothing; }', "sm_90")


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_cubins_are_the_same_every_time(arch):
    source = 'extern "C" __global__ void k(float *a) { a[threadIdx.x] *= 2.0f; }'
    digests = {hashlib.sha256(cuda_toolkit.find_compiler().cubin(source, arch)).hexdigest() for _ in range(2)}
    assert len(digests) == 1
