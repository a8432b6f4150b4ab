"""Every instruction set: its operations one by one, its kernels against the reference, its instructions."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import make_op, random_inputs, run_kernel
from targets import AARCH64_CPUS, OTHER_CPUS, runnable
from test_attention import product_op, products
from test_convolution import INTEGER_DTYPES, RELAXED, convolution, convolutions
from test_elementwise import SHAPES, U8, pools, quantization
from tvm import tirx
from tvm.tirx.script import builder as T

from qsearch.build.target import Target, open_target
from qsearch.kernels.cpu import describe_kernel, isa
from qsearch.kernels.cpu.vectors import kernel, load, store
from qsearch.models.graph import Conv
from qsearch.quantize.program import Op, OpKey
from qsearch.quantize.reference import run_op

FEW = settings(RELAXED, max_examples=2)
INT8 = convolution(Conv(), (1, 5, 5, 32), 48, (U8, U8), 1)
DEPTHWISE = convolution(Conv((3, 3), (1, 1), (1, 1, 1, 1), groups=32), (1, 5, 5, 32), 32, (U8, U8), 1)


def _widening_dot(_: str, accumulator, a, weights, signed):
    wide = tirx.Cast("int32x16", a if signed else tirx.reinterpret("uint8x16", a)) * tirx.Cast("int32x16", weights)
    for i in range(4):
        accumulator = accumulator + tirx.Shuffle([wide], [tirx.const(4 * lane + i, "int32") for lane in range(4)])
    return accumulator


# What the AArch64 instructions do, in operations that any machine has.
DEFINITIONS = {
    "sdot": lambda kind, *operands: _widening_dot(kind, *operands, signed=True),
    "usdot": lambda kind, *operands: _widening_dot(kind, *operands, signed=False),
    "smull": lambda kind, a, b: tirx.Cast(kind, a) * tirx.Cast(kind, b),
    "fcvtns": lambda kind, a: tirx.call_llvm_pure_intrin(kind, "llvm.lrint", a),
}


def instruction_set(name: str, monkeypatch) -> Target:
    """A target this machine can run: AArch64's kernels run here with their instructions replaced by what those do."""
    target = open_target(name)
    if name not in AARCH64_CPUS:
        return target
    original = isa._llvm

    def defined(called, kind, *operands):
        instruction = called.removeprefix("llvm.aarch64.neon.")
        return DEFINITIONS[instruction](kind, *operands) if instruction != called else original(called, kind, *operands)

    monkeypatch.setattr(isa, "_llvm", defined)
    return replace(open_target("host"), isa=target.isa)


@pytest.fixture(params=["host", "portable", *map(runnable, OTHER_CPUS), *AARCH64_CPUS])
def any_isa(request, monkeypatch) -> Target:
    return instruction_set(request.param, monkeypatch)


@pytest.fixture(params=[*map(runnable, OTHER_CPUS), *AARCH64_CPUS])
def other_isa(request, monkeypatch) -> Target:
    return instruction_set(request.param, monkeypatch)


def assert_exact(op: Op, seed: int, target: Target) -> None:
    inputs = random_inputs(np.random.default_rng(seed), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target), run_op(op, inputs))


def compiled_step(target: Target, step, *operands: tuple[str, int]):
    """One step between loads of its operands, each a (dtype, elements), and a store of int32 lanes, as a function."""
    lanes = target.isa.lanes

    def body() -> None:
        buffers = [T.arg(f"x{i}", T.Buffer((size,), dtype)) for i, (dtype, size) in enumerate(operands)]
        output = T.arg("y", T.Buffer((lanes,), "int32"))
        store(output, 0, step(*(load(x, 0, size) for x, (_, size) in zip(buffers, operands, strict=True))), lanes)

    built = tvm.compile(tvm.IRModule({"step": kernel("step", body)}), target=target.tvm())

    def run(*arrays: np.ndarray) -> np.ndarray:
        output = tvm.runtime.tensor(np.zeros(lanes, np.int32))
        built.mod["step"](*(tvm.runtime.tensor(array) for array in arrays), output)
        return output.numpy()

    return run


def test_dot_of_extremes_is_exact(any_isa):
    """Neither saturation nor sign goes wrong where all products are largest."""
    lanes, offset = any_isa.isa.lanes, any_isa.isa.activation_offset

    def step(accumulator, activations, weights):
        return any_isa.isa.dot(accumulator, tirx.reinterpret("int32", activations), weights)

    run, start = compiled_step(any_isa, step, ("int32", lanes), (U8, 4), ("int8", 4 * lanes)), np.arange(lanes) - 7
    for a in ([255, 255, 255, 255], [0, 255, 0, 255], [128, 127, 129, 0]):
        for w in ([127, 127, 127, 127], [-128, -128, -128, -128], [-128, 127, -1, 1]):
            found = run((start + offset * np.sum(w)).astype(np.int32), np.array(a, np.uint8), np.array(w * lanes, np.int8))
            np.testing.assert_array_equal(found, start + np.dot(a, w))


def test_dot_of_pairs_is_exact(any_isa):
    lanes, rng = any_isa.isa.lanes, np.random.default_rng(0)

    def step(accumulator, activations, weights):
        return any_isa.isa.dot_pairs(accumulator, tirx.reinterpret("int32", activations), weights)

    run = compiled_step(any_isa, step, ("int32", lanes), ("int16", 2), ("int16", 2 * lanes))
    for a in ([32767, -32767], [-32768, 32767], [-3, 5]):
        weights = rng.integers(-16384, 16384, (lanes, 2)).astype(np.int16)
        weights[0] = -16384
        start = rng.integers(-1000, 1000, lanes).astype(np.int32)
        found = run(start, np.array(a, np.int16), weights.ravel())
        np.testing.assert_array_equal(found, start + weights.astype(np.int32) @ np.array(a, np.int32))


