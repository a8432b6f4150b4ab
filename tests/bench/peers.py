"""The engines qsearch is compared with, each with its own recommended static quantization.

ONNX Runtime: QDQ, per channel, min-max. OpenVINO: NNCF's post-training quantization. Their models are made from
the same torch module and the same calibration images, and are kept in a folder because making them takes longer
than timing them. Needs the extra `bench`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

__all__ = ["PEERS", "Peer", "layer_path"]

Peer = Callable[[], object]


def export_onnx(module: torch.nn.Module, image: np.ndarray, path: Path) -> None:
    """Write the float model; batch size fixed, input named x."""
    torch.onnx.export(module, (torch.from_numpy(image),), str(path), dynamo=False, opset_version=17, input_names=["x"])


def make_onnxruntime(folder: Path, precision: str, images: np.ndarray) -> Path:
    """The model file ONNX Runtime loads."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator = iter([{"x": image[None]} for image in images])

        def get_next(self) -> dict | None:
            return next(self.rows, None)

    if precision == "fp32":
        return folder / "float.onnx"
    path = folder / "onnxruntime-int8.onnx"
    if not path.exists():
        prepared = folder / "prepared.onnx"
        quant_pre_process(str(folder / "float.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return path


def open_onnxruntime(path: Path, image: np.ndarray, threads: int) -> Peer:
    """A call of an ONNX Runtime session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, given)


def make_openvino(folder: Path, precision: str, images: np.ndarray) -> Path:
    """The model file OpenVINO loads."""
    import openvino

    path = folder / f"openvino-{precision}.xml"
    if path.exists():
        return path
    model = openvino.convert_model(str(folder / "float.onnx"))
    if precision == "int8":
        logging.disable(logging.WARNING)
        import nncf

        model = nncf.quantize(model, nncf.Dataset([image[None] for image in images]), subset_size=len(images))
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def open_openvino(path: Path, image: np.ndarray, threads: int, profile: bool = False) -> Peer:
    """A call of an OpenVINO inference request; float stays float32."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": profile,
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(image))

    def call() -> object:
        request.infer()
        return request.profiling_info if profile else request

    return call


PEERS = {"openvino": (make_openvino, open_openvino), "onnxruntime": (make_onnxruntime, open_onnxruntime)}


def layer_path(name: str) -> str:
    """Scope of a module in the names that torch.onnx gives: 'layer1.0.conv1' -> '/layer1/layer1.0/conv1/'."""
    scopes: list[str] = []
    for part in name.split("."):
        scopes.append(f"{scopes[-1]}.{part}" if part.isdigit() and scopes else part)
    return "/" + "/".join(scopes) + "/"


os.environ.setdefault("NNCF_LOG_LEVEL", "ERROR")
