"""New scales by replaced bytes: the module then computes what the reference computes of the program with these scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import images, network, ranges_of

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.packed import pack_module
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.errors import BundleError
from qsearch.export import rescale
from qsearch.export.marked_constants import MarkedModule, mark_constants
from qsearch.export.scales_record import describe_scales, lookup_tables
from qsearch.quantize import program as definition
from qsearch.quantize.affine import affine_from_range
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Op, Program
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore

NAMES = ("residual", "bottlenecks", "excite", "shuffle")
MODELS = {name: network(name)[0] for name in NAMES}
RANGES = {name: ranges_of(model, QuantConfig()) for name, model in MODELS.items()}
INPUT_RANGE = (-6.0, 6.0)
# Arithmetic of int8 kernels differs between these; the second adds an offset to what it multiplies.
TARGETS = ("host", "portable")


@dataclass
class Exported:
    """A program, its record and its module as bytes."""

    program: Program
    ops: list[Op]
    record: dict[str, Any]
    module: bytes
    packed: Any

    def run(self, module: bytes, image: np.ndarray) -> np.ndarray:
        self.packed.file.write_bytes(module)
        machine = replace(self.packed).open()
        return machine["main"](tvm.runtime.tensor(image)).numpy()


@pytest.fixture(scope="module", params=TARGETS)
def linker(request, tmp_path_factory):
    return Linker(KernelCache(tmp_path_factory.mktemp("kernels"), open_target(request.param)))


def exported(linker: Linker, name: str, folder: Path, **options: Any) -> Exported:
    program = lower(MODELS[name], QuantConfig.model_validate(options), RANGES[name], WeightStore())
    record, calls = describe_scales(program, MODELS[name], INPUT_RANGE), linker.calls(program.ops)
    marked = mark_constants(record, calls)
    packed = pack_module(linker.build(program, calls=marked.calls), folder / "marked.vm", kept=True)
    record, module = marked.located(packed.file.read_bytes())
    return Exported(program, [op for op, _ in calls], record, module, packed)


def with_other_scales(exported: Exported, scales: list[tuple[float, int]]) -> Program:
    """The program with other scales, operation by operation."""
    record, ops = exported.record, list(exported.program.ops)
    tables = lookup_tables(record, scales)
    for number, row in enumerate(record["ops"]):
        op = exported.ops[row["call"]]
        known = rescale.known_of(record, row) | {"table": tables.get(number)}
        mine = {name: array for name, array in op.constants.items() if name in row["constants"]}
        changed = rescale.rescaled(row, mine, rescale.scales_of(record), scales, known)
        ops[ops.index(op)] = replace(op, constants=op.constants | changed)
    return replace(exported.program, ops=tuple(ops))


def drawn(record: dict[str, Any], seed: int) -> list[tuple[float, int]]:
    """Random scales: ranges from a third of what they were to three times that."""
    random, scales = np.random.default_rng(seed), rescale.scales_of(record)
    for number, value in enumerate(record["values"]):
        if not value["replaceable"]:
            continue
        scale, zero = scales[number]
        low, high = -zero * scale, (255 - zero) * scale
        low, high = low * random.uniform(0.3, 3), high * random.uniform(0.3, 3)
        if value["clip"] is not None:
            low = max(low, value["clip"][0])
        affine = affine_from_range(value["name"], low, high)
        scales[number] = float(affine.scale), affine.zero_point
    return scales


def test_positions_are_those_of_the_definition():
    assert rescale.INTEGERS == definition.INTEGERS
    assert rescale.FLOATS == definition.FLOATS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["int8", "w4a8"])
def test_a_module_with_other_scales_is_the_reference_bit_for_bit(linker, tmp_path, name, precision):
    made = exported(linker, name, tmp_path, default_precision=precision)
    image = images(1, 7)
    assert np.array_equal(made.run(made.module, image), run_program(made.program, image)[made.program.output.name])
    for seed in range(2):
        scales = drawn(made.record, seed)
        module = rescale.with_scales(made.record, made.module, scales, lookup_tables(made.record, scales))
        assert len(module) == len(made.module) and module != made.module
        program = with_other_scales(made, scales)
        assert np.array_equal(made.run(module, image), run_program(program, image)[program.output.name])


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mixed_precisions(linker, tmp_path, data):
    """Integer layers beside float ones: conversions take the new scales; float layers may round otherwise."""
    name = data.draw(st.sampled_from(NAMES))
    layers = [layer.name for layer in MODELS[name].graph.layers]
    precision = {layer: data.draw(st.sampled_from(["int8", "int16", "w4a8", "fp32"])) for layer in layers}
    made = exported(linker, name, tmp_path, precision=precision)
    scales, image = drawn(made.record, 3), images(1, 8)
    module = rescale.with_scales(made.record, made.module, scales, lookup_tables(made.record, scales))
    program = with_other_scales(made, scales)
    expected = run_program(program, image)[program.output.name]
    np.testing.assert_allclose(made.run(module, image), expected, atol=0.02 * np.abs(expected).max() + 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_other_scales_are_those_of_lowering_with_other_ranges(tmp_path, name):
    """Up to one step of an accumulator in biases and one bit in multipliers, which are made of what is there."""
    linker = Linker(KernelCache(tmp_path, open_target("host")))
    record_of = exported(linker, name, tmp_path)
    wider = {node: (1.7 * low, 1.7 * high) for node, (low, high) in RANGES[name].items()}
    wanted = lower(MODELS[name], QuantConfig(), wider, WeightStore())
    by_output = {op.output.name: op for op in wanted.ops}
    scales = rescale.scales_of(record_of.record)
    for row in record_of.record["ops"]:
        op = record_of.ops[row["call"]]
        for number, value in zip([*row["inputs"], row["output"]], [*op.inputs, op.output.name], strict=True):
            if number >= 0:
                affine = wanted.affines[value]
                scales[number] = float(affine.scale), affine.zero_point
    program = with_other_scales(record_of, scales)
    for op in program.ops:
        for constant, array in op.constants.items():
            other = by_output[op.output.name].constants[constant]
            if constant == "bias":
                assert np.abs(array.astype(np.int64) - other).max() <= 1
            elif constant == "multiplier":
                np.testing.assert_allclose(array, other, rtol=2e-7)
            else:
                np.testing.assert_array_equal(array, other, err_msg=f"{op.name} {constant}")


def test_the_way_back_is_exact_for_the_same_scales_and_near_for_others(linker, tmp_path):
    made = exported(linker, "residual", tmp_path)
    assert rescale.with_scales(made.record, made.module, rescale.scales_of(made.record), {}) == made.module
    scales = drawn(made.record, 5)
    module = rescale.with_scales(made.record, made.module, scales, {})
    values = [value | {"scale": s, "zero_point": z} for value, (s, z) in zip(made.record["values"], scales, strict=True)]
    back = rescale.with_scales(made.record | {"values": values}, module, rescale.scales_of(made.record), {})
    for row in made.record["ops"]:
        before, after = (rescale.unpacked(made.record, one, row) for one in (made.module, back))
        if "bias" in before:
            steps = max(1.0, scales[row["inputs"][0]][0] / made.record["values"][row["inputs"][0]]["scale"])
            assert np.abs(before["bias"].astype(float) - after["bias"]).max() <= steps
        assert np.array_equal(before["integers"], after["integers"])


def test_a_mark_that_is_not_there_once(tmp_path):
    linker = Linker(KernelCache(tmp_path, open_target("host")))
    made = exported(linker, "residual", tmp_path)
    mark = np.arange(5, dtype=np.int32)
    marked = MarkedModule(made.record, [], {(0, "integers"): (mark, mark)})
    for module in (b"", 2 * (np.int64(20).tobytes() + mark.tobytes())):
        with pytest.raises(BundleError, match="not once in the module"):
            marked.located(module)


def test_scales_that_a_module_cannot_have(tmp_path):
    linker = Linker(KernelCache(tmp_path, open_target("host")))
    made = exported(linker, "residual", tmp_path)
    scales = rescale.scales_of(made.record)
    layer = next(row for row in made.record["ops"] if row["kind"] == "conv2d")
    scales[layer["inputs"][0]] = 1e-12, scales[layer["inputs"][0]][1]
    with pytest.raises(rescale.ScaleProblem, match="would overflow"):
        rescale.with_scales(made.record, made.module, scales, {})


def test_records_that_cannot_be_read(tmp_path):
    with pytest.raises(rescale.ScaleProblem, match="is missing"):
        rescale.read_record(tmp_path / "none.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(rescale.ScaleProblem, match="is damaged"):
        rescale.read_record(tmp_path / "junk.npz")
    rescale.write_record(tmp_path / "old.npz", {"format": rescale.FORMAT, "version": 0, "arrays": {}})
    with pytest.raises(rescale.ScaleProblem, match="format qsearch-scales 0"):
        rescale.read_record(tmp_path / "old.npz")