def test_halves_are_rounded_to_even(any_isa):
    lanes = any_isa.isa.lanes
    values = np.resize(np.array([0.5, 1.5, -0.5, -1.5, 2.5, -2.5, 0.49999997, 1e9], np.float32), lanes)
    run = compiled_step(any_isa, lambda x: any_isa.isa.round_to_int(x, lanes), ("float32", lanes))
    np.testing.assert_array_equal(run(values), np.rint(values).astype(np.int32))


@settings(RELAXED, max_examples=3)
@given(case=convolutions(), dtypes=st.sampled_from(INTEGER_DTYPES), seed=st.integers(0, 2**16))
def test_convolution_is_exact(other_isa, case, dtypes, seed):
    assert_exact(convolution(*case, dtypes, seed), seed, other_isa)


@FEW
@given(
    case=convolutions(), channels=st.sampled_from([7, 17, 40]), dtypes=st.sampled_from(INTEGER_DTYPES), seed=st.integers(0, 99)
)
def test_depthwise_is_exact(other_isa, case, channels, dtypes, seed):
    conv = replace(case[0], groups=channels)
    assert_exact(convolution(conv, (*case[1][:3], channels), channels, dtypes, seed), seed, other_isa)


@FEW
@given(features=st.integers(1, 300), outputs=st.integers(1, 100), seed=st.integers(0, 99))
def test_linear_is_exact(other_isa, features, outputs, seed):
    assert_exact(convolution(Conv(), (2, 1, 1, features), outputs, (U8, "float32"), seed), seed, other_isa)


@FEW
@given(case=products(), seed=st.integers(0, 99))
def test_product_of_activations_is_exact(other_isa, case, seed):
    op, inputs = product_op(case, (U8, U8, U8), seed)
    np.testing.assert_array_equal(run_kernel(op, inputs, other_isa), run_op(op, inputs))


@FEW
@given(shape=SHAPES, pool=pools(), seed=st.integers(0, 99))
def test_other_operations_are_exact(other_isa, shape, pool, seed):
    window, image, out = pool
    keys = [
        OpKey("add", (shape,) * 3, (U8, "float32", U8)),
        OpKey("quantize", (shape,) * 2, ("float32", U8)),
        OpKey("avg_pool2d", (image, out), (U8, U8), pool=window),
    ]
    for key in keys:
        assert_exact(make_op(key, **quantization(seed)), seed, other_isa)


@FEW
@given(case=convolutions(), seed=st.integers(0, 99))
def test_float_convolution_agrees(other_isa, case, seed):
    op = convolution(*case, ("float32", "float32"), seed)
    inputs = random_inputs(np.random.default_rng(seed), op.key)
    np.testing.assert_allclose(run_kernel(op, inputs, other_isa), run_op(op, inputs), atol=1e-3)


def assembly(target: Target, *ops: Op) -> str:
    """What LLVM makes of some operations' kernels; needs no machine that can run it."""
    names = [f"tested{i}" for i in range(len(ops))]
    functions = {name: describe_kernel(op.key, target.isa).generate(name) for name, op in zip(names, ops, strict=True)}
    return tvm.compile(tvm.IRModule(functions), target=target.tvm()).mod.inspect_source("s")


@pytest.mark.parametrize(
    ("name", "dot", "rounding"),
    [
        ("icelake-server", r"vpdpbusd\s.*%zmm", r"vcvtps2dq\s.*%zmm"),
        ("cascadelake", r"vpdpbusd\s.*%zmm", r"vcvtps2dq\s.*%zmm"),
        ("skylake-avx512", r"vpmaddwd\s.*%zmm", r"vcvtps2dq\s.*%zmm"),
        ("alderlake", r"\{vex\}\s+vpdpbusd\s.*%ymm", r"vcvtps2dq\s.*%ymm"),
        ("haswell", r"vpmaddwd\s.*%ymm", r"vcvtps2dq\s.*%ymm"),
        ("x86-64", r"\spmaddwd\s.*%xmm", r"cvtps2dq\s.*%xmm"),
        ("aarch64:neoverse-v1", r"usdot\s+v", r"fcvtns\s+v"),
        ("aarch64:neoverse-n1", r"\ssdot\s+v", r"fcvtns\s+v"),
        ("aarch64:generic", r"smlal\s+v", r"fcvtns\s+v"),
    ],
)
def test_instructions_are_those_meant(name, dot, rounding):
    target = open_target(name)
    dense = assembly(target, INT8)
    assert re.search(dot, dense)
    assert re.search(rounding, dense)
    shape = ((1, 3, 3, 64),)
    add, average = make_op(OpKey("add", shape * 3, (U8,) * 3)), make_op(OpKey("avg_pool2d", shape * 2, (U8,) * 2))
    others = assembly(target, DEPTHWISE, add, average, convolution(Conv(), (1, 5, 5, 32), 48, ("float32", "float32"), 1))
    assert len(re.findall(rounding, others)) >= 3
    # vpmaddubsw saturates: sums of two products of large activations and weights do not fit.
    assert "maddubsw" not in dense
    # round_to_int and multiply_add are there so that no function of the C library is called for every lane.
    assert not re.search(r"(call|bl)\w*\s+(rint|nearbyint|roundeven|fma)f", dense + others)
