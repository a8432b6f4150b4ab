"""CUDA convolutions, executed without a GPU, against the NumPy reference: integers bit for bit."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import run_emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import random_inputs
from test_channel_clip import clipping
from test_convolution import CASES, FLOAT_DTYPES, INTEGER_DTYPES, RELAXED, convolution, convolutions, largest_integers
from test_weight_groups import FORMS, grouped

from qsearch.kernels.cuda.conv_layout import swizzle
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.conv_tensor import candidate_tiles, conv2d, conv2d_kernel
from qsearch.kernels.cuda.tile import Tile
from qsearch.models.graph import Conv
from qsearch.quantize.program import FLOATS, Op
from qsearch.quantize.reference import run_op

SAME = Conv((3, 3), padding=(1, 1, 1, 1))
SEEDS = st.integers(0, 2**16)
INT8 = [*INTEGER_DTYPES, *CASES["int8"], ("uint8", "float16"), ("uint8", "float16", "uint8")]


def small(case):
    """The emulator takes its time: smaller images and fewer channels."""
    conv, (n, height, width, inputs), outputs = case
    return conv, (n, min(height, 9), min(width, 11), inputs), outputs


def some_convolutions():
    def has_an_output(case):
        conv, image, _ = case
        reach = [d * (k - 1) + 1 for k, d in zip(conv.kernel, conv.dilation, strict=True)]
        top, left, bottom, right = conv.padding
        return reach[0] <= image[1] + top + bottom and reach[1] <= image[2] + left + right and not depthwise(conv, image)

    return convolutions().map(small).filter(has_an_output)


def depthwise(conv, image):
    return conv.groups > 1 and conv.groups == image[3]


def check_exact(op: Op, seed: int, tile: Tile | None = None, arch: str = "sm_90") -> None:
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, largest_integers(op.key, seed)[0])
    halves = [x.astype(dtype) for x, dtype in zip(inputs, op.key.dtypes[:-1], strict=True)]
    found = run_emulated(op, halves, arch, conv2d_kernel(ConvPlan(op.key, arch, tile)) if tile else None)
    np.testing.assert_array_equal(found, reference(op, halves))


def reference(op: Op, inputs: list[np.ndarray]) -> np.ndarray:
    """What float16 values would come to in float32, rounded where the output is float16."""
    wide = tuple("float32" if dtype == "float16" else dtype for dtype in op.key.dtypes)
    key = replace(op.key, dtypes=wide, precision="fp32" if op.key.precision in ("fp16", "tf32") else op.key.precision)
    plain = replace(op, key=key, output=replace(op.output, dtype=wide[-1]))
    value = run_op(plain, [x.astype(dtype) for x, dtype in zip(inputs, wide, strict=False)])
    return np.clip(value, -65504, 65504).astype(np.float16) if op.key.dtypes[-1] == "float16" else value


@settings(RELAXED, max_examples=25)
@given(case=some_convolutions(), dtypes=st.sampled_from(INT8), seed=SEEDS)
def test_int8_is_exact(case, dtypes, seed):
    op = convolution(*case, dtypes, seed)
    check_exact(clipping(op, seed) if seed % 3 == 0 and dtypes[-1] != "float16" else op, seed)


@settings(RELAXED, max_examples=10)
@given(rows=st.integers(1, 40), features=st.integers(1, 300), outputs=st.integers(1, 100), seed=SEEDS)
def test_int8_linear_is_exact(rows, features, outputs, seed):
    check_exact(convolution(Conv(), (rows, 1, 1, features), outputs, ("uint8", "float32"), seed), seed)


def half(op: Op) -> Op:
    weight = op.constants["weight"].astype(np.float16)
    return replace(op, key=replace(op.key, precision="fp16"), constants=op.constants | {"weight": weight})


HALF_DTYPES = [
    ("float16", "float16"),
    ("float16", "float16", "float16"),
    ("float16", "uint8", "float32"),
    ("float16", "float32", "uint8"),
    ("float16", "int16"),
    ("float16", "int16", "float16"),
]


# Float layers' outputs that are in no unit but one: their multiplier is one.
FLOAT_OUTPUTS = ("float32", "float16")


def check_close(op: Op, seed: int, tolerance: float, tile: Tile | None = None) -> None:
    if op.key.dtypes[-1] in FLOAT_OUTPUTS:
        op.constants["floats"][FLOATS.index("multiplier")] = 1
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, 100)
    inputs = [x.astype(dtype) for x, dtype in zip(inputs, op.key.dtypes[:-1], strict=True)]
    kernel = conv2d_kernel(ConvPlan(op.key, "sm_90", tile)) if tile else None
    found, expected = (x.astype(np.float64) for x in (run_emulated(op, inputs, kernel=kernel), reference(op, inputs)))
    largest = 1 if op.key.dtypes[-1] in ("uint8", "int16") else tolerance * max(1, np.abs(expected).max())
    assert np.abs(found - expected).max() <= largest


@settings(RELAXED, max_examples=15)
@given(case=some_convolutions(), dtypes=st.sampled_from(HALF_DTYPES), seed=SEEDS)
def test_fp16_agrees(case, dtypes, seed):
    check_close(half(convolution(*case, dtypes, seed, "fp32")), seed, 1e-3)


@settings(RELAXED, max_examples=8)
@given(case=some_convolutions(), dtypes=st.sampled_from(CASES["w4a8"]), seed=SEEDS)
def test_w4a8_is_exact(case, dtypes, seed):
    check_exact(convolution(*case, dtypes, seed, "w4a8"), seed)


@settings(RELAXED, max_examples=12)
@given(case=some_convolutions(), form=st.sampled_from(FORMS), seed=SEEDS)
def test_w4a8_in_groups_is_exact(case, form, seed):
    check_exact(grouped(convolution(*case, ("uint8", "uint8"), seed, "w4a8"), form, seed), seed)


@settings(RELAXED, max_examples=10)
@given(case=some_convolutions(), dtypes=st.sampled_from(CASES["int16"]), seed=SEEDS)
def test_int16_is_exact(case, dtypes, seed):
    check_exact(convolution(*case, dtypes, seed, "int16"), seed)


@settings(RELAXED, max_examples=10)
@given(case=some_convolutions(), dtypes=st.sampled_from([*FLOAT_DTYPES, ("float32", "float16")]), seed=SEEDS)
def test_fp32_agrees(case, dtypes, seed):
    check_close(convolution(*case, dtypes, seed, "fp32"), seed, 1e-5 if dtypes[-1] == "float32" else 1e-3)


@settings(RELAXED, max_examples=6)
@given(case=some_convolutions(), dtypes=st.sampled_from(FLOAT_DTYPES), seed=SEEDS)
def test_tf32_agrees(case, dtypes, seed):
    op = convolution(*case, dtypes, seed, "fp32")
    check_close(replace(op, key=replace(op.key, precision="tf32")), seed, 2e-3)


FP8 = "float8_e4m3fn"


def eighths(op: Op, seed: int) -> Op:
    """A float32 layer as fp8: its values rounded, a multiplier per channel."""
    multiplier = np.random.default_rng(seed).uniform(0.5, 2, op.output.shape[-1]).astype(np.float32)
    constants = op.constants | {"weight": op.constants["weight"].astype(ml_dtypes.float8_e4m3fn), "multiplier": multiplier}
    return replace(op, key=replace(op.key, dtypes=(FP8, *op.key.dtypes[1:]), precision="fp8"), constants=constants)


# Of the input's dtype nothing is left.
FP8_DTYPES = [("float32", "float32"), ("float32", "uint8", "float32"), ("float32", "float16", "float32"), ("float32", FP8, FP8)]


@settings(RELAXED, max_examples=6)
@given(case=some_convolutions(), dtypes=st.sampled_from(FP8_DTYPES), seed=SEEDS)
def test_fp8_agrees(case, dtypes, seed):
    op = eighths(convolution(*case, dtypes, seed, "fp32"), seed)
    op.constants["floats"][FLOATS.index("multiplier")] = 1
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, 100)
    inputs = [x.astype(ml_dtypes.float8_e4m3fn if i == 0 else op.key.dtypes[i]) for i, x in enumerate(inputs)]
    found, expected = (x.astype(np.float32) for x in (run_emulated(op, inputs), run_op(op, inputs)))
    # Sums that are ordered differently may round to the neighbour, an eighth away at most.
    np.testing.assert_allclose(found, expected, rtol=0.125 if dtypes[-1] == FP8 else 1e-4, atol=1e-3)
    assert (found == expected).mean() > 0.9 or dtypes[-1] != FP8


def test_fp8_needs_its_matrix_units():
    op = eighths(convolution(SAME, (1, 5, 5, 32), 16, ("float32", "float32"), 1, "fp32"), 1)
    assert conv2d(op.key, "sm_86") is None and conv2d(op.key, "sm_89") is not None


@pytest.mark.parametrize("units", [2, 4, 8, 16])
def test_eight_rows_lie_in_different_banks(units):
    """Of 16-byte units with one number, as matrices are read, and of eight units that follow one another, as copies write."""
    for first in range(0, 64, 8):
        for unit in range(units):
            rows = range(first, first + 8)
            assert len({(row * units + (unit ^ swizzle(row, units))) % 8 for row in rows}) == 8
    for start in range(0, 64 * units, 8):
        places = [divmod(i, units) for i in range(start, start + 8)]
        assert len({(row * units + (unit ^ swizzle(row, units))) % 8 for row, unit in places}) == 8


TILES = [
    Tile(16, 16, 32, (1, 1, 1), 2),
    Tile(64, 32, 64, (2, 2, 1), 3),
    Tile(32, 48, 128, (1, 1, 4), 2),
    Tile(128, 128, 64, (2, 4, 1), 3),
    Tile(64, 96, 32, (2, 2, 1), 4),
]


@pytest.mark.parametrize("precision", ["int8", "w4a8"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_is_exact(tile, precision):
    for conv, channels in ((Conv(), 208), (SAME, 40), (Conv((3, 2), (2, 1), groups=2), 6)):
        image = (1, 9, 10, channels)
        op = convolution(conv, image, 136, ("uint8", "uint8", "uint8"), 3, precision)
        check_exact(op, 3, tile)


@pytest.mark.parametrize(
    "tile", [Tile(16, 32, 32, (1, 2, 1), 2), Tile(64, 64, 64, (2, 2, 2), 2), Tile(32, 48, 128, (1, 1, 4), 3)], ids=str
)
def test_every_tile_without_matrix_units(tile):
    check_exact(convolution(SAME, (1, 7, 8, 22), 50, ("int16", "int16", "int16"), 3, "int16"), 3, tile)
    check_close(convolution(SAME, (1, 7, 8, 22), 50, ("float32", "float32", "float32"), 3, "fp32"), 3, 1e-5, tile)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_other_architectures_are_exact(arch):
    check_exact(convolution(SAME, (1, 12, 12, 32), 64, ("uint8", "uint8"), 3), 3, arch=arch)


ANYTHING = {
    "int8": INT8,
    "w4a8": CASES["w4a8"],
    "int16": CASES["int16"],
    "fp16": HALF_DTYPES,
    "fp32": FLOAT_DTYPES,
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ANYTHING)
@settings(RELAXED, max_examples=80)
@given(case=some_convolutions(), data=st.data(), seed=SEEDS)
def test_many_convolutions_with_any_tile(precision, case, data, seed):
    dtypes = data.draw(st.sampled_from(ANYTHING[precision]))
    op = convolution(*case, dtypes, seed, "fp32" if precision == "fp16" else precision)
    if precision == "w4a8" and seed % 2:
        op = grouped(op, data.draw(st.sampled_from(FORMS)), seed)
    if precision == "fp16":
        op = half(op)
    tile = data.draw(st.sampled_from(ConvPlan(op.key, "sm_90").candidates[:200:7]))
    if precision.startswith("fp"):
        check_close(op, seed, 1e-5 if precision == "fp32" else 1e-3, tile)
    else:
        check_exact(op, seed, tile)


@pytest.mark.slow
@settings(RELAXED, max_examples=40)
@given(rows=st.integers(1, 200), features=st.integers(1, 700), outputs=st.integers(1, 300), data=st.data(), seed=SEEDS)
def test_many_linear_layers_with_any_tile(rows, features, outputs, data, seed):
    op = convolution(Conv(), (rows, 1, 1, features), outputs, ("uint8", "float32"), seed)
    check_exact(op, seed, data.draw(st.sampled_from(ConvPlan(op.key, "sm_90").candidates[:200:7])))


def test_depthwise_is_another_kernel():
    op = convolution(Conv((3, 3), groups=32), (1, 5, 5, 32), 32, ("uint8", "uint8"), 1)
    assert conv2d(op.key, "sm_90") is None


def test_candidate_tiles_are_exact_and_differ():
    op = convolution(SAME, (1, 10, 10, 64), 40, ("uint8", "uint8"), 3)
    tiles = candidate_tiles(op.key, "sm_90", 6)
    assert len(set(tiles)) == 6 and len({(tile.rows, tile.columns) for tile in tiles}) >= 3
    assert tiles[0] == ConvPlan(op.key, "sm_90").tile
    for tile in tiles[1:4]:
        check_exact(op, 3, tile)


def test_the_packed_weight_holds_four_bits_a_weight_and_its_tables():
    op, count = convolution(Conv(), (1, 7, 7, 320), 1280, ("uint8", "uint8"), 1, "w4a8"), 320 * 1280
    tile = Tile(64, 64, 64, (1, 2, 1), 3)
    sizes = {}
    for form in [(16, False), (16, True), (0, True)]:
        some = grouped(op, form, 1)
        sizes[form] = conv2d_kernel(ConvPlan(some.key, "sm_90", tile)).pack_weight(some.constants).nbytes
    assert sizes == {
        (16, False): count // 2 + count // 32,
        (16, True): count // 2 + count // 32 + count // 16,
        (0, True): count // 2 + 1280,
    }
