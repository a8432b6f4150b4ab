"""Compiled products, moves and functions of rows against the NumPy reference."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import TARGETS, make_op, random_inputs, run_kernel, target_named

from qsearch.models.graph import Matmul
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
U8, F32 = "uint8", "float32"


def plain(shape):
    """(offset, strides) of contiguous memory."""
    return (0, *(int(np.prod(shape[i + 1 :])) for i in range(len(shape))))


@st.composite
def products(draw):
    """A batch of products: heads side by side in tokens, or plain; b by rows or transposed."""
    heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    m, n, k = (draw(st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32, 49, 64, 70, 90])) for _ in range(3))
    if draw(st.booleans()):
        # Queries, keys of one value: (batch, tokens, 2, heads, k); the result has its heads side by side.
        tokens = max(m, n)
        row = 2 * heads * k
        a = (0, tokens * row, k, row, 1)
        b = (heads * k, tokens * row, k, 1, row)
        memory = (batch, tokens, row)
        return Matmul((batch, heads, m, n, k), a, b, (0, m * heads * n, n, heads * n, 1)), memory, memory
    shapes = (batch, heads, m, k), (batch, heads, k, n), (batch, heads, m, n)
    return Matmul((batch, heads, m, n, k), *(plain(shape) for shape in shapes)), *shapes[:2]


def product_op(case, dtypes, seed):
    matmul, a, b = case
    rng = np.random.default_rng(seed)
    out = (int(np.prod(matmul.extents[:-1])),)
    key = OpKey("matmul", (a, b, out), dtypes, "int8" if dtypes[0] == U8 else "fp32", matmul=matmul, clipped=dtypes[-1] == F32)
    zero_points = {name: rng.integers(0, 256) for name in ("a_zero_point", "b_zero_point", "zero_point")}
    multiplier = 300 / (128 * 128 * matmul.extents[-1] ** 0.5) if dtypes[0] == U8 else 0.3
    op = make_op(key, **scalars(**zero_points, multiplier=multiplier, qmin=3, qmax=250, low=-90.0, high=200.0))
    if dtypes[0] == U8:
        return op, [rng.integers(0, 256, shape, dtype=np.uint8) for shape in (a, b)]
    return op, random_inputs(rng, key)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=products(), out=st.sampled_from([U8, F32]), seed=st.integers(0, 2**16))
def test_integer_products_are_exact(target, case, out, seed):
    op, inputs = product_op(case, (U8, U8, out), seed)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=products(), seed=st.integers(0, 2**16))
def test_float_products_agree(target, case, seed):
    op, inputs = product_op(case, (F32, F32, F32), seed)
    expected = run_op(op, inputs)
    np.testing.assert_allclose(run_kernel(op, inputs, target_named(target)), expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [U8, "int16", F32])
@RELAXED
@given(runs=st.integers(1, 40), length=st.integers(1, 150), padded=st.booleans(), seed=st.integers(0, 2**16))
def test_moves_are_exact(target, dtype, runs, length, padded, seed):
    rng = np.random.default_rng(seed)
    index = rng.integers(-1 if padded else 0, 50, runs).astype(np.int32)
    key = OpKey("gather", ((length + 49,), (runs, length)), (dtype, dtype), padded=padded)
    op = make_op(key, **scalars(a_zero_point=77), index=index)
    inputs = random_inputs(rng, key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


def constants_of(kind, shape, rng):
    """What each kind reads beside its input, and its shapes."""
    size = int(np.prod(shape))
    lengths = {"layer_norm": {"weight": shape[-1], "shift": shape[-1]}, "l2_normalize": {}}
    lengths["softmax"] = [{}, {"constant": shape[-1]}, {"constant": size}][rng.integers(3)]
    lengths["scale"] = lengths["shift"] = {"constant": [1, shape[-1], size][rng.integers(3)]}
    return {name: rng.standard_normal(length).astype(np.float32) for name, length in lengths[kind].items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["layer_norm", "softmax", "l2_normalize", "scale", "shift"])
@RELAXED
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 150)),
    dtypes=st.sampled_from([(F32, F32), (F32, U8), (U8, F32), (U8, U8)]),
    seed=st.integers(0, 2**16),
)
def test_functions_of_rows_agree(target, kind, shape, dtypes, seed):
    rng = np.random.default_rng(seed)
    constants = constants_of(kind, shape, rng)
    shapes = (shape, *(c.shape for c in constants.values()), shape)
    key = OpKey(kind, shapes, dtypes, epsilon=1e-5)
    multiplier = 40.0 if dtypes[-1] == U8 else 1.0
    a_multiplier = 0.05 if dtypes[0] == U8 else 1.0
    op = make_op(key, **constants, **scalars(a_zero_point=120, a_multiplier=a_multiplier, multiplier=multiplier, zero_point=100))
    x = rng.integers(0, 256, shape, dtype=np.uint8) if dtypes[0] == U8 else (3 * rng.standard_normal(shape)).astype(np.float32)
    found, expected = (v.astype(np.float64) for v in (run_kernel(op, [x], target_named(target)), run_op(op, [x])))
    if kind in ("scale", "shift"):
        np.testing.assert_array_equal(found, expected)
    elif dtypes[-1] == U8:
        assert np.abs(found - expected).max() <= 1
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
