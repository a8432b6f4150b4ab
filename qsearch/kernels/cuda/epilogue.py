"""What happens to an accumulated value before it is stored; the same arithmetic as on the CPU, one element at a time."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from qsearch.kernels.cuda.simt import converted, load, mul, registers, round_to_int, store
from qsearch.kernels.prim_func import Arguments, declare_arguments
from qsearch.quantize.program import INTEGER_DTYPES

__all__ = ["FLOAT_DTYPES", "Arguments", "declare_arguments", "dequantized", "finished", "held"]

# The dtypes that hold real numbers as they are; all others are in steps of a scale.
FLOAT_DTYPES = ("float32", "float16")
# The largest number of a short float.
LARGEST = {"float16": 65504.0, "float8_e4m3fn": 448.0}


def held(arguments: Arguments) -> Arguments:
    """The same in registers: read once, where what uses them is conditional and repeated."""
    kept = []
    for buffer in (arguments.integers, arguments.floats):
        values = registers(int(buffer.shape[0]), str(buffer.dtype))
        for i in range(int(buffer.shape[0])):
            store(values, i, load(buffer, i))
        kept.append(values)
    return Arguments(*kept)


def dequantized(value: Expr, dtype: str, arguments: Arguments, which: str) -> Expr:
    """f32(f32(value - zero_point) * multiplier), or f32(f32(value) * multiplier) for float values.

    Args:
        value: uint8, int16, float8, float16 or float32.
        dtype: Which of them.
        arguments: The kernel's scalars.
        which: 'a' or 'b': whose zero point and multiplier.
    """
    if dtype in INTEGER_DTYPES:
        value = converted(value, "int32") - arguments.integer(f"{which}_zero_point")
    if dtype != "float32":
        value = converted(value, "float32")
    return mul(value, arguments.float(f"{which}_multiplier"))


def finished(dtype: str, value: Expr, arguments: Arguments, clipped: bool) -> Expr:
    """Clip, round and convert a float32 value for storing.

    For integers: clip(rint(value) + zero_point, qmin, qmax); the clip comes first, in float, which gives the same integers
    because its bounds are integers, and keeps the conversion to int32 from overflowing. For floats: clip(value, low, high)
    where `clipped`, else value; float16 and float8 saturate.
    """
    if dtype in INTEGER_DTYPES:
        zero_point = arguments.integer("zero_point")
        low, high = (converted(arguments.integer(name) - zero_point, "float32") for name in ("qmin", "qmax"))
        whole = round_to_int(tirx.min(tirx.max(value, low), high))
        return converted(whole + zero_point, dtype)
    if clipped:
        value = tirx.min(tirx.max(value, arguments.float("low")), arguments.float("high"))
    if dtype in LARGEST:
        largest = tirx.const(LARGEST[dtype], "float32")
        value = converted(tirx.min(tirx.max(value, tirx.const(-LARGEST[dtype], "float32")), largest), dtype)
    return value
