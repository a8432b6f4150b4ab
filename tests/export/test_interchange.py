"""Other formats of a program: they hold its numbers, compute what it computes, and say what they cannot."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, images, network, ranges_of
from real_search import fails, refused, within

from qsearch.build.foreign import run_foreign
from qsearch.config import QuantConfig
from qsearch.errors import ToolchainError, UnsupportedModelError
from qsearch.export import file_formats
from qsearch.export.file_formats import agreement
from qsearch.export.interchange.onnx_file import run_onnx, to_onnx
from qsearch.export.interchange.torch_module import run_archive, save_archive
from qsearch.export.interchange.translate import translate
from qsearch.export.interchange.writer import Rounding
from qsearch.export.runner import batches_of
from qsearch.models.zoo import load_model
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore

IMAGES = images(4, 7)


@cache
def program_of(name: str, precision: str, granularity: str = "channel_wise", batch: int = 1) -> Program:
    """A network in one precision; 'mixed' takes the four in turn."""
    model, _ = network(name, batch)
    chosen = ("int8", "fp32", "int16", "w4a8")
    settings = {"default_precision": precision, "granularity": granularity}
    if precision == "mixed":
        own = {layer.name: chosen[i % 4] for i, layer in enumerate(model.graph.layers)}
        settings = {"precision": own}  # type: ignore[dict-item]
    config = QuantConfig.model_validate(settings)
    return lower(model, config, ranges_of(model, config), WeightStore())


def expected(program: Program, given: np.ndarray = IMAGES) -> np.ndarray:
    """What the reference computes."""
    outputs = [
        run_program(program, batch, lambda op, inputs: run_foreign(op.key, op.constants, inputs))[program.output.name]
        for batch in batches_of(given, program.input.shape[0])
    ]
    return np.concatenate(outputs)[: len(given)]


def close(ours: np.ndarray, theirs: np.ndarray, precision: str) -> None:
    """Integers of 8 bits are the same here; the others may be a step apart where float32 sums them."""
    assert np.abs(ours - theirs).max() <= (3e-7 if precision == "int8" else 2e-2) * np.abs(ours).max()
    assert (ours.argmax(1) == theirs.argmax(1)).all()


@pytest.mark.parametrize(("precision", "rounding"), [("int8", "steps"), ("mixed", "fused")])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "foreign"])
def test_onnx_runtime_computes_the_program(name: str, precision: str, rounding: Rounding, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    program = program_of(name, precision)
    (tmp_path / "x.onnx").write_bytes(to_onnx(translate(program, rounding), name))
    close(expected(program), run_onnx(tmp_path / "x.onnx", IMAGES), precision)


def test_scales_of_fused_layers_yield_the_programs_multipliers() -> None:
    program = program_of("residual", "w4a8")
    network = translate(program, "fused")
    matched = 0
    for op in program.ops:
        if op.key.kind != "conv2d" or op.key.residual or op.output.dtype != "uint8":
            continue
        scale, own = network.constants[f"{op.name}/weight.scale"], op.constants["weight_scale"]
        np.testing.assert_allclose(scale, own, rtol=6e-7)
        given, unit = program.affines[op.inputs[0]].scale, program.affines[op.output.name].scale
        found = (scale * given / unit == op.constants["multiplier"]).mean()
        assert found >= (own * given / unit == op.constants["multiplier"]).mean()
        matched += found > 0.5
    assert matched == 4


@pytest.mark.parametrize(
    ("name", "precision", "rounding"),
    [
        ("residual", "mixed", "float"),
        ("residual", "int8", "sums"),
        ("excite", "int8", "sums"),
        ("foreign", "int8", "float"),
        ("vit", "int8", "float"),
    ],
)
def test_a_torch_archive_computes_the_program(name: str, precision: str, rounding: Rounding, tmp_path: Path) -> None:
    program = program_of(name, precision)
    save_archive(translate(program, rounding), tmp_path / "x.pt2", {"note.json": "{}"})
    close(expected(program), run_archive(tmp_path / "x.pt2", IMAGES), precision)
    called = {str(node.target) for node in torch.export.load(tmp_path / "x.pt2").graph.nodes if node.op == "call_function"}
    assert any("fake_quantize_per_tensor_affine" in name for name in called)
    assert all(name.startswith("aten.") for name in called)


@pytest.mark.parametrize("name", ["residual", "excite", "vit", "swin"])
def test_batches_in_both_formats(name: str, tmp_path: Path) -> None:
    """Four images at a time, of six: the last batch is filled up. Every image has the output that it has alone."""
    pytest.importorskip("onnxruntime")
    program, given = program_of(name, "int8", batch=4), images(6, 7)
    assert program.input.shape[0] == 4
    ours = expected(program, given)
    assert ours.tobytes() == expected(program_of(name, "int8"), given).tobytes()
    (tmp_path / "x.onnx").write_bytes(to_onnx(translate(program, "steps"), name))
    close(ours, run_onnx(tmp_path / "x.onnx", given), "int8")
    save_archive(translate(program, "sums"), tmp_path / "x.pt2", {})
    close(ours, run_archive(tmp_path / "x.pt2", given), "int8")


def test_an_onnx_file_holds_the_programs_numbers() -> None:
    onnx = pytest.importorskip("onnx")
    program = program_of("residual", "int8")
    model = onnx.load_from_string(to_onnx(translate(program), "residual", {"config.json": "{}"}))
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    layers = [op for op in program.ops if op.key.kind == "conv2d"]
    for op in layers:
        held, scale = arrays[f"{op.name}/weight"], arrays[f"{op.name}/weight.scale"]
        assert held.dtype == np.int8
        assert np.array_equal(held.reshape(held.shape[0], held.shape[1], -1), _planar(op.constants["weight"]))
        assert np.array_equal(scale, op.constants["weight_scale"])
        if op.output.dtype == "uint8":
            affine = program.affines[op.output.name]
            written = nodes.get(op.output.name)
            while written is not None and written.op_type == "Clip":
                written = nodes[written.input[0]]
            assert written is not None and written.op_type == "QuantizeLinear"
            assert arrays[written.input[1]] == affine.scale
            assert arrays[written.input[2]] == affine.zero_point and arrays[written.input[2]].dtype == np.uint8
    assert len(layers) == 6
    assert {one.key: one.value for one in model.metadata_props} == {"config.json": "{}"}
    assert model.opset_import[0].version == 21


def _planar(weight: np.ndarray) -> np.ndarray:
    moved = weight.transpose(0, 3, 1, 2)
    return moved.reshape(*moved.shape[:2], -1)


def test_one_scale_for_a_tensor_where_the_configuration_has_one() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(to_onnx(translate(program_of("residual", "int8", "layer_wise")), "residual"))
    scales = [onnx.numpy_helper.to_array(one) for one in model.graph.initializer if one.name.endswith("weight.scale")]
    assert [scale.shape for scale in scales] == [()] * 6


def test_what_onnx_cannot_say() -> None:
    pytest.importorskip("onnx")
    with pytest.raises(UnsupportedModelError, match=r"layer 'leaky': operation aten\.leaky_relu\.default"):
        to_onnx(translate(program_of("foreign", "int8")), "foreign")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    network = translate(program_of("residual", "int8"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ToolchainError, match=r"pip install .*onnx"):
        to_onnx(network, "residual")


def test_agreement_counts_decisions() -> None:
    ours = np.array([[0.0, 2.0], [4.0, 1.0], [1.0, 2.0]], np.float32)
    theirs = np.array([[0.0, 2.0], [1.0, 1.5], [1.0, 2.0]], np.float32)
    found = agreement(ours, theirs)
    assert (found.decisions, found.same, found.largest_difference) == (3, 2, 0.75)


def test_a_trial_and_a_configuration_on_the_command_line(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    study = ("export", "--study", "small", "--pick", "smallest", "--format")
    result = within(small, *study, "onnx", "--out", str(tmp_path / "a.onnx"), "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["files"]
    assert row["agreement"]["same"] == row["agreement"]["decisions"] > 0
    assert row["bytes"] == (tmp_path / "a.onnx").stat().st_size
    own = ("export", "--config", "int8", "--model", "broken_networks:Net", "--data", "data", "--format", "pt2")
    result = within(small, *own, "--out", str(tmp_path / "a.pt2"))
    assert result.returncode == 0, result.stderr
    # What was written is a model to begin from, with all that qsearch asks of one.
    assert load_model(str(tmp_path / "a.pt2")).preprocessing.crop == (16, 16)

    monkeypatch.setattr(
        file_formats, "run_onnx", lambda path, given: -np.ones((len(given), 2)) * [1, 2] * (len(given) % 2 * 2 - 1)
    )
    monkeypatch.setattr(file_formats, "agreement", lambda ours, theirs, head: file_formats.Agreement(100, 99, 0.5))
    result = within(small, *study, "onnx", "--out", str(tmp_path / "b.onnx"))
    refused(result, 1, "99.00 %", "--force")
    # Before it gives up, it says the program's arithmetic itself.
    assert result.stderr.count("comparing with ONNX Runtime") == 2
    assert not list(tmp_path.glob("*b.onnx")) and not list(tmp_path.glob(".export*"))
    result = within(small, *study, "onnx", "--out", str(tmp_path / "b.onnx"), "--force")
    assert result.returncode == 0 and (tmp_path / "b.onnx").exists()


def test_contradictions(small: Path, tmp_path: Path) -> None:
    fails(small, 2, ("--study, or --config",), "export", "--out", "x")
    fails(small, 2, ("--model and --study contradict",), "export", "--study", "small", "--model", "x", "--out", "x")
    fails(small, 2, ("--trial and --config contradict",), "export", "--config", "int8", "--trial", "1", "--out", "x")
    fails(small, 2, ("--force is for",), "export", "--study", "small", "--force", "--out", "x")
    fails(small, 2, ("unknown format 'tflite'", "onnx or pt2"), "export", "--study", "small", "--format", "tflite", "--out", "x")
    fails(small, 2, ("ending in .onnx",), "export", "--study", "small", "--format", "onnx", "--out", str(tmp_path / "x"))
