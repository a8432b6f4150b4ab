"""Write a translated program as an ONNX model, and run it with ONNX Runtime.

8-bit values are uint8 with a zero point, weights int8 along the output channels or for the whole tensor, biases int32;
4-bit weights are written as the int8 values they have after scales and offsets of their groups; 16-bit values and
weights are int16, as opset 21 allows. An operator that only knows floats stands between a DequantizeLinear and a
QuantizeLinear, which is what ONNX Runtime, TensorRT and OpenVINO fuse into integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qsearch.errors import BundleError, ToolchainError, UnsupportedModelError
from qsearch.export.interchange.steps import QuantizedNetwork, Step, in_batches
from qsearch.quantize.affine import Affine

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "run_onnx", "runtime_is_there", "to_onnx"]

# The first in which integers of 16 bits may be quantized to.
OPSET, IR_VERSION = 21, 10
INSTALL = "pip install 'qsearch[onnx]' (or -e '.[onnx]' in a checkout)"
# Steps whose ONNX operator has the same name, inputs and attributes.
SAME = (
    *("Add", "AveragePool", "Concat", "Conv", "Div", "Gather", "Gemm", "GlobalAveragePool", "HardSigmoid", "HardSwish"),
    *("Identity", "LayerNormalization", "MatMul", "Max", "MaxPool", "Min", "Mul", "Sigmoid", "Softmax", "Tanh", "Transpose"),
    "Gelu",
)


class _File:
    """Nodes and initializers while they are being written."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = dict(network.constants)
        self._shared: dict[tuple[str, bytes], str] = {}

    def node(self, op: str, inputs: tuple[str, ...], output: str, **attributes: Any) -> str:
        import onnx

        self.nodes.append(onnx.helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def shared(self, array: np.ndarray) -> str:
        """A small constant, written once."""
        key = f"{array.dtype}{array.shape}", array.tobytes()
        if key not in self._shared:
            self._shared[key] = f"constant.{len(self._shared)}"
            self.arrays[self._shared[key]] = array
        return self._shared[key]

    def affine(self, affine: Affine) -> tuple[str, str]:
        """Scale and zero point."""
        zero_point = np.array(affine.zero_point, affine.limits.dtype)
        return self.shared(np.array(affine.scale, np.float32)), self.shared(zero_point)


def to_onnx(network: QuantizedNetwork, name: str, words: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """An ONNX model, serialized.

    Args:
        network: What to write.
        name: Of its graph.
        words: Name -> text, kept as the model's metadata.

    Raises:
        ToolchainError: The package onnx is missing.
        UnsupportedModelError: A step has no counterpart in ONNX; layer and operation are named.
    """
    try:
        import onnx
    except ImportError as error:
        raise ToolchainError(f"writing ONNX needs the package onnx: {INSTALL}") from error
    file = _File(network)
    for step in network.steps:
        _write(file, step)
    read = {given for node in file.nodes for given in node.input}
    arrays = [onnx.numpy_helper.from_array(array, key) for key, array in file.arrays.items() if key in read]
    given = onnx.helper.make_tensor_value_info(network.input, onnx.TensorProto.FLOAT, network.shape)
    made = onnx.helper.make_tensor_value_info(network.output, onnx.TensorProto.FLOAT, network.output_shape)
    graph = onnx.helper.make_graph(file.nodes, name, [given], [made], arrays)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qsearch")
    onnx.helper.set_model_props(model, dict(words))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _write(file: _File, step: Step) -> None:
    if step.op in SAME:
        file.node(step.op, step.inputs, step.output, **step.attributes)
    elif step.op in _OTHERS:
        _OTHERS[step.op](file, step)
    else:
        foreign = step.attributes.get("foreign")
        what = foreign.target if foreign is not None else step.op
        raise UnsupportedModelError(
            f"layer {step.layer!r}: operation {what} has no counterpart in ONNX here; export a bundle or --format pt2, or "
            "replace the operation in the model"
        )


def _quantize(file: _File, step: Step) -> None:
    affine, qmin, qmax = (step.attributes[name] for name in ("affine", "qmin", "qmax"))
    full = np.iinfo(affine.limits.dtype)
    source, output = step.inputs[0], step.output
    clips = (qmin, qmax) != (full.min, full.max)
    if clips and affine.limits.dtype != "uint8":
        # ONNX Runtime clips no int16; these bounds round to themselves.
        bounds = (file.shared(np.array((end - affine.zero_point) * affine.scale, np.float32)) for end in (qmin, qmax))
        source, clips = file.node("Clip", (source, *bounds), f"{output}.clipped"), False
    # Saturation is a clip already; what is narrower is clipped in integers, so that the operators around still fuse.
    whole = file.node("QuantizeLinear", (source, *file.affine(affine)), f"{output}.whole" if clips else output)
    if clips:
        bounds = (file.shared(np.array(end, affine.limits.dtype)) for end in (qmin, qmax))
        file.node("Clip", (whole, *bounds), output)


def _dequantize(file: _File, step: Step) -> None:
    file.node("DequantizeLinear", (*step.inputs, *file.affine(step.attributes["affine"])), step.output)


def _weight(file: _File, step: Step) -> None:
    scale = file.arrays[step.inputs[1]]
    zero_point = file.shared(np.zeros(scale.shape, file.arrays[step.inputs[0]].dtype))
    attributes = {"axis": 0} if scale.ndim else {}
    file.node("DequantizeLinear", (*step.inputs, zero_point), step.output, **attributes)


def _half(file: _File, step: Step) -> None:
    import onnx

    short = file.node("Cast", step.inputs, f"{step.output}.half", to=onnx.TensorProto.FLOAT16)
    file.node("Cast", (short,), step.output, to=onnx.TensorProto.FLOAT)


def _lookup(file: _File, step: Step) -> None:
    import onnx

    index = file.node("Cast", (step.inputs[0],), f"{step.output}.index", to=onnx.TensorProto.INT32)
    file.node("Gather", (step.inputs[1], index), step.output, axis=0)


def _clip(file: _File, step: Step) -> None:
    bounds = (file.shared(np.array(step.attributes[end], np.float32)) for end in ("low", "high"))
    file.node("Clip", (*step.inputs, *bounds), step.output)


def _reshape(file: _File, step: Step) -> None:
    file.node("Reshape", (*step.inputs, file.shared(np.array(step.attributes["shape"], np.int64))), step.output)


def _slice(file: _File, step: Step) -> None:
    starts, ends = (file.shared(np.array(step.attributes[name], np.int64)) for name in ("starts", "ends"))
    file.node("Slice", (*step.inputs, starts, ends), step.output)


def _row_length(file: _File, step: Step) -> None:
    axes = file.shared(np.array([-1], np.int64))
    file.node("ReduceL2", (*step.inputs, axes), step.output, keepdims=1)


_OTHERS: dict[str, Callable[[_File, Step], None]] = {
    "Quantize": _quantize,
    "Dequantize": _dequantize,
    "Weight": _weight,
    "Half": _half,
    "Lookup": _lookup,
    "Clip": _clip,
    "Reshape": _reshape,
    "Slice": _slice,
    "RowLength": _row_length,
}


def runtime_is_there() -> bool:
    """Whether ONNX Runtime can be imported."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


def run_onnx(path: Path, images: np.ndarray, threads: int = 1) -> np.ndarray:
    """What ONNX Runtime gives for images, as many at a time as the model takes.

    Args:
        path: The model.
        images: float32 (N, C, H, W).
        threads: Of the runtime.

    Returns:
        float32 (N, ...).

    Raises:
        ToolchainError: The package onnxruntime is missing.
        BundleError: The runtime refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ToolchainError(f"running ONNX needs the package onnxruntime: {INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        return in_batches(lambda batch: session.run(None, {given.name: batch})[0], images, given.shape[0])
    except Exception as error:  # the runtime has a class of its own for each status and no common one
        raise BundleError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {path}: {str(error).splitlines()[0][:300]}"
        ) from error
