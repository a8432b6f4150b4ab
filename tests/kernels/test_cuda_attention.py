"""CUDA kernels of products, moves and functions of rows, executed without a GPU, against the NumPy reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_emulator import run_emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import make_op, random_inputs
from test_attention import constants_of, product_op, products

from qsearch.kernels.cuda import row_blocks
from qsearch.models.graph import Matmul
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEW = settings(RELAXED, max_examples=5)
U8, I16, F8, F16, F32 = "uint8", "int16", "float8_e4m3fn", "float16", "float32"


@FEW
@given(case=products(), out=st.sampled_from([U8, F32, F16, F8]), seed=st.integers(0, 2**16))
def test_integer_products_are_exact(case, out, seed):
    op, inputs = product_op(case, (U8, U8, U8 if out == U8 else F32), seed)
    op = replace(op, key=replace(op.key, dtypes=(U8, U8, out)), output=replace(op.output, dtype=out))
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@pytest.mark.parametrize("pitch", [48, 40, 36, 33])
@pytest.mark.parametrize("offset", [0, 8, 3])
def test_lines_may_begin_anywhere(pitch, offset):
    """Both operands have 32 elements that are contracted adjacent in memory, in lines that are further apart."""
    memory = (20 * pitch + offset,)
    matmul = Matmul((1, 17, 19, 32), (offset, 0, pitch, 1), (offset, 0, 1, pitch), (0, 0, 19, 1))
    op, inputs = product_op((matmul, memory, memory), (U8, U8, F32), 1)
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@pytest.mark.parametrize("ends", [(0, 0), (0, 255), (255, 255)])
def test_products_at_the_ends(ends):
    matmul = Matmul((1, 9, 17, 33), (0, 297, 33, 1), (0, 561, 17, 1), (0, 153, 17, 1))
    op, inputs = product_op((matmul, (1, 9, 33), (1, 33, 17)), (U8, U8, F32), 1)
    inputs = [np.full_like(value, end) for value, end in zip(inputs, ends, strict=True)]
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@FEW
@given(case=products(), dtypes=st.sampled_from([(F32, F32), (F16, F16), (F16, F32), (F32, U8)]), seed=st.integers(0, 2**16))
def test_float_products_agree(case, dtypes, seed):
    op, inputs = product_op(case, (F32,) * 3, seed)
    given_dtype, out = dtypes
    key = replace(op.key, dtypes=(given_dtype, given_dtype, out), precision="fp16" if given_dtype == F16 else "fp32")
    op = replace(op, key=key, output=replace(op.output, dtype=out))
    inputs = [x.astype(given_dtype) for x in inputs]
    found, wanted = (x.astype(np.float64) for x in (run_emulated(op, inputs), run_op(op, inputs)))
    if out == U8:
        assert np.abs(found - wanted).max() <= 1
        return
    precision = 1e-5 if out == F32 else 1e-3
    np.testing.assert_allclose(found, wanted, rtol=precision, atol=precision * abs(wanted).max())


@RELAXED
@given(
    runs=st.integers(1, 40),
    length=st.integers(1, 150),
    whole=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from([U8, I16, F8, F16, F32]),
    seed=st.integers(0, 2**16),
)
def test_moves_are_exact(runs, length, whole, padded, dtype, seed):
    """Runs start anywhere, or at multiples of 16."""
    rng = np.random.default_rng(seed)
    index = rng.integers(-1 if padded else 0, 50, runs).astype(np.int32)
    index = np.where(whole & (index > 0), index // 16 * 16, index).astype(np.int32)
    length = -(-length // 16) * 16 if whole else length
    key = OpKey("gather", ((length + 49,), (runs, length)), (dtype, dtype), padded=padded)
    op = make_op(key, **scalars(a_zero_point=77), index=index)
    inputs = random_inputs(rng, key)
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


def row_op(kind, shape, dtypes, seed):
    rng = np.random.default_rng(seed)
    constants = constants_of(kind, shape, rng)
    key = OpKey(kind, (shape, *(c.shape for c in constants.values()), shape), dtypes, epsilon=1e-5)
    values = {
        U8: {"zero_point": 100, "multiplier": 40.0},
        I16: {"multiplier": 3000.0, "qmin": -30_000, "qmax": 30_001},
        F8: {"multiplier": 90.0, "low": -448, "high": 448},
        F16: {"low": -65504, "high": 65504},
    }.get(dtypes[-1], {})
    values |= {U8: {"a_zero_point": 120, "a_multiplier": 0.05}, I16: {"a_multiplier": 1e-4}}.get(dtypes[0], {})
    op = make_op(key, **constants, **scalars(**values))
    return op, random_inputs(rng, replace(key, shapes=(shape, shape)))


def check_row_op(op, inputs):
    found, wanted = (v.astype(np.float64) for v in (run_emulated(op, inputs), run_op(op, inputs)))
    out = op.output.dtype
    if op.key.kind in ("scale", "shift"):
        np.testing.assert_array_equal(found, wanted)
    elif out in (U8, I16):
        assert np.abs(found - wanted).max() <= 1
    else:
        precision = {F32: 1e-5, F16: 1e-3, F8: 0.13}[out]
        np.testing.assert_allclose(found, wanted, rtol=precision, atol=precision)


ROW_DTYPES = [(F32, F32), (F32, U8), (U8, F32), (U8, U8), (F16, F16), (U8, F16), (F16, U8), (F32, I16), (I16, F32), (F16, F8)]


@pytest.mark.parametrize("kind", ["layer_norm", "softmax", "l2_normalize", "scale", "shift"])
@RELAXED
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 300)),
    dtypes=st.sampled_from(ROW_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_functions_of_rows_agree(kind, shape, dtypes, seed):
    check_row_op(*row_op(kind, shape, dtypes, seed))


@pytest.mark.parametrize("kind", ["layer_norm", "softmax", "l2_normalize"])
@FEW
@given(rows=st.integers(1, 5), length=st.integers(200, 1500), seed=st.integers(0, 2**16))
def test_rows_too_long_for_registers_agree(kind, monkeypatch, rows, length, seed):
    monkeypatch.setattr(row_blocks, "MOST_ELEMENTS", 1)
    monkeypatch.setattr(row_blocks, "MOST_THREADS", 64)
    monkeypatch.setattr(row_blocks, "THREADS", 64)
    check_row_op(*row_op(kind, (rows, length), (F32, F32), seed))
