"""Prepared weights are kept as far as they fit; what was forgotten is made again, the same."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import MODELS, RANGES

from qsearch.config import QuantConfig, WeightSettings
from qsearch.qtype import INT8
from qsearch.quantize.kept_weights import FLOATS_KEPT, MOST_KEPT, KeptWeights, most_kept
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import WeightStore


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=40))
def test_the_most_recently_used_are_kept(most, asked):
    kept, order, sizes = KeptWeights(most), [], {}
    for key, size in asked:
        found = kept.get(key)
        assert (found is not None) == (key in order)
        if found is None:
            kept.put(key, f"{key}", size)
            sizes[key] = size
        else:
            assert found == f"{key}"
            order.remove(key)
        order.append(key)
        while sum(sizes[one] for one in order) > most and len(order) > 1:
            order.pop(0)
        assert kept.bytes == sum(sizes[one] for one in order)


def test_what_is_kept_is_the_same_object_and_what_was_forgotten_the_same_numbers():
    weight = np.random.default_rng(0).normal(size=(8, 4, 3, 3)).astype(np.float32)
    settings_ = WeightSettings()
    ample, scarce = WeightStore(), WeightStore(kept=KeptWeights(1))
    first = ample.quantized("a", weight, settings_, INT8.weight)
    assert ample.quantized("a", weight, settings_, INT8.weight) is first
    before = scarce.quantized("a", weight, settings_, INT8.weight)
    scarce.floats("a", weight)
    after = scarce.quantized("a", weight, settings_, INT8.weight)
    assert after is not before
    np.testing.assert_array_equal(after.values, first.values)
    np.testing.assert_array_equal(after.scale, first.scale)


def test_variants_of_a_model_share_a_place_without_mixing():
    kept, model = KeptWeights(), MODELS["residual"]
    doubled = {name: 2 * weight for name, weight in model.parameters.weight.items()}
    other = replace(model, parameters=replace(model.parameters, weight=doubled))
    for precision in ("int8", "int16", "fp32"):
        config = QuantConfig(default_precision=precision)
        shared = [lower(one, config, RANGES["residual"], WeightStore(kept=kept)) for one in (model, other)]
        alone = [lower(one, config, RANGES["residual"], WeightStore()) for one in (model, other)]
        for mine, own in zip(shared, alone, strict=True):
            for a, b in zip(mine.ops, own.ops, strict=True):
                for name, array in a.constants.items():
                    np.testing.assert_array_equal(array, b.constants[name])


def test_a_large_model_may_keep_more():
    model = MODELS["residual"]
    assert most_kept(model) == MOST_KEPT
    wide = np.broadcast_to(np.float32(1), (MOST_KEPT // FLOATS_KEPT, 1, 1, 1))
    large = replace(model, parameters=replace(model.parameters, weight={"a": wide}))
    assert most_kept(large) == 4 * MOST_KEPT
