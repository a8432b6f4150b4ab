"""Programs that take pixels and give a class: normalisation and the choice of the class as operations of their own.

A pixel has 256 values, so that normalising and quantizing it is a table per channel, computed here by the very float
arithmetic that it stands for (`Preprocessing.apply`, then the reference's quantize): the integers after it are the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qsearch.data import Preprocessing
from qsearch.quantize.affine import Affine
from qsearch.quantize.program import Op, OpKey, Program, Value
from qsearch.quantize.reference import run_op
from qsearch.quantize.scalars import output_scalars, scalars

__all__ = ["normalised_pixels", "quantized_pixels", "with_preprocessing"]

PIXELS, CLASS = "pixels", "class"


def with_preprocessing(program: Program, preprocessing: Preprocessing) -> Program:
    """The program of the same model, from pixels to the index of its largest output.

    Args:
        program: Takes float32 (N, C, H, W), gives float32 (N, classes).
        preprocessing: What the program's input was made with; resizing and cropping stay outside.

    Returns:
        A program that takes uint8 (N, H, W, C), resized and cropped, and gives int32 (N,).
    """
    table, given = normalised_pixels(preprocessing), program.input
    n, channels, height, width = given.shape
    pixels = Value(PIXELS, (n, height, width, channels), "uint8")
    ops: list[Op] = []
    if any(given.name in op.inputs and op.key.kind != "to_channels_last" for op in program.ops):
        # An operator of torch's own reads the image as torch has it.
        last = Value(f"{given.name}:normalised", pixels.shape, "float32")
        ops.append(_looked_up(PIXELS, pixels, last, table))
        key = OpKey("to_channels_first", (last.shape, given.shape), ("float32", "float32"))
        ops.append(Op(f"{given.name}.to_channels_first", key, (last.name,), given))
    for op in program.ops:
        if op.key.kind == "to_channels_last" and op.inputs == (given.name,):
            ops.append(_looked_up(op.name, pixels, op.output, _written(op, table)))
        else:
            ops.append(op)
    logits = program.output
    key = OpKey("argmax", (logits.shape, logits.shape[:1]), (logits.dtype, "int32"))
    ops.append(Op("argmax", key, (logits.name,), Value(CLASS, logits.shape[:1], "int32")))
    return replace(program, input=pixels, ops=tuple(ops), output=ops[-1].output)


def normalised_pixels(preprocessing: Preprocessing) -> np.ndarray:
    """What each value of a pixel becomes, float32 (256, C)."""
    values = np.arange(256, dtype=np.uint8).astype(np.float32)[:, None] / np.float32(255)
    return (values - np.asarray(preprocessing.mean, np.float32)) / np.asarray(preprocessing.std, np.float32)


def quantized_pixels(normalised: np.ndarray, affine: Affine) -> np.ndarray:
    """The table of a program's first operation under a scale of its output, uint8 (256, C).

    Args:
        normalised: By `normalised_pixels`.
        affine: Scale and zero point.
    """
    channels = normalised.shape[1]
    key = OpKey("to_channels_last", ((1, channels, 1, 256), (1, 1, 256, channels)), ("float32", "uint8"))
    constants = scalars(multiplier=1 / float(affine.scale), **output_scalars(affine))
    return _written(Op("", key, ("",), Value("", (1, 1, 256, channels), "uint8"), constants), normalised)


def _looked_up(name: str, pixels: Value, output: Value, table: np.ndarray) -> Op:
    key = OpKey("pixels", (pixels.shape, output.shape), ("uint8", output.dtype))
    return Op(name, key, (pixels.name,), output, {"table": table})


def _written(op: Op, table: np.ndarray) -> np.ndarray:
    """The table as `op` writes it: run on an image of one row that holds every pixel once."""
    image = np.ascontiguousarray(table.T)[None, :, None]
    shape = (1, 1, *table.shape)
    once = replace(op, key=replace(op.key, shapes=(image.shape, shape)), output=replace(op.output, shape=shape))
    return run_op(once, [image]).reshape(table.shape)
