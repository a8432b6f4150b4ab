"""Modules that take pixels and give classes compute the integers, and choose the classes, of those that do not."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import TARGETS, make_op, run_kernel, target_named
from networks import SHAPE, network, ranges_of

from qsearch.build.cache import KernelCache
from qsearch.build.foreign import run_foreign
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.data import Preprocessing
from qsearch.export.runner import normalised
from qsearch.measure.accuracy import run_images
from qsearch.quantize.lower import lower
from qsearch.quantize.program import OpKey, Program
from qsearch.quantize.reference import run_op, run_program
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.whole_pictures import normalised_pixels, with_preprocessing

PREPROCESSING = Preprocessing(None, (SHAPE[2], SHAPE[3]), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def program_of(name: str, **settings) -> Program:
    model, _ = network(name)
    config = QuantConfig.model_validate(settings)
    return lower(model, config, ranges_of(model, config), WeightStore())


def pictures(count: int) -> np.ndarray:
    """Every value of every channel is among them."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, SHAPE[2], SHAPE[3], 3), dtype=np.uint8)


def run(program: Program, image: np.ndarray) -> dict[str, np.ndarray]:
    return run_program(program, image, lambda op, inputs: run_foreign(op.key, op.constants, inputs))


@pytest.mark.parametrize("name", ["residual", "excite", "foreign", "vit"])
@pytest.mark.parametrize("precision", ["int8", "int16", "fp32"])
def test_the_same_numbers_and_the_same_class(name: str, precision: str) -> None:
    program = program_of(name, default_precision=precision)
    whole = with_preprocessing(program, PREPROCESSING)
    for picture in pictures(3):
        image = normalised(picture[None], PREPROCESSING.to_json())
        expected, found = run(program, image), run(whole, picture[None])
        assert all(np.array_equal(expected[op.output.name], found[op.output.name]) for op in program.ops)
        assert found["class"].dtype == np.int32
        assert found["class"] == expected[program.output.name].argmax(1)


def test_a_table_is_the_preprocessing() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1).repeat(3, -1)
    assert np.array_equal(normalised(values, PREPROCESSING.to_json())[0, :, :, 0].T, normalised_pixels(PREPROCESSING))


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_compiled(precision: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    linker = Linker(KernelCache(tmp_path_factory.mktemp("kernels"), open_target("host")))
    program = program_of("residual", default_precision=precision)
    whole = linker.build(with_preprocessing(program, PREPROCESSING))
    given = pictures(8)
    logits = run_images(linker.build(program).open, normalised(given, PREPROCESSING.to_json()))
    classes = run_images(whole.open, given)
    assert classes.dtype == np.int32 and classes.shape == (8,)
    assert np.array_equal(classes, logits.argmax(1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (1, 9, 1, 1), (2, 64, 33, 3)])
def test_tables_per_channel(target: str, dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    table = (100 * rng.random((256, shape[-1]))).astype(dtype)
    op = make_op(OpKey("pixels", (shape, shape), ("uint8", dtype)), table=table)
    given = [rng.integers(0, 256, shape, dtype=np.uint8)]
    assert np.array_equal(run_kernel(op, given, target_named(target)), run_op(op, given))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("length", [1, 2, 10, 1000])
def test_the_first_of_the_largest(target: str, length: int) -> None:
    rng = np.random.default_rng(length)
    # Few distinct values, so that the largest occurs more than once.
    given = [np.float32(rng.integers(-5, 5, (3, length)))]
    op = make_op(OpKey("argmax", ((3, length), (3,)), ("float32", "int32")))
    assert np.array_equal(run_kernel(op, given, target_named(target)), given[0].argmax(1))
