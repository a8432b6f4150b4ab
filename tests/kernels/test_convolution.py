"""Compiled convolutions against the NumPy reference, bit for bit, over shapes that are not pretty."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import TARGETS, make_op, random_inputs, run_kernel, target_named

from qsearch.models.graph import Conv
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def convolution(conv: Conv, image: tuple[int, int, int, int], channels: int, dtypes: tuple[str, ...], seed: int) -> Op:
    """A random int8 or float convolution; dtypes are input, [residual], output."""
    n, height, width, _ = image
    top, left, bottom, right = conv.padding
    rows = (height + top + bottom - conv.dilation[0] * (conv.kernel[0] - 1) - 1) // conv.stride[0] + 1
    cols = (width + left + right - conv.dilation[1] * (conv.kernel[1] - 1) - 1) // conv.stride[1] + 1
    out = (n, rows, cols, channels)
    residual, integer = len(dtypes) == 3, dtypes[0] == "uint8"
    shapes = (image, out, out) if residual else (image, out)
    key = OpKey("conv2d", shapes, dtypes, "int8" if integer else "fp32", conv, residual=residual, clipped=True)
    rng = np.random.default_rng(seed)
    weight_shape = (channels, *conv.kernel, image[3] // conv.groups)
    zero_points = rng.integers(0, 256, 3)
    constants = scalars(
        a_zero_point=zero_points[0],
        b_zero_point=zero_points[1],
        zero_point=zero_points[2],
        qmin=int(zero_points[2]) // 2,
        qmax=250,
        b_multiplier=0.37,
        multiplier=3.1,
        low=-4.0,
        high=60.0,
    )
    if integer:
        reach = 127 * 255 * np.prod(weight_shape[1:])
        constants["weight"] = rng.integers(-127, 128, weight_shape, dtype=np.int8)
        constants["bias"] = rng.integers(-reach // 4, reach // 4 + 1, channels).astype(np.int32)
        constants["multiplier"] = (rng.random(channels) * 400 / reach).astype(np.float32)
    else:
        constants["weight"] = rng.standard_normal(weight_shape).astype(np.float32)
        constants["bias"] = rng.standard_normal(channels).astype(np.float32)
    return make_op(key, **constants)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Conv, tuple[int, int, int, int], int]:
    """Geometry, image and output channels of a convolution that has an output."""
    kernel = (draw(st.sampled_from([1, 2, 3, 5, 7])), draw(st.sampled_from([1, 3, 4, 11])))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    height = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 17)) if reach[0] <= 17 else reach[0]
    width = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 21)) if reach[1] <= 21 else reach[1]
    inputs, outputs = draw(st.integers(1, 19)), draw(st.integers(1, 41))
    conv = Conv(kernel, stride, padding, dilation, groups)  # type: ignore[arg-type]
    return conv, (draw(st.integers(1, 2)), height, width, inputs * groups), outputs * groups


INTEGER_DTYPES = [
    ("uint8", "uint8"),
    ("uint8", "float32"),
    ("uint8", "uint8", "uint8"),
    ("uint8", "float32", "uint8"),
    ("uint8", "uint8", "float32"),
]


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=convolutions(), dtypes=st.sampled_from(INTEGER_DTYPES), seed=st.integers(0, 2**16))
def test_int8_convolution_is_exact(target, case, dtypes, seed):
    conv, image, channels = case
    op = convolution(conv, image, channels, dtypes, seed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(
    case=convolutions(),
    channels=st.sampled_from([2, 7, 16, 17, 40, 64]),
    dtypes=st.sampled_from(INTEGER_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_int8_depthwise_is_exact(target, case, channels, dtypes, seed):
    conv, image, _ = case
    depthwise = Conv(conv.kernel, conv.stride, conv.padding, conv.dilation, channels)
    op = convolution(depthwise, (*image[:3], channels), channels, dtypes, seed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(rows=st.integers(1, 9), features=st.integers(1, 300), outputs=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_int8_linear_is_exact(target, rows, features, outputs, seed):
    op = convolution(Conv(), (rows, 1, 1, features), outputs, ("uint8", "float32"), seed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=10)
@given(
    case=convolutions(),
    dtypes=st.sampled_from([("float32", "float32"), ("float32", "uint8", "float32"), ("float32", "float32", "uint8")]),
    seed=st.integers(0, 2**16),
)
def test_float_convolution_agrees(target, case, dtypes, seed):
    """Float sums are ordered differently on every target: rounding apart, not bit for bit."""
    conv, image, channels = case
    op = convolution(conv, image, channels, dtypes, seed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key)
    found, expected = (x.astype(np.float64) for x in (run_kernel(op, inputs, target_named(target)), run_op(op, inputs)))
    tolerance = 1 if dtypes[-1] == "uint8" else 1e-3
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("image", "channels", "conv"),
    [
        # Shapes that real networks have, where tiles, blocks and prefetching take other paths.
        ((1, 112, 112, 32), 16, Conv()),
        ((1, 56, 56, 24), 144, Conv()),
        ((1, 14, 14, 40), 40, Conv((5, 5), (1, 1), (2, 2, 2, 2), groups=40)),
        ((1, 7, 7, 320), 1280, Conv()),
        ((1, 1, 1, 1280), 1000, Conv()),
        ((1, 64, 64, 64), 24, Conv((3, 3), (2, 2), (0, 0, 1, 1))),
        ((1, 96, 96, 3), 32, Conv((7, 7), (2, 2), (3, 3, 3, 3))),
    ],
)
def test_shapes_of_real_networks_are_exact(image, channels, conv):
    op = convolution(conv, image, channels, ("uint8", "uint8"), 5)
    inputs = random_inputs(np.random.default_rng(6), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named("host")), run_op(op, inputs))
