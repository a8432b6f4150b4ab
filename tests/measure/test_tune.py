"""Tuning: tiles are timed once, remembered with the kernels, used by whoever builds next, and change no result."""

import numpy as np
import tvm
from networks import images, network, ranges_of

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.kernels.cpu import Tile, candidate_tiles, describe_kernel
from qsearch.measure.tune import tune_programs
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import WeightStore

CONFIG = QuantConfig()


def residual():
    model, _ = network("residual")
    return lower(model, CONFIG, ranges_of(model, CONFIG), WeightStore())


def output(linker, program):
    machine = linker.build(program).open()
    return machine["main"](tvm.runtime.tensor(images(1, 8))).numpy()


def test_tuned_tiles_are_remembered_and_change_no_result(tmp_path):
    target, program = open_target("host"), residual()
    linker = Linker(KernelCache(tmp_path, target))
    before, seen = output(linker, program), []
    found = tune_programs(linker, [program], 60.0, lambda done, total: seen.append((done, total)))
    assert found and seen[-1] == (len(found), len(found))
    np.testing.assert_array_equal(output(linker, program), before)
    later = Linker(KernelCache(tmp_path, target))
    assert tune_programs(later, [program], 60.0) == []
    by_name = {op.name: op for op in program.ops if op.key.kind == "conv2d"}
    for kernel in found:
        assert later.tiles.get(by_name[kernel.op].key) == kernel.chosen
        assert kernel.gain >= 1.0


def test_no_kernel_is_begun_after_the_time_given(tmp_path):
    linker = Linker(KernelCache(tmp_path, open_target("host")))
    assert tune_programs(linker, [residual()], 0.0) == []


def test_a_remembered_tile_is_used_and_a_damaged_record_is_ignored(tmp_path):
    target, program = open_target("host"), residual()
    key = next(op.key for op in program.ops if op.name == "expand.0")
    predicted, other = candidate_tiles(key, target.isa, 1, 2)
    linker = Linker(KernelCache(tmp_path, target))
    linker.remember_tile(key, other)
    assert linker._describe(key)[1].variant == describe_kernel(key, target.isa, 1, other).variant
    (tmp_path / f"{linker.tiles.name(key)}.json").write_text("{", encoding="utf-8")
    fresh = Linker(KernelCache(tmp_path, target))
    assert fresh.tiles.get(key) is None
    assert fresh._describe(key)[1].variant == describe_kernel(key, target.isa, 1, predicted).variant
    assert isinstance(predicted, Tile)
