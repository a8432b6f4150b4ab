"""Second-order rounding to the levels of groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsearch.calibrate.input_moments import InputMoments
from qsearch.qtype import W4A8
from qsearch.quantize.group_scales import GroupForm, group_integers, group_weights
from qsearch.quantize.rounding.rounding_file import load_rounding, save_rounding
from qsearch.quantize.rounding.second_order import output_errors, round_in_groups
from qsearch.quantize.weights import weight_scales


def problem(seed: int, shape: tuple[int, int, int, int], groups: int) -> tuple[np.ndarray, InputMoments]:
    """Weights and correlated inputs."""
    rng = np.random.default_rng(seed)
    reads = int(np.prod(shape[1:]))
    mixed = rng.normal(size=(groups, reads, reads)) * rng.uniform(0.1, 2.0, (groups, reads, 1))
    moments = InputMoments(rng.normal(size=(groups, reads)), mixed @ mixed.transpose(0, 2, 1) / reads, 100_000)
    return rng.normal(size=shape).astype(np.float32), moments


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    form=st.sampled_from([GroupForm(8), GroupForm(16, True), GroupForm(0, True)]),
    groups=st.sampled_from([1, 2]),
    inputs=st.integers(1, 24),
    kernel=st.sampled_from([1, 3]),
)
def test_it_stays_on_the_levels_and_errs_less(seed: int, form: GroupForm, groups: int, inputs: int, kernel: int) -> None:
    weight, moments = problem(seed, (6, inputs, kernel, kernel), groups)
    nearest = group_weights(weight, weight_scales(weight, W4A8.weight, "channel_wise", "mse"), form)
    found = round_in_groups("layer", weight, moments, nearest)
    np.testing.assert_array_equal(found.scale, nearest.scale)
    integers = group_integers(found.values, found.group_scale, found.group_offset, found.group)
    assert integers.min() >= -8 and integers.max() <= 7
    again = found.values.astype(np.int16)
    assert np.abs(again).max() <= 127
    before, after = output_errors(weight, nearest, moments), output_errors(weight, found, moments)
    assert after.sum() <= before.sum() * 1.02


def test_what_is_kept_is_the_same(tmp_path: Path) -> None:
    weight, moments = problem(0, (4, 16, 1, 1), 1)
    nearest = group_weights(weight, weight_scales(weight, W4A8.weight, "channel_wise", "mse"), GroupForm(8, True))
    found = round_in_groups("layer", weight, moments, nearest)
    save_rounding(found, tmp_path / "a.npz")
    loaded = load_rounding(tmp_path / "a.npz")
    assert loaded is not None
    for name in ("values", "scale", "group_scale", "group_offset"):
        np.testing.assert_array_equal(getattr(loaded[0], name), getattr(found, name))
    assert loaded[0].group == found.group == 8


def test_correlated_inputs_gain_much() -> None:
    weight, moments = problem(1, (16, 64, 1, 1), 1)
    nearest = group_weights(weight, weight_scales(weight, W4A8.weight, "channel_wise", "mse"), GroupForm(32, True))
    found = round_in_groups("layer", weight, moments, nearest)
    assert output_errors(weight, found, moments).sum() < 0.6 * output_errors(weight, nearest, moments).sum()
    assert pytest.approx(found.scale) == nearest.scale
