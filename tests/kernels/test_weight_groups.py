"""4-bit weights with scales and offsets of groups: compiled kernels against the reference, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import random_inputs, run_kernel, target_named
from test_channel_clip import any_layer, clipping
from test_convolution import CASES, RELAXED, convolution
from test_isa import other_isa  # noqa: F401
from test_threads import CASES as SHARED
from test_threads import two_threads  # noqa: F401

from qsearch.build.target import Target, open_target
from qsearch.kernels.cpu import conv_plan, describe_kernel
from qsearch.models.graph import Conv
from qsearch.quantize.group_scales import spread
from qsearch.quantize.program import Op
from qsearch.quantize.reference import run_op

TARGETS = ("host", "portable")
# Size of a group and whether there are offsets.
FORMS = [(8, False), (16, False), (24, False), (64, False), (0, True), (8, True), (16, True), (32, True)]


def grouped(op: Op, form: tuple[int, bool], seed: int) -> Op:
    """The same layer with weights in random groups, all levels of which occur."""
    size, offsets = form
    rng, shape = np.random.default_rng(seed + 3), op.constants["weight"].shape
    groups = (*shape[:3], -(-shape[3] // size)) if size else (shape[0], 1, 1, 1)
    scale = rng.integers(1, 16, groups, np.uint8)
    limit = 127 - 8 * scale.astype(int) if size else 119
    offset = rng.integers(-limit, limit + 1, groups).astype(np.int8)
    whole = rng.integers(-8, 8, shape)
    tables = {}
    if size:
        tables["group_scale"] = scale
        whole = whole * spread(scale, shape, size)
    if offsets:
        tables["group_offset"] = offset
        whole = whole + spread(offset, shape, size)
    multiplier = op.constants["multiplier"] * np.float32(0.1)
    constants = op.constants | tables | {"weight": whole.astype(np.int8), "multiplier": multiplier}
    return replace(op, key=replace(op.key, weight_group=size, weight_offset=offsets), constants=constants)


def assert_exact(op: Op, seed: int, target: Target) -> None:
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target), run_op(op, inputs))


def drawn(case, form, dtypes, seed) -> Op:
    return grouped(convolution(*case, dtypes, seed, "w4a8"), form, seed)


ANY = {
    "case": any_layer(),
    "form": st.sampled_from(FORMS),
    "dtypes": st.sampled_from(CASES["w4a8"]),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=8)
@given(**ANY)
def test_layers_are_exact(target, case, form, dtypes, seed):
    assert_exact(drawn(case, form, dtypes, seed), seed, target_named(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=200)
@given(**ANY)
def test_many_layers_are_exact(target, case, form, dtypes, seed):
    op = drawn(case, form, dtypes, seed)
    assert_exact(clipping(op, seed) if seed % 2 else op, seed, target_named(target))


@settings(RELAXED, max_examples=1)
@given(**ANY)
def test_other_instruction_sets_are_exact(other_isa, case, form, dtypes, seed):  # noqa: F811
    assert_exact(drawn(case, form, dtypes, seed), seed, other_isa)


@pytest.mark.parametrize("form", [(16, False), (16, True)])
@pytest.mark.parametrize(
    ("conv", "image", "outputs"),
    [
        # Channels that fill groups, leave half of one, an odd number of steps, an incomplete step.
        (Conv(), (1, 5, 5, 64), 48),
        (Conv(), (1, 3, 3, 40), 100),
        (Conv(), (1, 3, 3, 36), 33),
        (Conv((3, 3), padding=(1, 1, 1, 1)), (1, 6, 7, 24), 20),
        (Conv((3, 3), padding=(1, 1, 1, 1)), (1, 6, 7, 10), 20),
        (Conv((3, 1), dilation=(2, 2)), (1, 6, 7, 22), 70),
        (Conv((3, 3), (2, 2), groups=3), (1, 9, 9, 54), 48),
        (Conv((5, 5), (1, 1), (2, 2, 2, 2), groups=40), (1, 6, 6, 40), 40),
    ],
)
def test_every_remainder_is_exact(conv, image, outputs, form):
    assert_exact(drawn((conv, image, outputs), form, ("uint8", "uint8"), 5), 5, target_named("host"))


@pytest.mark.parametrize("form", [(16, True)])
@pytest.mark.parametrize("name", ["flat pixels", "columns that do not divide", "groups", "images"])
def test_two_threads_are_exact(name, form, two_threads, monkeypatch):  # noqa: F811
    monkeypatch.setattr(conv_plan, "SHARED_ABOVE", 0)
    conv, image, channels, _ = SHARED[name]
    assert_exact(drawn((conv, image, channels), form, ("uint8", "uint8"), 7), 7, open_target("host", 2))


def test_the_packed_weight_holds_four_bits_a_weight_and_its_tables():
    """Scales take 4 bits of a group, offsets 8."""
    op = convolution(Conv(), (1, 7, 7, 320), 1280, ("uint8", "uint8"), 1, "w4a8")
    isa, count = open_target("host").isa, 320 * 1280
    sizes = {
        form: describe_kernel(grouped(op, form, 1).key, isa).pack_weight(grouped(op, form, 1).constants).nbytes
        for form in [(16, False), (32, False), (16, True), (0, True)]
    }
    assert sizes == {
        (16, False): count // 2 + count // 32,
        (32, False): count // 2 + count // 64,
        (16, True): count // 2 + count // 32 + count // 16,
        (0, True): count // 2 + 1280,
    }
