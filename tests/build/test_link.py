"""Whole modules: what is linked computes what the reference computes, and survives export, caches and damage."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import MODELS, NETWORKS, RANGES, images
from targets import AARCH64_CPUS, OTHER_CPUS, runnable

from qsearch.build import cache
from qsearch.build.cache import KernelCache, kernel_symbol
from qsearch.build.foreign import run_foreign
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.kernels.cpu import candidate_tiles, describe_kernel
from qsearch.measure.memory import measure_memory
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import load_model
from qsearch.quantize.lower import lower
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore


@pytest.fixture(scope="module", params=["host", "portable", *(runnable(name, pytest.mark.slow) for name in OTHER_CPUS)])
def linker(request, tmp_path_factory):
    return Linker(KernelCache(tmp_path_factory.mktemp("kernels"), open_target(request.param)))


def lowered(name, **options):
    return lower(MODELS[name], QuantConfig.model_validate(options), RANGES[name], WeightStore())


def drawn_mixture(linker, data):
    """A network with a precision of its own for every layer."""
    name = data.draw(st.sampled_from(list(NETWORKS)))
    names = [layer.name for layer in MODELS[name].graph.layers]
    return lowered(name, precision={layer: data.draw(st.sampled_from(linker.target.precisions)) for layer in names})


def run(module, image):
    return module.open()["main"](tvm.runtime.tensor(image)).numpy()


def expected(program, image):
    return run_program(program, image, lambda op, inputs: run_foreign(op.key, op.constants, inputs))[program.output.name]


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "excite"])
@pytest.mark.parametrize("precision", ["int8", "int16", "w4a8"])
def test_an_integer_network_is_exact_end_to_end(linker, name, precision):
    program = lowered(name, default_precision=precision)
    module = linker.build(program)
    # Activations of int16 values compute in float, which rounds differently on every target; where they only clip, it does not.
    inexact = any(op.key.kind == "activation" and op.key.function != "clip" for op in program.ops)
    tolerance = 1e-3 if inexact else 0.0
    for image in images(4, 5):
        reference = expected(program, image[None])
        np.testing.assert_allclose(run(module, image[None]), reference, rtol=0, atol=tolerance * np.abs(reference).max())


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mixtures_agree(linker, data):
    """Float layers round differently on every target, and may tip an integer after them by one."""
    program = drawn_mixture(linker, data)
    image = images(1, 6)
    reference = expected(program, image)
    np.testing.assert_allclose(run(linker.build(program), image), reference, atol=0.02 * np.abs(reference).max() + 1e-4)


def test_a_new_calibration_compiles_nothing(linker, monkeypatch):
    linker.build(lowered("residual"))
    monkeypatch.setattr(KernelCache, "_compile", lambda *_: pytest.fail("compiled a kernel"))
    wider = {name: (2 * low, 2 * high) for name, (low, high) in RANGES["residual"].items()}
    linker.build(lower(MODELS["residual"], QuantConfig(granularity="layer_wise"), wider, WeightStore()))


def test_a_second_process_finds_the_kernels(linker, monkeypatch):
    linker.build(lowered("residual"))
    monkeypatch.setattr(KernelCache, "_compile", lambda *_: pytest.fail("compiled a kernel"))
    again = Linker(KernelCache(linker.cache.directory, linker.target))
    program = lowered("residual")
    np.testing.assert_array_equal(run(again.build(program), images(1)), expected(program, images(1)))


@pytest.mark.parametrize("name", ["residual", "foreign"])
def test_the_digest_of_kernels_needs_no_build_and_calibration_does_not_change_it(linker, name):
    if linker.target.name != "host":
        pytest.skip("one target is enough")
    program = lowered(name)
    again = lower(MODELS[name], QuantConfig(granularity="layer_wise"), RANGES[name], WeightStore())
    digest = Linker(KernelCache(linker.cache.directory, linker.target)).kernels_sha256(program)
    assert linker.build(program).kernels_sha256 == linker.build(program, linked=False).kernels_sha256 == digest
    assert linker.build(again).kernels_sha256 == digest
    assert linker.kernels_sha256(lowered(name, default_precision="fp32")) != digest


def test_another_tile_target_or_generator_changes_the_digest_of_kernels(tmp_path, monkeypatch):
    program, target = lowered("residual"), open_target("host")
    linker = Linker(KernelCache(tmp_path, target))
    digest = linker.kernels_sha256(program)
    key = next(op.key for op in program.ops if op.name == "expand.0")
    predicted, other = candidate_tiles(key, target.isa, 1, 2)
    linker.remember_tile(key, predicted)
    # Tuning that confirms what the formula predicts changes no code.
    assert linker.kernels_sha256(program) == digest
    linker.remember_tile(key, other)
    assert linker.kernels_sha256(program) != digest
    for target in (open_target("portable"), open_target("host", 2)):
        assert Linker(KernelCache(tmp_path, target)).kernels_sha256(program) != digest
    monkeypatch.setattr(cache, "_generator_digest", lambda device: "edited")
    assert Linker(KernelCache(tmp_path / "other", open_target("host"))).kernels_sha256(program) != digest


def test_the_exported_library_computes_the_same(linker, tmp_path):
    program = lowered("excite")
    exported = linker.build(program, linked=False)
    path = tmp_path / "model.so"
    exported.executable.export_library(str(path), addons=[str(file) for file in exported.objects])
    machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    image = images(1, 8)
    np.testing.assert_array_equal(machine["main"](tvm.runtime.tensor(image)).numpy(), expected(program, image))


@pytest.mark.parametrize("precision", ["int8", "int16", "w4a8", "fp32"])
def test_packed_weights_live_no_longer_than_their_program(linker, precision):
    """A bias that needs a coarser scale gives weights of one calibration alone: of those there are ever more."""
    program = lowered("residual", default_precision=precision)
    weights = [weakref.ref(op.constants["weight"]) for op in program.ops if "weight" in op.constants]
    linker.plan(program)
    linker.build(program)
    gc.collect()
    assert len(weights) > 3 and all(weight() is not None for weight in weights)
    del program
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_plan_without_packing_is_that_with_it(linker, data):
    program = drawn_mixture(linker, data)
    # A layer that is called twice reads one weight.
    layers = [op for op in program.ops if op.key.kind == "conv2d"]
    shared = {op.name: op.constants | {"weight": first.constants["weight"]} for first, op in alike(layers)}
    ops = tuple(replace(op, constants=shared.get(op.name, op.constants)) for op in program.ops)
    for one in (program, replace(program, ops=ops)):
        fresh = Linker(linker.cache)
        first, again, module = fresh.plan(one), fresh.plan(one), linker.build(one)
        assert first == again == linker.plan(one)
        assert first.weight_bytes == module.weight_bytes and first.arena_bytes == module.arena_bytes
        calls = linker.calls(one.ops)
        assert [call.symbol for call in first.calls] == [call.symbol for _, call in calls]
        assert [call.constant_bytes for call in first.calls] == [sum(c.bytes for c in call.constants) for _, call in calls]


def alike(layers):
    """Pairs of layers with one kernel, the earlier first."""
    for i, first in enumerate(layers):
        for other in layers[i + 1 :]:
            if first.key == other.key:
                yield first, other


def test_a_module_refuses_what_is_no_image_of_its_own(linker):
    machine = linker.build(lowered("residual")).open()
    image = images(1)
    machine["main"](machine.tensor(image))
    for wrong in (image[:, :, :-1], image.astype(np.float64), image[0]):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="match|Mismatch|mismatch|expect|dtype"):
            machine["main"](machine.tensor(np.ascontiguousarray(wrong)))


def test_memory_counts_weights_activations_and_workspace(linker):
    whole, integer = (measure_memory(linker.build(lowered("residual", default_precision=p))) for p in ("fp32", "int8"))
    weights = sum(array.nbytes for array in MODELS["residual"].parameters.weight.values())
    assert weights <= whole.weight_bytes
    assert integer.weight_bytes < whole.weight_bytes / 2
    assert integer.activation_bytes < whole.activation_bytes
    # The largest padded copy in float32: the 13 rows that a stride of two reads of the padded 12 x 10 image, 3 channels.
    assert whole.workspace_bytes == 13 * 12 * 3 * 4 + 64
    # The same in bytes. Dots of four kernel rows need more, for a block of 64 channels: of 7 columns four rows, the weights of
    # 6 dots for four vectors, and the results of 2 rows of 5 columns.
    quads = (7 * 4 + 6 * 4 + 2 * 5) * 64
    assert integer.workspace_bytes == (quads if linker.target.isa.dots_quads else 13 * 12 * 3 + 64)
    assert whole.peak_bytes == whole.weight_bytes + whole.activation_bytes + whole.workspace_bytes


def test_activations_take_no_more_than_what_is_alive_together(linker):
    for name in ("residual", "excite"):
        module = linker.build(lowered(name))
        program = module.program
        last = {value: step for step, op in enumerate(program.ops) for value in op.inputs}
        inner = [(step, op.output) for step, op in enumerate(program.ops) if op.output != program.output]
        steps = range(len(program.ops))
        alive = [sum(-(-v.bytes // 64) * 64 for first, v in inner if first <= step <= last[v.name]) for step in steps]
        assert module.arena_bytes == max(alive)
        assert measure_memory(module).activation_bytes == max(alive) + program.input.bytes + program.output.bytes


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_sums_take_the_place_of_their_residual(linker, precision):
    """All but the last: its residual is its own input too, of which other pixels are still to be read."""
    module = linker.build(lowered("bottlenecks", default_precision=precision))
    program = module.program
    last = {value: step for step, op in enumerate(program.ops) for value in op.inputs}
    sums = [op for op in program.ops if op.key.residual]
    assert len(sums) == 4
    saved = {op.output.name for op in sums[:3]}
    inner = [(step, op.output) for step, op in enumerate(program.ops) if op.output != program.output]
    alive = [
        sum(-(-v.bytes // 64) * 64 for first, v in inner if first + (v.name in saved) <= step <= last[v.name])
        for step in range(len(program.ops))
    ]
    assert module.arena_bytes == max(alive)
    image = images(1, 6)
    reference = expected(program, image)
    np.testing.assert_allclose(run(module, image), reference, rtol=0, atol=1e-5 * np.abs(reference).max() * (precision == "fp32"))


@pytest.mark.parametrize("target", map(open_target, AARCH64_CPUS), ids=AARCH64_CPUS)
def test_a_network_compiles_for_another_architecture(target, tmp_path):
    """Its objects need that architecture's linker; that they compute the right thing is for the tests of kernels."""
    kernels = {}
    for op in lowered("excite").ops:
        kernel = describe_kernel(op.key, target.isa, target.threads)
        symbol = kernel_symbol(kernel, target)
        kernels[symbol] = kernel.generate(symbol)
        assert all(isinstance(array, np.ndarray) for array in kernel.pack(op.constants))
    compiled = tvm.compile(tvm.IRModule(kernels), target=target.tvm())
    compiled.mod.write_to_file(str(tmp_path / "kernels.o"), "o")
    machine = (tmp_path / "kernels.o").read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # EM_AARCH64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 128),
        ("convnext_tiny", 64),
        ("densenet121", 64),
        ("efficientnet_v2_s", 64),
        ("googlenet", 96),
        ("inception_v3", 299),
        ("mnasnet1_0", 64),
        ("mobilenet_v2", 96),
        ("mobilenet_v3_small", 64),
        ("regnet_x_400mf", 64),
        ("resnet18", 64),
        ("resnext50_32x4d", 64),
        ("shufflenet_v2_x0_5", 64),
        ("squeezenet1_0", 64),
        ("swin_t", 224),
        ("vgg11_bn", 64),
        ("vit_b_16", 224),
        ("wide_resnet50_2", 64),
    ],
)
def test_torchvision_networks_agree(linker, name, size):
    """Import, lower, link and run real architectures with random weights, in float and in int8."""
    if linker.target.name != "host":
        pytest.skip("one target is enough for whole networks")
    model = import_model(name, load_model(f"torchvision:{name}").module, (1, 3, size, size))
    image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    record = observe(model, image, 1)
    for precision in ("fp32", "int8"):
        config = QuantConfig(default_precision=precision)
        program = lower(model, config, activation_ranges(record, model, config.calibration, (-6.0, 6.0)), WeightStore())
        reference = expected(program, image)
        # A vision transformer's untrained head gives zeros.
        scale = max(np.abs(reference).max(), 1e-6)
        difference = np.abs(run(linker.build(program), image) - reference).max() / scale
        if all("uint8" in op.key.dtypes for op in program.ops):
            assert difference == 0
        else:
            # Float operators between integer layers round differently, and may tip an integer after them by one.
            assert difference <= (1e-4 if precision == "fp32" else 0.05)


def test_a_kernel_that_does_not_compile_is_named_and_fails_the_build_alone(tmp_path, monkeypatch):
    from qsearch.errors import BuildError
    from qsearch.kernels import cpu

    described = cpu.describe_kernel

    def broken(key, isa, threads, tile=None):
        kernel = described(key, isa, threads, tile)
        if key.kind != "avg_pool2d":
            return kernel
        return replace(kernel, variant=("broken",), generate=lambda symbol: tvm.tirx.PrimFunc([], "no statement"))

    monkeypatch.setattr(cpu, "describe_kernel", broken)
    linker = Linker(KernelCache(tmp_path, open_target("host")))
    with pytest.raises(BuildError, match=r"kernel qs_\w+ \(avg_pool2d .* does not compile"):
        linker.build(lowered("residual"))
    monkeypatch.undo()
    assert Linker(KernelCache(tmp_path, open_target("host"))).build(lowered("residual")).kernels
