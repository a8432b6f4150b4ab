"""tf32 layers: float32 values, weights on tf32's grid, refused by CPU targets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from networks import images, network, ranges_of

from qsearch.build.foreign import run_foreign
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.errors import BuildError
from qsearch.kernels.cpu import describe_kernel
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.weights import rounded_to_tf32

# No subnormals: they have fewer bits.
FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def lowered(name: str, precision: str) -> Program:
    model, _ = network(name)
    return lower(
        model, QuantConfig.model_validate({"default_precision": precision}), ranges_of(model, QuantConfig()), WeightStore()
    )


def outputs(program: Program, x: np.ndarray) -> np.ndarray:
    return run_program(program, x, lambda op, inputs: run_foreign(op.key, op.constants, inputs))[program.output.name]


@given(arrays.arrays(np.float32, (5,), elements=FINITE))
def test_rounding_goes_to_the_nearest_of_eleven_bits(x: np.ndarray) -> None:
    found = rounded_to_tf32(x)
    fraction, _ = np.frexp(found.astype(np.float64))
    assert np.array_equal(fraction * 2**11, np.rint(fraction * 2**11)), "eleven bits are enough"
    _, exponent = np.frexp(x.astype(np.float64))
    assert np.all(np.abs(found.astype(np.float64) - x) <= np.ldexp(0.5, exponent - 11))
    assert np.array_equal(rounded_to_tf32(found), found)


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "excite", "vit"])
def test_a_network_is_nearer_to_float_than_half_a_step_of_its_weights(name: str) -> None:
    program, x = lowered(name, "tf32"), images(2, 3)
    expected = outputs(lowered(name, "fp32"), x[:1])
    error = np.linalg.norm(outputs(program, x[:1]) - expected) / np.linalg.norm(expected)
    assert 0 < error < 2e-3
    assert {value for op in program.ops for value in op.key.dtypes} <= {"float32", "int32"}


def test_depthwise_layers_stay_in_fp32_and_share_its_kernels() -> None:
    kinds = network("convnext")[0].graph.layer_types
    short, plain = ({op.name: op.key for op in lowered("convnext", one).ops} for one in ("tf32", "fp32"))
    assert {kinds[name]: short[name].precision for name in kinds} == {"depthwise": "fp32", "conv": "tf32", "dense": "tf32"}
    assert all(plain[name] == short[name] for name, kind in kinds.items() if kind == "depthwise")


def test_targets_say_where_it_is_known() -> None:
    assert "tf32" in open_target("cuda:sm_80").precisions
    assert "tf32" not in open_target("cuda:sm_75").precisions
    assert "tf32" not in open_target("host").precisions
    op = next(op for op in lowered("residual", "tf32").ops if op.key.precision == "tf32")
    with pytest.raises(BuildError, match="no CPU kernel"):
        describe_kernel(op.key, open_target("host").isa)
