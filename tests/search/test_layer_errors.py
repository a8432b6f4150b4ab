"""Errors of single layers: against the program, against float, and on networks with a known fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lossy_networks import Dead, Outlier, Plain, inputs
from networks import images, network

from qsearch.build.foreign import run_foreign
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import Calibration, QuantConfig
from qsearch.measure.accuracy import mean_divergence
from qsearch.models.graph import Model
from qsearch.models.import_torch import import_model
from qsearch.models.interpret import interpret
from qsearch.quantize.assign import assign_forms
from qsearch.quantize.lower import lower, value_affines
from qsearch.quantize.program import INTEGERS
from qsearch.quantize.reference import run_op, run_program
from qsearch.quantize.weight_store import WeightStore
from qsearch.search.diagnosis.layer_errors import layer_errors, unrounded
from qsearch.search.diagnosis.subject import Subject
from qsearch.search.diagnosis.values import clipped_values, dead_channels


def subject_of(model: Model, config: QuantConfig, data: np.ndarray) -> Subject:
    record, weights = observe(model, data, 16), WeightStore()
    ranges = activation_ranges(record, model, config.calibration, (-6.0, 6.0))
    precision = {name: one.precision for name, one in config.resolve(model.graph.layer_types).items()}
    affines = value_affines(model, assign_forms(model.graph, precision), ranges, weights, config.activations)
    return Subject(model, record, lower(model, config, ranges, weights), precision, affines)


def lossy(factory: type[Plain], config: QuantConfig) -> Subject:
    return subject_of(import_model("lossy", factory().eval(), (1, 3, 16, 16)), config, inputs(40).numpy())


def always(done: int) -> bool:
    return True


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "excite", "vit"])
@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_an_unrounded_layer_rounded_is_the_layer_bit_for_bit(name: str, precision: str) -> None:
    subject = subject_of(network(name)[0], QuantConfig.model_validate({"default_precision": precision}), images(16))
    held = run_program(subject.program, images(1, 3), lambda op, given: run_foreign(op.key, op.constants, given))
    seen = 0
    for op in subject.layer_ops.values():
        if op.output.dtype == "float32":
            continue
        exact = run_op(unrounded(op), [held[name] for name in op.inputs])
        zero_point, qmin, qmax = (int(op.constants["integers"][INTEGERS.index(one)]) for one in ("zero_point", "qmin", "qmax"))
        assert exact.dtype == np.float32
        np.testing.assert_array_equal(np.clip(np.rint(exact) + zero_point, qmin, qmax), held[op.output.name])
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "excite", "vit"])
@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 60.0, 110.0), ("fp8", 15.0, 60.0)])
def test_layers_of_short_floats_have_errors_of_their_own(name: str, precision: str, least: float, most: float) -> None:
    subject = subject_of(network(name)[0], QuantConfig.model_validate({"default_precision": precision}), images(16))
    found, _ = layer_errors(subject, images(1, 3), always)
    assert {one.precision for one in found} == {precision}
    for one in found:
        assert one.snr_db is not None and least < one.snr_db < most
    assert clipped_values(subject) is not None and not [one for one in dead_channels(subject) if one.kind == "rounded_away"]


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "foreign", "shuffle", "vit"])
def test_the_cost_of_a_layer_is_that_of_the_program_in_which_it_alone_is_integer(name: str) -> None:
    model, data = network(name)[0], images(2, 5)
    float_outputs = [interpret(model, torch.from_numpy(data[i : i + 1])).numpy() for i in range(2)]
    off = []
    for layer in model.graph.layers[:: max(1, len(model.graph.layers) // 3)]:
        config = QuantConfig(default_precision="fp32", precision={layer.name: "w4a8"})
        subject = subject_of(model, config, images(16))
        found, used = layer_errors(subject, data, always)
        assert used == 2 and found[0].layer == layer.name
        assert [one.divergence for one in found[1:]] == [None] * (len(found) - 1)
        outputs = [
            run_program(subject.program, data[i : i + 1], lambda op, given: run_foreign(op.key, op.constants, given))
            for i in range(2)
        ]
        expected = np.mean(
            [mean_divergence(a, b[subject.program.output.name]) for a, b in zip(float_outputs, outputs, strict=True)]
        )
        off.append(abs((found[0].divergence or 0.0) / expected - 1))
        assert 0 < found[0].weight_share <= 1  # type: ignore[operator]
    # Elsewhere too a residual may take its neighbour's bytes; and sums in another order round a value the other way.
    assert np.median(off) < 0.05, off


def test_errors_grow_from_layer_to_layer_and_shrink_with_the_precision() -> None:
    model = network("residual")[0]
    by_precision = {}
    for precision in ("int16", "int8", "w4a8"):
        config = QuantConfig.model_validate({"default_precision": precision})
        found, _ = layer_errors(subject_of(model, config, images(16)), images(2, 5), always)
        assert [one.divergence for one in found] == sorted((one.divergence for one in found), reverse=True)  # type: ignore[type-var]
        by_precision[precision] = {one.layer: one for one in found}
        assert sorted(one.position for one in found) == list(range(len(model.graph.layers)))
        assert np.mean([one.accumulated_snr_db for one in found]) < np.mean([one.snr_db for one in found])  # type: ignore[type-var]
        assert all(one.weight_share + one.activation_share == pytest.approx(1.0) for one in found)  # type: ignore[operator]
    for layer in model.graph.layers:
        ratios = [by_precision[precision][layer.name].snr_db for precision in ("w4a8", "int8", "int16")]
        assert ratios == sorted(ratios)  # type: ignore[type-var]


def test_it_ends_when_told() -> None:
    subject = subject_of(network("residual")[0], QuantConfig(), images(16))
    seen: list[int] = []
    assert layer_errors(subject, images(8, 5), lambda done: seen.append(done) or done < 3)[1] == 3
    assert seen == [1, 2, 3]


def test_an_outlier_channel_under_layer_wise_is_named() -> None:
    subject = lossy(Outlier, QuantConfig(granularity="layer_wise"))
    worst, *others = layer_errors(subject, inputs(8).numpy(), always)[0]
    assert worst.layer == "first"
    assert worst.divergence > 10 * max(one.divergence for one in others)  # type: ignore[operator,type-var]
    assert worst.weight_share > 0.95  # type: ignore[operator]
    # The one loud channel hides the others in the ratio of all values.
    assert worst.channel_snr_db < worst.snr_db - 3  # type: ignore[operator]
    (rounded,) = dead_channels(subject)
    assert rounded.layer == "first" and rounded.kind == "rounded_away" and 3 not in rounded.channels
    assert len(rounded.channels) > 8 and rounded.of == 16
    fine = layer_errors(lossy(Outlier, QuantConfig()), inputs(8).numpy(), always)[0]
    assert max(one.divergence for one in fine) < 0.05 * worst.divergence  # type: ignore[operator,type-var]


def test_dead_channels_are_named() -> None:
    found = {(one.layer, one.kind): one.channels for one in dead_channels(lossy(Dead, QuantConfig()))}
    assert found["first", "zero_weights"] == (5,) and 2 in found["second", "constant"]
    sound = {(one.layer, one.kind): one.channels for one in dead_channels(lossy(Plain, QuantConfig()))}
    assert ("first", "zero_weights") not in sound and 2 not in sound.get(("second", "constant"), ())


def test_clipped_shares_are_those_of_the_values() -> None:
    subject = lossy(Plain, QuantConfig(calibration=Calibration(mode="percentile", percentile=90.0)))
    values: dict[str, np.ndarray] = {}
    interpret(subject.model, inputs(40), lambda node, value: values.update({node.name: value.numpy()}))
    found = {one.value: one for one in clipped_values(subject)}
    assert {"input", "first", "second"} <= set(found) and "head" not in found
    for name, one in found.items():
        step, bin_width = float(subject.affines[name, "uint8"].scale), subject.record.tensors[name].histogram.width
        beyond = (values[name] >= one.high + step / 2) | (values[name] < one.low - step / 2)
        nearly = (values[name] >= one.high + step / 2 + bin_width) | (values[name] < one.low - step / 2 - bin_width)
        assert nearly.mean() <= one.share <= beyond.mean()
        assert 0.04 < one.share < 0.21
    assert [one.share for one in clipped_values(subject)] == sorted((one.share for one in found.values()), reverse=True)


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_nothing_is_clipped_by_the_largest_values(precision: str) -> None:
    for name in ("residual", "excite"):
        subject = subject_of(network(name)[0], QuantConfig.model_validate({"default_precision": precision}), images(16) / 2)
        assert clipped_values(subject) == []
